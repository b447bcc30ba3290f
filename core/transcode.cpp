#include "transcode.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <vector>

#include "imagenet_seq.h"
#include "jpeg.h"
#include "status.h"

namespace imseq {

namespace {

constexpr int kMaxCodeLength = 16;

// num_of_length[l]: leaves at depth l of a Huffman tree over weights, which must be sorted
// ascending. Two queues make the tree in linear time: the leaves, and the inner nodes in order of
// creation.
std::vector<int32_t> huffman_depths(const std::vector<uint64_t>& weights) {
  const size_t num_leaves = weights.size();
  std::vector<uint64_t> weight(weights);
  std::vector<size_t> parent(2 * num_leaves - 1, 0);
  size_t leaf = 0;
  size_t inner = num_leaves;
  const auto take_lightest = [&] {
    // On a tie the leaf goes first: that keeps the longest code as short as possible.
    const bool take_leaf =
        leaf < num_leaves && (inner == weight.size() || weight[leaf] <= weight[inner]);
    return take_leaf ? leaf++ : inner++;
  };
  for (size_t i = 1; i < num_leaves; ++i) {
    const size_t first = take_lightest();
    const size_t second = take_lightest();
    parent[first] = parent[second] = weight.size();
    weight.push_back(weight[first] + weight[second]);
  }
  std::vector<int32_t> depth(weight.size(), 0);
  std::vector<int32_t> num_of_length(num_leaves + 1, 0);
  for (size_t node = weight.size() - 1; node-- > 0;) {
    depth[node] = depth[parent[node]] + 1;
    if (node < num_leaves) ++num_of_length[depth[node]];
  }
  return num_of_length;
}

// T.81 figure K.3: move pairs of codes that are too long up, one at a time, keeping the code
// complete.
void limit_code_lengths(std::vector<int32_t>& num_of_length) {
  for (size_t length = num_of_length.size() - 1; length > kMaxCodeLength; --length) {
    while (num_of_length[length] > 0) {
      size_t shorter = length - 2;
      while (num_of_length[shorter] == 0) --shorter;
      num_of_length[length] -= 2;
      num_of_length[length - 1] += 1;
      num_of_length[shorter + 1] += 2;
      num_of_length[shorter] -= 1;
    }
  }
}

}  // namespace

HuffmanCode fit_huffman_code(const uint32_t* counts) {
  // Rarest first; among equals the larger symbol counts as the rarer.
  std::vector<uint8_t> by_count;
  for (int symbol = 255; symbol >= 0; --symbol) {
    if (counts[symbol] > 0) by_count.push_back(static_cast<uint8_t>(symbol));
  }
  std::stable_sort(by_count.begin(), by_count.end(),
                   [&](uint8_t a, uint8_t b) { return counts[a] < counts[b]; });
  HuffmanCode result;
  if (by_count.empty()) return result;

  // A leaf of no weight takes the last of the longest codes, the one of ones alone.
  std::vector<uint64_t> weights{0};
  for (const uint8_t symbol : by_count) weights.push_back(counts[symbol]);
  std::vector<int32_t> num_of_length = huffman_depths(weights);
  limit_code_lengths(num_of_length);
  size_t longest = std::min<size_t>(kMaxCodeLength, num_of_length.size() - 1);
  while (num_of_length[longest] == 0) --longest;
  --num_of_length[longest];

  uint32_t code = 0;
  size_t rank = by_count.size();
  for (size_t length = 1; length <= longest; ++length, code <<= 1) {
    result.num_codes[length] = static_cast<uint8_t>(num_of_length[length]);
    for (int32_t i = 0; i < num_of_length[length]; ++i) {
      const uint8_t symbol = by_count[--rank];
      result.symbols[result.num_symbols++] = symbol;
      result.code[symbol] = static_cast<uint16_t>(code++);
      result.length[symbol] = static_cast<uint8_t>(length);
    }
  }
  return result;
}

namespace {

// Markers, T.81 table B.1.
constexpr uint8_t kSof0 = 0xC0, kSof1 = 0xC1, kDht = 0xC4, kRst0 = 0xD0, kSoi = 0xD8, kEoi = 0xD9,
                  kSos = 0xDA, kDqt = 0xDB, kDri = 0xDD, kApp0 = 0xE0, kApp1 = 0xE1, kApp2 = 0xE2,
                  kApp14 = 0xEE, kApp15 = 0xEF, kCom = 0xFE;

// Pillow refuses larger images unless told otherwise (twice MAX_IMAGE_PIXELS), so they stay as they
// are.
constexpr int64_t kMaxPixels = 178956970;

// The largest DC difference and the largest AC category for 8-bit samples (T.81 tables F.1 and
// F.2).
constexpr int kLargestValue = 2047;
constexpr uint32_t kMaxAcSize = 10;

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

// Everything of the output before the entropy-coded data.
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

void write_huffman_table(int table_class, int id, const HuffmanCode& code, HeaderWriter* writer) {
  std::vector<uint8_t> payload{static_cast<uint8_t>(table_class << 4 | id)};
  payload.insert(payload.end(), code.num_codes.begin() + 1, code.num_codes.end());
  payload.insert(payload.end(), code.symbols.begin(), code.symbols.begin() + code.num_symbols);
  writer->segment(kDht, payload);
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

// A symbol to code: bits 0 to 9 the table and the symbol in it, bits 16 and up the extra bits.
using Token = uint32_t;
constexpr int kExtraShift = 16;
constexpr uint32_t kTokenSymbol = 0x3FF;
constexpr uint32_t kEndOfBlock = 0x00, kSixteenZeros = 0xF0;

// Tables, times 256: DC and AC of the first component, DC and AC of the others.
constexpr uint32_t ac_table_of(int component) { return component == 0 ? 0x100 : 0x300; }
constexpr uint32_t dc_table_of(int component) { return component == 0 ? 0x000 : 0x200; }

// Bit k is set where block[k] is not zero.
uint64_t nonzero_mask(const int16_t* block) {
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
}

// The category of each value and its extra bits (T.81 F.1.2.1.1), as they stand in a token.
constexpr auto kCategories = [] {
  std::array<Token, 2 * kLargestValue + 1> table{};
  for (int value = -kLargestValue; value <= kLargestValue; ++value) {
    const auto magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    const auto size = static_cast<uint32_t>(std::bit_width(magnitude));
    const auto extra = static_cast<uint32_t>(value < 0 ? value - 1 : value) & ((1u << size) - 1);
    table[static_cast<size_t>(value + kLargestValue)] = size | extra << kExtraShift;
  }
  return table;
}();

// The scan as tokens, and how often each symbol occurs.
class ScanTokens {
 public:
  // False: a coefficient is larger than an encoder can make it from 8-bit samples.
  [[nodiscard]] bool collect(const JpegHeader& header, const JpegCoefficients& coefficients,
                             int restart_interval) {
    const int64_t interval = restart_interval > 0 ? restart_interval : header.num_mcus();
    int64_t mcus_left = interval;
    size_t num_tokens = 0;
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
    return categories_are_baseline();
  }

  // Of symbol, in the table given as dc_table_of or ac_table_of.
  [[nodiscard]] const uint32_t* counts(uint32_t table) const { return counts_.data() + table; }
  [[nodiscard]] const std::vector<size_t>& interval_ends() const { return interval_ends_; }
  [[nodiscard]] const Token* tokens() const { return tokens_.data(); }

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
        for (int h = 0; h < component.mcu_width; ++h) {
          const int16_t* block =
              coefficients.block(c, y * component.mcu_height + v, x * component.mcu_width + h);
          out = collect_block(block, c, out);
        }
      }
    }
    return out;
  }

  // T.81 F.1.2.1 and F.1.2.2.
  Token* collect_block(const int16_t* block, int component, Token* out) {
    int32_t& last_dc = last_dc_[static_cast<size_t>(component)];
    const auto add = [&](Token token) {
      ++counts_[token & kTokenSymbol];
      *out++ = token;
    };
    add(dc_table_of(component) | category(block[0] - last_dc));
    last_dc = block[0];
    const uint32_t table = ac_table_of(component);
    int last = 0;
    for (uint64_t mask = nonzero_mask(block) & ~uint64_t{1}; mask != 0; mask &= mask - 1) {
      const int k = std::countr_zero(mask);
      int run = k - last - 1;
      for (; run > 15; run -= 16) add(table | kSixteenZeros);
      add(table | static_cast<uint32_t>(run) << 4 | category(block[k]));
      last = k;
    }
    if (last != 63) add(table | kEndOfBlock);
    return out;
  }

  Token category(int32_t value) {
    const auto place = static_cast<uint32_t>(value + kLargestValue);
    if (place < kCategories.size()) return kCategories[place];
    value_too_large_ = true;
    return 0;
  }

  [[nodiscard]] bool categories_are_baseline() const {
    if (value_too_large_) return false;
    for (uint32_t symbol = 0; symbol < 256; ++symbol) {
      if ((symbol & 15) <= kMaxAcSize) continue;
      if (counts(ac_table_of(0))[symbol] > 0 || counts(ac_table_of(1))[symbol] > 0) return false;
    }
    return true;
  }

  std::vector<Token> tokens_;
  std::vector<size_t> interval_ends_;
  std::array<uint32_t, 4 * 256> counts_{};
  std::array<int32_t, 3> last_dc_{};
  bool value_too_large_ = false;
};

// How a token's symbol is written: its code, moved up to make place for the extra bits.
struct SymbolCode {
  uint32_t bits;
  int32_t length;  // extra bits included
};

using SymbolCodes = std::array<SymbolCode, 4 * 256>;

// Also adds up the bits that all tokens take.
SymbolCodes symbol_codes(const std::array<HuffmanCode, 4>& codes, const ScanTokens& scan,
                         uint64_t* total_bits) {
  SymbolCodes result{};
  *total_bits = 0;
  for (size_t table = 0; table < 4; ++table) {
    for (size_t symbol = 0; symbol < 256; ++symbol) {
      const int extra_length = static_cast<int>(symbol & 15);
      const int length = codes[table].length[symbol] + extra_length;
      const uint32_t bits = static_cast<uint32_t>(codes[table].code[symbol]) << extra_length;
      result[table << 8 | symbol] = {bits, length};
      *total_bits +=
          static_cast<uint64_t>(scan.counts(static_cast<uint32_t>(table) << 8)[symbol]) * length;
    }
  }
  return result;
}

// Writes bits, with the zero byte that has to follow each 0xFF (T.81 F.1.2.3), inside [begin, end).
class EntropyWriter {
 public:
  EntropyWriter(uint8_t* begin, uint8_t* end) : position_(begin), end_(end) {}

  // Up to 32 bits. False: no room.
  [[nodiscard]] bool put(uint32_t bits, int length) {
    free_ -= length;
    if (free_ >= 0) {
      accumulator_ = accumulator_ << length | bits;
      return true;
    }
    // free_ bits are too many: the accumulator takes what it can and goes out.
    const uint64_t full = accumulator_ << (length + free_) | bits >> -free_;
    accumulator_ = bits;
    free_ += 64;
    return put_eight_bytes(full);
  }

  // Fills the last byte with ones and ends the interval with a marker. False: no room.
  [[nodiscard]] bool finish(uint8_t marker) {
    const int used = 64 - free_;
    const int num_bytes = (used + 7) / 8;
    if (end_ - position_ < 2 * num_bytes + 2) return false;
    const uint64_t ones = (uint64_t{1} << (num_bytes * 8 - used)) - 1;
    const uint64_t padded = num_bytes == 0 ? 0 : accumulator_ << (num_bytes * 8 - used) | ones;
    for (int i = num_bytes - 1; i >= 0; --i) put_byte(static_cast<uint8_t>(padded >> (8 * i)));
    *position_++ = 0xFF;
    *position_++ = marker;
    accumulator_ = 0;
    free_ = 64;
    return true;
  }

  [[nodiscard]] const uint8_t* position() const { return position_; }

 private:
  [[nodiscard]] bool put_eight_bytes(uint64_t value) {
    if (end_ - position_ < 16) return false;
    // A byte of 0xFF, or a harmless neighbour of one, carries out of its seven low bits.
    if ((value & ~(value + 0x0101010101010101u) & 0x8080808080808080u) == 0) {
      value = __builtin_bswap64(value);
      std::memcpy(position_, &value, sizeof(value));
      position_ += sizeof(value);
      return true;
    }
    for (int shift = 56; shift >= 0; shift -= 8) put_byte(static_cast<uint8_t>(value >> shift));
    return true;
  }
  void put_byte(uint8_t byte) {
    *position_++ = byte;
    if (byte == 0xFF) *position_++ = 0;
  }

  uint8_t* position_;
  uint8_t* end_;
  uint64_t accumulator_ = 0;
  int free_ = 64;
};

bool write_scan(const ScanTokens& scan, const SymbolCodes& codes, EntropyWriter* writer) {
  const Token* token = scan.tokens();
  const size_t num_intervals = scan.interval_ends().size();
  for (size_t i = 0; i < num_intervals; ++i) {
    for (const Token* end = scan.tokens() + scan.interval_ends()[i]; token != end; ++token) {
      const SymbolCode code = codes[*token & kTokenSymbol];
      if (!writer->put(code.bits | *token >> kExtraShift, code.length)) return false;
    }
    const bool is_last = i + 1 == num_intervals;
    if (!writer->finish(is_last ? kEoi : static_cast<uint8_t>(kRst0 + i % 8))) return false;
  }
  return true;
}

// ---- the whole ----------------------------------------------------------------------------------

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

int32_t transcode(const uint8_t* bytes, size_t size, int32_t restart_interval, bool strip,
                  uint8_t* out, size_t capacity, size_t* out_size, imseq_header* out_header,
                  imseq_error* error) {
  JpegHeader header;
  if (parse_jpeg(bytes, size, &header) != JpegKind::kBaseline) return IMSEQ_FOREIGN;
  if (int64_t{header.width} * header.height > kMaxPixels) return IMSEQ_FOREIGN;
  HeaderWriter writer;
  writer.marker(kSoi);
  if (!write_metadata(header, bytes, strip, &writer)) return IMSEQ_FOREIGN;

  JpegCoefficients coefficients;
  if (!decode_coefficients(header, bytes, size, &coefficients)) return IMSEQ_FOREIGN;
  ScanTokens scan;
  if (!scan.collect(header, coefficients, restart_interval)) return IMSEQ_FOREIGN;

  bool extended = false;
  write_quant_tables(header, &extended, &writer);
  write_frame_header(header, extended, &writer);
  std::array<HuffmanCode, 4> codes;
  for (int table = 0; table < (header.num_components == 1 ? 2 : 4); ++table) {
    const auto i = static_cast<size_t>(table);
    codes[i] = fit_huffman_code(scan.counts(static_cast<uint32_t>(table) << 8));
    write_huffman_table(table % 2, table / 2, codes[i], &writer);
  }
  if (restart_interval > 0) {
    writer.segment(kDri, {static_cast<uint8_t>(restart_interval >> 8),
                          static_cast<uint8_t>(restart_interval)});
  }
  write_scan_header(header, &writer);

  uint64_t scan_bits;
  const SymbolCodes symbols = symbol_codes(codes, scan, &scan_bits);
  const size_t head_size = writer.bytes().size();
  EntropyWriter entropy(out + std::min(head_size, capacity), out + capacity);
  if (head_size > capacity || !write_scan(scan, symbols, &entropy)) {
    // Every byte may need a stuffed one; an interval adds a part of a byte and its marker, and the
    // writer wants 16 bytes of room.
    *out_size = head_size + 2 * (scan_bits / 8 + scan.interval_ends().size() * 2) + 16;
    return fail(error, IMSEQ_ERROR_CAPACITY, -1, -1, 0,
                "the re-coded image needs up to %zu bytes, the buffer has %zu", *out_size,
                capacity);
  }
  std::memcpy(out, writer.bytes().data(), head_size);
  *out_size = static_cast<size_t>(entropy.position() - out);
  if (out_header != nullptr) fill_header(header, restart_interval, head_size, out_header);
  return IMSEQ_OK;
}

}  // namespace

}  // namespace imseq

int32_t imseq_transcode(const uint8_t* bytes, size_t size, int32_t restart_interval,
                        uint32_t options, uint8_t* out, size_t capacity, size_t* out_size,
                        imseq_header* header, imseq_error* error) {
  if ((bytes == nullptr && size > 0) || (out == nullptr && capacity > 0) || out_size == nullptr) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "imseq_transcode: bytes, out and out_size must not be null");
  }
  if (restart_interval < 0 || restart_interval > 65535) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "restart_interval: expected 0 to 65535 MCUs, got %d", restart_interval);
  }
  try {
    return imseq::transcode(bytes, size, restart_interval, (options & IMSEQ_STRIP_METADATA) != 0,
                            out, capacity, out_size, header, error);
  } catch (const std::bad_alloc&) {
    return imseq::fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0,
                       "out of memory while re-coding a JPEG of %zu bytes", size);
  }
}
