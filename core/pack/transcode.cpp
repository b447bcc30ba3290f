#include "pack/transcode.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "abi/status.h"
#include "pack/header_writer.h"
#include "pack/huffman.h"
#include "pack/scan_writer.h"

namespace imseq {

namespace {

// By default Pillow refuses larger images (twice MAX_IMAGE_PIXELS); they are not re-coded.
constexpr int64_t kMaxPixels = 178956970;

// False: imseq_fit_tables can't have made the pack's tables.
bool choose_codes(const ScanTokens& scan, const uint8_t* pack_tables, HuffmanCodes* out) {
  if (pack_tables != nullptr) return read_pack_tables(pack_tables, out);
  const SymbolCounts counts = scan.counts();
  for (size_t table = 0; table < out->size(); ++table) {
    (*out)[table] = fit_huffman_code(counts.data() + table * 256);
  }
  return true;
}

// An upper bound of the entropy-coded data's bytes: each may be followed by a stuffed one, and an
// interval adds padding and its marker.
size_t enough_for_scan(const ScanTokens& scan, const HuffmanCodes& codes) {
  const SymbolCounts counts = scan.counts();
  uint64_t num_bits = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    num_bits += counts[i] * (codes[i / 256].length[i % 256] + (i & 15));
  }
  return 2 * (num_bits / 8 + scan.num_intervals() * 2);
}

}  // namespace

void Transcoder::trim() {
  constexpr int64_t kKeptPixels = int64_t{1} << 21;  // tens of MB
  if (int64_t{header_.width} * header_.height > kKeptPixels) *this = {};
}

// False: the image can't be re-coded.
bool Transcoder::take_apart(const uint8_t* bytes, size_t size, int32_t restart_interval) {
  const JpegKind kind = parse_jpeg(bytes, size, &header_);
  if (kind != JpegKind::kBaseline && kind != JpegKind::kSeveralScans) return false;
  if (int64_t{header_.width} * header_.height > kMaxPixels) return false;
  const bool sound = kind == JpegKind::kBaseline
                         ? decode_coefficients(header_, bytes, size, &coefficients_)
                         : decode_scans(bytes, size, &header_, &coefficients_);
  return sound && scan_.collect(header_, coefficients_, restart_interval);
}

bool Transcoder::count_symbols(const uint8_t* bytes, size_t size, int32_t restart_interval,
                               uint64_t* counts) {
  if (!take_apart(bytes, size, restart_interval)) return false;
  const SymbolCounts more = scan_.counts();
  for (size_t i = 0; i < more.size(); ++i) counts[i] += more[i];
  return true;
}

int32_t Transcoder::transcode(const uint8_t* bytes, size_t size, const TranscodeSettings& settings,
                              uint8_t* out, size_t capacity, size_t* out_size,
                              size_t* entropy_offset, imseq_error* error) {
  if (!take_apart(bytes, size, settings.restart_interval)) return IMSEQ_NOT_DECODED;
  HuffmanCodes codes;
  if (!choose_codes(scan_, settings.tables, &codes)) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "tables: expected %d bytes as imseq_fit_tables gives, got others",
                IMSEQ_TABLES_BYTES);
  }
  HeaderWriter head, scan_header;
  if (!write_head(header_, bytes, settings.strip, settings.restart_interval, codes, &head))
    return IMSEQ_NOT_DECODED;
  write_scan_header(header_, &scan_header);

  // The header contains the intervals' sizes, so they are coded first, behind the room for it.
  const size_t sizes_bytes =
      settings.restart_interval > 0 ? interval_sizes_bytes(scan_.num_intervals()) : 0;
  const size_t place = head.bytes.size() + sizes_bytes + scan_header.bytes.size();
  StuffingWriter writer(out + std::min(place, capacity), out + capacity);
  std::vector<size_t> sizes;
  sizes.reserve(scan_.num_intervals());
  write_scan(scan_, codes, &writer, &sizes);
  if (writer.full()) {
    *out_size = place + enough_for_scan(scan_, codes);
    return fail(error, IMSEQ_ERROR_CAPACITY, -1, -1, 0,
                "the re-coded image needs up to %zu bytes, the buffer has %zu", *out_size,
                capacity);
  }
  const auto fits = [](size_t interval_size) { return interval_size <= 0xFFFF; };
  if (sizes_bytes > 0 && std::all_of(sizes.begin(), sizes.end(), fits)) {
    write_interval_sizes(sizes, &head);
  }
  head.bytes.insert(head.bytes.end(), scan_header.bytes.begin(), scan_header.bytes.end());
  const size_t head_size = head.bytes.size();
  const auto scan_size = static_cast<size_t>(writer.position() - out) - place;
  if (head_size < place) std::memmove(out + head_size, out + place, scan_size);
  std::memcpy(out, head.bytes.data(), head_size);
  *out_size = head_size + scan_size;
  *entropy_offset = head_size;
  return IMSEQ_OK;
}

}  // namespace imseq
