// Packing's lossless re-coding: the same coefficients under other Huffman tables, with restart
// markers. docs/format.md, "Canonical form", says what comes out.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "abi/status.h"
#include "imagenet_seq.h"
#include "jpeg/codes.h"
#include "jpeg/coefficients.h"
#include "jpeg/header.h"
#include "jpeg/markers.h"
#include "jpeg/progressive.h"
#include "pack/huffman.h"

namespace imseq {

namespace {

// Pillow refuses larger images unless told otherwise (twice MAX_IMAGE_PIXELS), so they stay as they
// are.
constexpr int64_t kMaxPixels = 178956970;

// ---- metadata -----------------------------------------------------------------------------------

struct Bytes {
  const uint8_t* data;
  size_t size;

  [[nodiscard]] bool begins_with(const char* prefix, size_t prefix_size) const {
    return size >= prefix_size && std::memcmp(data, prefix, prefix_size) == 0;
  }
};

// The orientation tag of an Exif segment's first directory (Exif 2.3, 4.6.4 A); 1 where there is
// none.
int exif_orientation(Bytes payload) {
  constexpr size_t kTiffOffset = 6, kEntrySize = 12;
  constexpr uint32_t kOrientationTag = 0x0112, kTypeShort = 3;
  if (payload.size < kTiffOffset + 8) return 1;
  const Bytes tiff{payload.data + kTiffOffset, payload.size - kTiffOffset};
  const bool little = tiff.data[0] == 'I';
  const auto read = [&](size_t offset, int num_bytes) {
    uint32_t value = 0;
    for (int i = 0; i < num_bytes; ++i) {
      value = value << 8 | tiff.data[offset + (little ? num_bytes - 1 - i : i)];
    }
    return value;
  };
  const size_t directory = read(4, 4);
  if (directory > tiff.size - 2) return 1;
  const size_t num_entries = read(directory, 2);
  for (size_t i = 0; i < num_entries; ++i) {
    const size_t entry = directory + 2 + i * kEntrySize;
    if (entry + kEntrySize > tiff.size) return 1;
    if (read(entry, 2) == kOrientationTag && read(entry + 2, 2) == kTypeShort) {
      const uint32_t value = read(entry + 8, 2);
      return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
  }
  return 1;
}

// Marker segments, one after the other.
class HeaderWriter {
 public:
  void marker(uint8_t code) { bytes_.insert(bytes_.end(), {0xFF, code}); }
  void segment(uint8_t code, const std::vector<uint8_t>& payload) {
    marker(code);
    const size_t size = payload.size() + 2;
    bytes_.insert(bytes_.end(), {static_cast<uint8_t>(size >> 8), static_cast<uint8_t>(size)});
    bytes_.insert(bytes_.end(), payload.begin(), payload.end());
  }
  void orientation(int value) {
    segment(kApp1, {'E', 'x', 'i', 'f',  0, 0, 'M', 'M', 0, 42, 0, 0,
                    0,   8,  // one directory, at 8
                    0,   1,   1,   0x12, 0, 3, 0,   0,   0, 1,  0, static_cast<uint8_t>(value),
                    0,   0,   0,   0,    0, 0});
  }
  void append(const HeaderWriter& other) {
    bytes_.insert(bytes_.end(), other.bytes_.begin(), other.bytes_.end());
  }
  [[nodiscard]] const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

bool is_metadata(uint8_t marker) { return (marker >= kApp0 && marker <= kApp15) || marker == kCom; }

// Copies the metadata segments in their order. False: there is one that can't be kept in truth.
bool write_metadata(const JpegHeader& header, const uint8_t* bytes, bool strip,
                    HeaderWriter* writer) {
  bool orientation_written = false;
  for (const JpegSegment& segment : header.segments) {
    if (!is_metadata(segment.marker)) continue;
    const Bytes payload{bytes + segment.offset + 4, segment.size - 4};
    const bool is_jfif = segment.marker == kApp0 && payload.begins_with("JFIF", 4);
    const bool is_adobe = segment.marker == kApp14 && payload.begins_with("Adobe", 5);
    if (segment.marker == kApp9 && payload.begins_with(kIntervalSizes, sizeof(kIntervalSizes))) {
      continue;  // this image gets its own
    }
    if (strip && segment.marker == kApp1 && payload.begins_with("Exif\0", 6)) {
      const int orientation = exif_orientation(payload);
      if (orientation != 1 && !orientation_written) writer->orientation(orientation);
      orientation_written = orientation_written || orientation != 1;
    } else if (!strip || is_jfif || is_adobe) {
      // A multi-picture index holds offsets of pictures behind this one: re-coding would break
      // them.
      if (segment.marker == kApp2 && payload.begins_with("MPF", 4)) return false;
      writer->segment(segment.marker, {payload.data, payload.data + payload.size});
    }
  }
  return true;
}

void write_quant_tables(const JpegHeader& header, bool* any_wide, HeaderWriter* writer) {
  *any_wide = false;
  for (int id = 0; id < 4; ++id) {
    const auto uses_it = [&](const JpegComponent& component) {
      return component.quant_table == id;
    };
    const auto begin = header.components.begin();
    if (std::none_of(begin, begin + header.num_components, uses_it)) continue;
    const auto& values = header.quant_tables[static_cast<size_t>(id)].values;
    const bool wide = *std::max_element(values.begin(), values.end()) > 255;
    std::vector<uint8_t> payload{static_cast<uint8_t>(wide << 4 | id)};
    for (const uint16_t value : values) {
      if (wide) payload.push_back(static_cast<uint8_t>(value >> 8));
      payload.push_back(static_cast<uint8_t>(value));
    }
    writer->segment(kDqt, payload);
    *any_wide = *any_wide || wide;
  }
}

void write_frame_header(const JpegHeader& header, bool extended, HeaderWriter* writer) {
  std::vector<uint8_t> payload{8,
                               static_cast<uint8_t>(header.height >> 8),
                               static_cast<uint8_t>(header.height),
                               static_cast<uint8_t>(header.width >> 8),
                               static_cast<uint8_t>(header.width),
                               static_cast<uint8_t>(header.num_components)};
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[static_cast<size_t>(c)];
    payload.push_back(static_cast<uint8_t>(component.id));
    payload.push_back(static_cast<uint8_t>(component.h_sampling << 4 | component.v_sampling));
    payload.push_back(static_cast<uint8_t>(component.quant_table));
  }
  writer->segment(extended ? kSof1 : kSof0, payload);
}

void write_huffman_table(const HuffmanCode& code, size_t table, HeaderWriter* writer) {
  std::array<uint8_t, kMaxDhtBytes> payload;
  const uint8_t* const end = write_dht(code, table, payload.data());
  writer->segment(kDht, {static_cast<const uint8_t*>(payload.data()), end});
}

void write_scan_header(const JpegHeader& header, HeaderWriter* writer) {
  std::vector<uint8_t> payload{static_cast<uint8_t>(header.num_components)};
  for (int c = 0; c < header.num_components; ++c) {
    payload.push_back(static_cast<uint8_t>(header.components[static_cast<size_t>(c)].id));
    payload.push_back(c == 0 ? 0x00 : 0x11);
  }
  payload.insert(payload.end(), {0, 63, 0});
  writer->segment(kSos, payload);
}

// ---- entropy coding -----------------------------------------------------------------------------

// A symbol to code: bits 0 to 9 the table and the symbol in it, bits 16 and up its extra bits.
using Token = uint32_t;
constexpr int kExtraShift = 16;
constexpr uint32_t kTokenSymbol = 0x3FF;
constexpr uint32_t kEndOfBlock = 0x00, kSixteenZeros = 0xF0;

// Tables as in HuffmanCodes, times 256.
constexpr uint32_t dc_table_of(int component) { return component == 0 ? 0x000 : 0x200; }
constexpr uint32_t ac_table_of(int component) { return component == 0 ? 0x100 : 0x300; }

// Bit k is set where block[k] is not zero.
uint64_t nonzero_mask(const int16_t* block) {
#if defined(__SSE2__)
  uint64_t zeros = 0;
  for (int i = 0; i < 64; i += 16) {
    const auto* in = reinterpret_cast<const __m128i*>(block + i);
    // Packing saturates, so it makes no value zero.
    const __m128i bytes = _mm_packs_epi16(_mm_loadu_si128(in), _mm_loadu_si128(in + 1));
    const int is_zero = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    zeros |= static_cast<uint64_t>(is_zero) << i;
  }
  return ~zeros;
#else
  constexpr uint64_t kLow15 = 0x7FFF7FFF7FFF7FFFu;
  static_assert(std::endian::native == std::endian::little, "the first value has the lowest bit");
  uint64_t mask = 0;
  for (int i = 0; i < 64; i += 4) {
    uint64_t four;
    std::memcpy(&four, block + i, sizeof(four));
    const uint64_t top_bits = (((four & kLow15) + kLow15) | four) & ~kLow15;
    // The product brings the four top bits side by side, at bit 48.
    mask |= (((top_bits >> 15) * 0x0001000200040008u) >> 48 & 0xF) << i;
  }
  return mask;
#endif
}

// The category of each value and its extra bits (T.81 F.1.2.1.1), as they stand in a token;
// [value & kCategoryMask]. Values that are too large for that have any token.
constexpr uint32_t kCategoryMask = 0xFFF;
constexpr auto kCategories = [] {
  std::array<Token, kCategoryMask + 1> table{};
  for (int value = -kMaxDcDifference; value <= kMaxDcDifference; ++value) {
    const auto magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    const auto size = static_cast<uint32_t>(std::bit_width(magnitude));
    const auto extra = static_cast<uint32_t>(value < 0 ? value - 1 : value) & ((1u << size) - 1);
    table[static_cast<uint32_t>(value) & kCategoryMask] = size | extra << kExtraShift;
  }
  return table;
}();

constexpr Token category(int32_t value) {
  return kCategories[static_cast<uint32_t>(value) & kCategoryMask];
}

constexpr bool is_too_large(int32_t value, int32_t largest) {
  return static_cast<uint32_t>(value + largest) > static_cast<uint32_t>(2 * largest);
}

using SymbolCounts = std::array<uint64_t, 4 * 256>;  // [table and symbol, as in a token]

// The scan as tokens.
class ScanTokens {
 public:
  // False: a coefficient is larger than an encoder can make it from 8-bit samples.
  [[nodiscard]] bool collect(const JpegHeader& header, const JpegCoefficients& coefficients,
                             int32_t restart_interval) {
    const int64_t interval = restart_interval > 0 ? restart_interval : header.num_mcus();
    int64_t mcus_left = interval;
    size_t num_tokens = 0;
    interval_ends_.clear();
    last_dc_ = {};
    too_large_ = false;
    for (int y = 0; y < header.mcus_high; ++y) {
      make_room(header, num_tokens);
      Token* out = tokens_.data() + num_tokens;
      for (int x = 0; x < header.mcus_wide; ++x) {
        if (mcus_left == 0) {
          interval_ends_.push_back(static_cast<size_t>(out - tokens_.data()));
          last_dc_ = {};
          mcus_left = interval;
        }
        --mcus_left;
        out = collect_mcu(header, coefficients, x, y, out);
      }
      num_tokens = static_cast<size_t>(out - tokens_.data());
    }
    interval_ends_.push_back(num_tokens);
    return !too_large_;
  }

  [[nodiscard]] const Token* begin() const { return tokens_.data(); }
  [[nodiscard]] const Token* end() const { return begin() + interval_ends_.back(); }
  [[nodiscard]] size_t num_intervals() const { return interval_ends_.size(); }
  [[nodiscard]] const Token* interval_end(size_t i) const { return begin() + interval_ends_[i]; }

  [[nodiscard]] SymbolCounts counts() const {
    SymbolCounts result{};
    for (const Token token : *this) ++result[token & kTokenSymbol];
    return result;
  }

 private:
  // A row of MCUs has at most 64 tokens a block: then no token needs a check of its own.
  void make_room(const JpegHeader& header, size_t num_tokens) {
    size_t row_blocks = 0;
    for (int c = 0; c < header.num_components; ++c) {
      const JpegComponent& component = header.components[static_cast<size_t>(c)];
      row_blocks += static_cast<size_t>(component.blocks_wide) * component.mcu_height;
    }
    const size_t needed = num_tokens + row_blocks * 64;
    if (needed > tokens_.size()) tokens_.resize(std::max(needed, tokens_.size() * 2));
  }

  Token* collect_mcu(const JpegHeader& header, const JpegCoefficients& coefficients, int x, int y,
                     Token* out) {
    for (int c = 0; c < header.num_components; ++c) {
      const JpegComponent& component = header.components[static_cast<size_t>(c)];
      for (int v = 0; v < component.mcu_height; ++v) {
        const int16_t* block =
            coefficients.block(c, y * component.mcu_height + v, x * component.mcu_width);
        for (int h = 0; h < component.mcu_width; ++h, block += 64) {
          out = collect_block(block, c, out);
        }
      }
    }
    return out;
  }

  // T.81 F.1.2.1 and F.1.2.2.
  Token* collect_block(const int16_t* block, int component, Token* out) {
    int32_t& last_dc = last_dc_[static_cast<size_t>(component)];
    const int32_t difference = block[0] - last_dc;
    last_dc = block[0];
    *out++ = dc_table_of(component) | category(difference);
    bool too_large = is_too_large(difference, kMaxDcDifference);
    const uint32_t table = ac_table_of(component);
    int last = 0;
    for (uint64_t mask = nonzero_mask(block) & ~uint64_t{1}; mask != 0; mask &= mask - 1) {
      const int k = std::countr_zero(mask);
      int run = k - last - 1;
      for (; run > 15; run -= 16) *out++ = table | kSixteenZeros;
      *out++ = table | static_cast<uint32_t>(run) << 4 | category(block[k]);
      too_large |= is_too_large(block[k], kMaxAc);
      last = k;
    }
    if (last != 63) *out++ = table | kEndOfBlock;
    too_large_ |= too_large;
    return out;
  }

  std::vector<Token> tokens_;
  std::vector<size_t> interval_ends_;
  std::array<int32_t, 3> last_dc_{};
  bool too_large_ = false;
};

// How a token's symbol is written: its code, moved up to make place for the extra bits.
struct SymbolCode {
  uint32_t bits;
  int32_t length;  // extra bits included
};

using SymbolCodes = std::array<SymbolCode, 4 * 256>;

SymbolCodes symbol_codes(const HuffmanCodes& codes) {
  SymbolCodes result{};
  for (size_t table = 0; table < codes.size(); ++table) {
    for (size_t symbol = 0; symbol < 256; ++symbol) {
      const int extra_length = static_cast<int>(symbol & 15);
      const int length = codes[table].length[symbol] + extra_length;
      const uint32_t bits = static_cast<uint32_t>(codes[table].code[symbol]) << extra_length;
      result[table << 8 | symbol] = {bits, length};
    }
  }
  return result;
}

// Bits as bytes, most significant first. Stores eight bytes at a time, of which those behind
// position() mean nothing yet.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* begin) : position_(begin) {}

  // Up to 32 bits.
  void put(uint32_t bits, int length) {
    accumulator_ = accumulator_ << length | bits;
    used_ += length;
    const uint64_t word = __builtin_bswap64(accumulator_ << (63 - used_) << 1);
    std::memcpy(position_, &word, sizeof(word));
    position_ += used_ >> 3;
    used_ &= 7;
  }
  // Fills the last byte with ones.
  void fill_byte() { put((1u << (-used_ & 7)) - 1, -used_ & 7); }

  // Continues at begin, where nothing of the bytes before matters any more.
  void restart(uint8_t* begin) { position_ = begin; }
  [[nodiscard]] uint8_t* position() const { return position_; }

 private:
  uint8_t* position_;
  uint64_t accumulator_ = 0;  // its lowest used_ bits are still to be written
  int used_ = 0;
};

// Entropy-coded data inside [begin, end), with the zero byte that has to follow each 0xFF (T.81
// F.1.2.3). Where there is no room for more, writes nothing more and says so at the end.
class StuffingWriter {
 public:
  StuffingWriter(uint8_t* begin, uint8_t* end) : position_(begin), end_(end) {}

  void write(const uint8_t* bytes, const uint8_t* bytes_end) {
    full_ |= end_ - position_ < 2 * (bytes_end - bytes);
    if (full_) return;
    for (; bytes_end - bytes >= 8; bytes += 8) {
      uint64_t word;
      std::memcpy(&word, bytes, sizeof(word));
      // A byte of 0xFF, or a harmless neighbour of one, carries out of its seven low bits.
      if ((word & ~(word + 0x0101010101010101u) & 0x8080808080808080u) == 0) {
        std::memcpy(position_, &word, sizeof(word));
        position_ += sizeof(word);
      } else {
        stuff(bytes, bytes + 8);
      }
    }
    stuff(bytes, bytes_end);
  }
  void marker(uint8_t code) {
    full_ |= end_ - position_ < 2;
    if (full_) return;
    *position_++ = 0xFF;
    *position_++ = code;
  }

  [[nodiscard]] uint8_t* position() const { return position_; }
  [[nodiscard]] bool full() const { return full_; }

 private:
  void stuff(const uint8_t* bytes, const uint8_t* bytes_end) {
    uint8_t* out = position_;
    for (; bytes != bytes_end; ++bytes) {
      *out++ = *bytes;
      if (*bytes == 0xFF) *out++ = 0;
    }
    position_ = out;
  }

  uint8_t* position_;
  uint8_t* end_;
  bool full_ = false;
};

// Writes the entropy-coded data, markers included; sizes: the bytes of each restart interval with
// its marker.
void write_scan(const ScanTokens& scan, const HuffmanCodes& huffman, StuffingWriter* writer,
                std::vector<size_t>* sizes) {
  constexpr ptrdiff_t kTokensAtOnce = 1024;  // with their bytes they stay in the L1 cache
  const SymbolCodes codes = symbol_codes(huffman);
  std::array<uint8_t, kTokensAtOnce * 4 + 16> unstuffed;
  BitWriter bits(unstuffed.data());
  const Token* token = scan.begin();
  for (size_t i = 0; i < scan.num_intervals(); ++i) {
    const uint8_t* const begin = writer->position();
    const Token* const interval_end = scan.interval_end(i);
    const bool is_last = i + 1 == scan.num_intervals();
    while (token != interval_end) {
      const Token* const end = token + std::min(interval_end - token, kTokensAtOnce);
      for (; token != end; ++token) {
        const SymbolCode code = codes[*token & kTokenSymbol];
        bits.put(code.bits | *token >> kExtraShift, code.length);
      }
      if (token == interval_end) bits.fill_byte();
      writer->write(unstuffed.data(), bits.position());
      bits.restart(unstuffed.data());
    }
    writer->marker(is_last ? kEoi : static_cast<uint8_t>(kRst0 + i % 8));
    sizes->push_back(static_cast<size_t>(writer->position() - begin));
  }
}

// ---- the whole ----------------------------------------------------------------------------------

// An image taken apart.
struct Source {
  JpegHeader header;
  JpegCoefficients coefficients;
  ScanTokens scan;
};

// Kept from call to call, so that its memory is.
Source& source_of_thread() {
  static thread_local Source source;
  return source;
}

// Gives memory back after an image so large that few others are: a thread keeps tens of MB at most.
void forget_if_huge(Source* source) {
  constexpr int64_t kKeptPixels = int64_t{1} << 21;
  if (int64_t{source->header.width} * source->header.height > kKeptPixels) *source = {};
}

// False: not to be re-coded.
bool take_apart(const uint8_t* bytes, size_t size, int32_t restart_interval, Source* out) {
  const JpegKind kind = parse_jpeg(bytes, size, &out->header);
  if (kind != JpegKind::kBaseline && kind != JpegKind::kSeveralScans) return false;
  if (int64_t{out->header.width} * out->header.height > kMaxPixels) return false;
  const bool sound = kind == JpegKind::kBaseline
                         ? decode_coefficients(out->header, bytes, size, &out->coefficients)
                         : decode_scans(bytes, size, &out->header, &out->coefficients);
  return sound && out->scan.collect(out->header, out->coefficients, restart_interval);
}

void fill_header(const JpegHeader& from, int restart_interval, size_t entropy_offset,
                 imseq_header* out) {
  *out = {};
  out->width = from.width;
  out->height = from.height;
  out->num_components = from.num_components;
  for (int c = 0; c < from.num_components; ++c) {
    out->h_sampling[c] = from.components[static_cast<size_t>(c)].h_sampling;
    out->v_sampling[c] = from.components[static_cast<size_t>(c)].v_sampling;
  }
  out->restart_interval = restart_interval;
  out->supported = 1;
  out->entropy_offset = static_cast<int64_t>(entropy_offset);
}

struct Settings {
  int32_t restart_interval;
  bool strip;
  const uint8_t* tables;  // of the pack; null: the image's own
};

// False: the pack's tables are not what imseq_fit_tables gives.
bool choose_codes(const ScanTokens& scan, const uint8_t* pack_tables, HuffmanCodes* out) {
  if (pack_tables != nullptr) return read_pack_tables(pack_tables, out);
  const SymbolCounts counts = scan.counts();
  for (size_t table = 0; table < out->size(); ++table) {
    (*out)[table] = fit_huffman_code(counts.data() + table * 256);
  }
  return true;
}

// Bytes that are enough for the entropy-coded data: each may need a stuffed one, and an interval
// adds a part of a byte and its marker.
size_t enough_for_scan(const ScanTokens& scan, const HuffmanCodes& codes) {
  const SymbolCounts counts = scan.counts();
  uint64_t num_bits = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    num_bits += counts[i] * (codes[i / 256].length[i % 256] + (i & 15));
  }
  return 2 * (num_bits / 8 + scan.num_intervals() * 2);
}

// The APP9 segment that says how many bytes each restart interval takes, its marker included.
size_t interval_sizes_bytes(size_t num_intervals) {
  constexpr size_t kMaxPayload = 65533;
  const size_t payload = sizeof(kIntervalSizes) + 2 * num_intervals;
  return payload <= kMaxPayload ? payload + 4 : 0;  // 0: there is none
}

void write_interval_sizes(const std::vector<size_t>& sizes, HeaderWriter* writer) {
  std::vector<uint8_t> payload(std::begin(kIntervalSizes), std::end(kIntervalSizes));
  for (const size_t size : sizes) {
    payload.push_back(static_cast<uint8_t>(size >> 8));
    payload.push_back(static_cast<uint8_t>(size));
  }
  writer->segment(kApp9, payload);
}

// Everything up to the restart interval. False: there is metadata that can't be kept in truth.
bool write_head(const Source& source, const uint8_t* bytes, const Settings& settings,
                const HuffmanCodes& codes, HeaderWriter* writer) {
  writer->marker(kSoi);
  if (!write_metadata(source.header, bytes, settings.strip, writer)) return false;
  bool extended = false;
  write_quant_tables(source.header, &extended, writer);
  write_frame_header(source.header, extended, writer);
  const size_t num_tables = source.header.num_components == 1 ? 2 : 4;
  for (size_t table = 0; table < num_tables; ++table) {
    write_huffman_table(codes[table], table, writer);
  }
  if (settings.restart_interval > 0) {
    writer->segment(kDri, {static_cast<uint8_t>(settings.restart_interval >> 8),
                           static_cast<uint8_t>(settings.restart_interval)});
  }
  return true;
}

int32_t transcode(const uint8_t* bytes, size_t size, const Settings& settings, uint8_t* out,
                  size_t capacity, size_t* out_size, imseq_header* out_header, Source* source,
                  imseq_error* error) {
  const ScanTokens& scan = source->scan;
  if (!take_apart(bytes, size, settings.restart_interval, source)) return IMSEQ_FOREIGN;
  HuffmanCodes codes;
  if (!choose_codes(scan, settings.tables, &codes)) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "tables: expected %d bytes as imseq_fit_tables gives, got others",
                IMSEQ_TABLES_BYTES);
  }
  HeaderWriter head, scan_header;
  if (!write_head(*source, bytes, settings, codes, &head)) return IMSEQ_FOREIGN;
  write_scan_header(source->header, &scan_header);

  // The intervals' sizes stand before them, so they are coded first, behind the place for the rest.
  const size_t sizes_bytes =
      settings.restart_interval > 0 ? interval_sizes_bytes(scan.num_intervals()) : 0;
  const size_t place = head.bytes().size() + sizes_bytes + scan_header.bytes().size();
  StuffingWriter writer(out + std::min(place, capacity), out + capacity);
  std::vector<size_t> sizes;
  sizes.reserve(scan.num_intervals());
  write_scan(scan, codes, &writer, &sizes);
  if (writer.full()) {
    *out_size = place + enough_for_scan(scan, codes);
    return fail(error, IMSEQ_ERROR_CAPACITY, -1, -1, 0,
                "the re-coded image needs up to %zu bytes, the buffer has %zu", *out_size,
                capacity);
  }
  const auto fits = [](size_t interval_size) { return interval_size <= 0xFFFF; };
  if (sizes_bytes > 0 && std::all_of(sizes.begin(), sizes.end(), fits)) {
    write_interval_sizes(sizes, &head);
  }
  head.append(scan_header);
  const size_t head_size = head.bytes().size();
  const auto scan_size = static_cast<size_t>(writer.position() - out) - place;
  if (head_size < place) std::memmove(out + head_size, out + place, scan_size);
  std::memcpy(out, head.bytes().data(), head_size);
  *out_size = head_size + scan_size;
  if (out_header != nullptr) {
    fill_header(source->header, settings.restart_interval, head_size, out_header);
  }
  return IMSEQ_OK;
}

int32_t check_arguments(const uint8_t* bytes, size_t size, int32_t restart_interval,
                        imseq_error* error) {
  if (bytes == nullptr && size > 0) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "bytes: expected a pointer, got NULL");
  }
  if (restart_interval < 0 || restart_interval > 65535) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "restart_interval: expected 0 to 65535 MCUs, got %d", restart_interval);
  }
  return IMSEQ_OK;
}

int32_t out_of_memory(size_t size, imseq_error* error) {
  forget_if_huge(&source_of_thread());
  return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0,
              "out of memory while re-coding a JPEG of %zu bytes", size);
}

}  // namespace

}  // namespace imseq

int32_t imseq_transcode(const uint8_t* bytes, size_t size, int32_t restart_interval,
                        uint32_t options, const uint8_t* tables, uint8_t* out, size_t capacity,
                        size_t* out_size, imseq_header* header, imseq_error* error) try {
  int32_t status = imseq::check_arguments(bytes, size, restart_interval, error);
  if (status != IMSEQ_OK) return status;
  if ((out == nullptr && capacity > 0) || out_size == nullptr) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "imseq_transcode: out and out_size must not be null");
  }
  const bool strip = (options & IMSEQ_STRIP_METADATA) != 0;
  imseq::Source& source = imseq::source_of_thread();
  status = imseq::transcode(bytes, size, {restart_interval, strip, tables}, out, capacity, out_size,
                            header, &source, error);
  imseq::forget_if_huge(&source);
  return status;
} catch (const std::bad_alloc&) {
  return imseq::out_of_memory(size, error);
}

int32_t imseq_count_symbols(const uint8_t* bytes, size_t size, int32_t restart_interval,
                            uint64_t* counts, imseq_error* error) try {
  const int32_t status = imseq::check_arguments(bytes, size, restart_interval, error);
  if (status != IMSEQ_OK) return status;
  if (counts == nullptr) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "counts: expected a pointer, got NULL");
  }
  imseq::Source& source = imseq::source_of_thread();
  const bool good = imseq::take_apart(bytes, size, restart_interval, &source);
  if (good) {
    const imseq::SymbolCounts more = source.scan.counts();
    for (size_t i = 0; i < more.size(); ++i) counts[i] += more[i];
  }
  imseq::forget_if_huge(&source);
  return good ? IMSEQ_OK : IMSEQ_FOREIGN;
} catch (const std::bad_alloc&) {
  return imseq::out_of_memory(size, error);
}

int32_t imseq_fit_tables(const uint64_t* counts, uint8_t* out, imseq_error* error) try {
  static_assert(IMSEQ_TABLES_BYTES == imseq::kPackTablesBytes);
  if (counts == nullptr || out == nullptr) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "imseq_fit_tables: expected pointers, got NULL");
  }
  for (size_t i = 0; i < 4 * 256; ++i) {
    if (counts[i] < imseq::kMaxSymbolCount) continue;
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "counts[%zu]: expected less than 2^48, got %llu", i,
                       static_cast<unsigned long long>(counts[i]));
  }
  for (size_t table = 0; table < 4; ++table) {
    const imseq::HuffmanKind kind = imseq::kind_of_table(table);
    out = imseq::write_dht(imseq::fit_pack_code(counts + table * 256, kind), table, out);
  }
  return IMSEQ_OK;
} catch (const std::bad_alloc&) {
  return imseq::fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0,
                     "out of memory while fitting Huffman tables");
}
