#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <vector>

#include "jpeg/coefficients.h"

namespace imseq {

namespace {

// libjpeg writes 10 scans, optimisers not many more. The limit bounds the work on a hostile file,
// in which 15 bits can make a scan pass over 32767 blocks.
constexpr int kMaxScans = 100;

// Limit of a scan's lowest bit: T.81 G.1.1.1.2 and libjpeg-turbo (start_pass_phuff_decoder).
constexpr int kMaxLowBit = 13;

// Blocks with samples of the image; a scan of one component has only these (T.81 A.2.2).
int real_blocks_wide(const JpegComponent& component) { return divide_up(component.width, 8); }
int real_blocks_high(const JpegComponent& component) { return divide_up(component.height, 8); }

// ---- bits and codes -----------------------------------------------------------------------------

// Reads bits of the entropy-coded data, most significant first, up to the next marker. Behind it
// gives zeros, and overrun() is true.
class ScanBits {
 public:
  ScanBits(const uint8_t* bytes, size_t size, size_t at) : bytes_(bytes), size_(size), at_(at) {}

  [[nodiscard]] uint32_t peek16() {
    if (count_ < 16) fill();
    return static_cast<uint32_t>(bits_ >> 48);
  }
  void skip(int n) {
    bits_ <<= n;
    count_ -= n;
  }
  // At most 16.
  uint32_t take(int n) {
    const uint32_t value = peek16() >> (16 - n);
    skip(n);
    return value;
  }
  [[nodiscard]] bool overrun() const { return count_ < 0; }

  // Whether only the bits that pad the last byte are left.
  [[nodiscard]] bool at_end() {
    fill();
    return count_ >= 0 && count_ < 8;
  }
  // Skips the marker. False: something else comes next.
  [[nodiscard]] bool pass_marker(int marker) {
    if (!at_end() || at_ >= size_) return false;
    while (at_ < size_ && bytes_[at_] == 0xFF) ++at_;  // the first, then fill bytes
    if (at_ >= size_ || bytes_[at_++] != marker) return false;
    bits_ = 0;
    count_ = 0;
    return true;
  }
  // Offset of the marker, if at_end() is true.
  [[nodiscard]] size_t offset() const { return at_; }

 private:
  void fill() {
    while (count_ <= 56 && at_ < size_) {
      const uint64_t byte = bytes_[at_];
      if (byte == 0xFF) {
        if (at_ + 1 >= size_ || bytes_[at_ + 1] != 0) return;
        ++at_;
      }
      ++at_;
      bits_ |= byte << (56 - count_);
      count_ += 8;
    }
  }

  const uint8_t* bytes_;
  size_t size_, at_;
  uint64_t bits_ = 0;  // left-aligned
  int count_ = 0;      // valid bits in bits_; negative behind the marker
};

class SymbolDecoder {
 public:
  // The spec must be a prefix code.
  void build(const JpegHuffmanSpec& spec) {
    lookup_.fill(0);
    values_ = spec.values;
    uint32_t code = 0, index = 0;
    for (uint32_t length = 1; length <= 16; ++length, code <<= 1) {
      first_index_[length] = static_cast<int32_t>(index) - static_cast<int32_t>(code);
      for (int i = 0; i < spec.counts[length - 1]; ++i, ++code, ++index) {
        if (length > kLookupBits) continue;
        const uint32_t spare = kLookupBits - length;
        std::fill_n(lookup_.begin() + (code << spare), 1u << spare,
                    static_cast<uint16_t>(length << 8 | spec.values[index]));
      }
      limit_[length] = code << (16 - length);
    }
  }

  // The next symbol; -1: the bits are no code.
  [[nodiscard]] int next(ScanBits& bits) const {
    const uint32_t ahead = bits.peek16();
    const uint32_t entry = lookup_[ahead >> (16 - kLookupBits)];
    if (entry != 0) {
      bits.skip(static_cast<int>(entry >> 8));
      return static_cast<int>(entry & 255);
    }
    for (uint32_t length = kLookupBits + 1; length <= 16; ++length) {
      if (ahead >= limit_[length]) continue;
      bits.skip(static_cast<int>(length));
      const auto code = static_cast<int32_t>(ahead >> (16 - length));
      return values_[static_cast<size_t>(first_index_[length] + code)];
    }
    return -1;
  }

 private:
  static constexpr uint32_t kLookupBits = 9;

  std::array<uint16_t, 1u << kLookupBits> lookup_;  // length << 8 | symbol; 0: a longer code
  std::array<uint32_t, 17> limit_;  // codes of n bits are below limit_[n], left-aligned in 16 bits
  std::array<int32_t, 17> first_index_;  // [n] + c: index in values_ of the code c of n bits
  std::array<uint8_t, 256> values_;
};

// ---- scan headers -------------------------------------------------------------------------------

struct Scan {
  int num_components = 0;
  std::array<int, 3> components{};  // as numbered in the frame
  std::array<size_t, 3> dc_tables{}, ac_tables{};
  int first = 0, last = 0;        // zigzag indices: Ss and Se of T.81
  int high_bit = 0, low_bit = 0;  // Ah and Al: the scan gives the bits from low_bit on

  [[nodiscard]] bool has_dc() const { return first == 0; }
  [[nodiscard]] bool has_ac() const { return last > 0; }
  [[nodiscard]] bool refines() const { return high_bit > 0; }
};

// Parses the scan header that is the last segment (T.81 B.2.3). False: it does not fit the frame.
bool read_scan_header(const JpegHeader& header, const uint8_t* bytes, Scan* scan) {
  const uint8_t* in = header.segments.back().payload(bytes).bytes;
  scan->num_components = *in++;
  int component = -1;
  for (size_t i = 0; i < static_cast<size_t>(scan->num_components); ++i, in += 2) {
    // Components must be in the order of the frame, so none comes twice.
    do {
      if (++component == header.num_components) return false;
    } while (header.components[static_cast<size_t>(component)].id != in[0]);
    scan->components[i] = component;
    scan->dc_tables[i] = in[1] >> 4;
    scan->ac_tables[i] = in[1] & 15;
  }
  scan->first = in[0];
  scan->last = in[1];
  scan->high_bit = in[2] >> 4;
  scan->low_bit = in[2] & 15;
  return true;
}

// The lowest bit of each coefficient that the scans so far have given.
class Progress {
 public:
  explicit Progress(const JpegHeader& header)
      : num_components_(static_cast<size_t>(header.num_components)),
        sequential_(header.frame_marker != kSof2) {
    for (auto& bits : low_bits_) bits.fill(kUnknown);
  }

  [[nodiscard]] bool sequential() const { return sequential_; }

  // False: the scan may not follow the ones before: by T.81 G.1.1.1, or because libjpeg-turbo
  // refuses it or warns (start_pass_phuff_decoder in jdphuff.c, start_pass_huff_decoder in
  // jdhuff.c).
  [[nodiscard]] bool take(const Scan& scan) {
    if (!(sequential_ ? is_sequential(scan) : is_progressive(scan))) return false;
    for (size_t i = 0; i < static_cast<size_t>(scan.num_components); ++i) {
      auto& low_bits = low_bits_[static_cast<size_t>(scan.components[i])];
      if (!scan.has_dc() && low_bits[0] == kUnknown) return false;
      const int expected = scan.refines() ? scan.high_bit : kUnknown;
      for (int k = scan.first; k <= scan.last; ++k) {
        int& low_bit = low_bits[static_cast<size_t>(k)];
        if (low_bit != expected) return false;
        low_bit = scan.low_bit;
      }
    }
    return true;
  }

  [[nodiscard]] bool complete() const {
    return std::all_of(
        low_bits_.begin(), low_bits_.begin() + num_components_, [](const auto& bits) {
          return std::all_of(bits.begin(), bits.end(), [](int low_bit) { return low_bit == 0; });
        });
  }

 private:
  static constexpr int kUnknown = -1;

  static bool is_sequential(const Scan& scan) {
    return scan.first == 0 && scan.last == 63 && scan.high_bit == 0 && scan.low_bit == 0;
  }
  static bool is_progressive(const Scan& scan) {
    const bool band = scan.has_dc()
                          ? scan.last == 0
                          : scan.first <= scan.last && scan.last <= 63 && scan.num_components == 1;
    return band && scan.low_bit <= kMaxLowBit &&
           (!scan.refines() || scan.low_bit == scan.high_bit - 1);
  }

  size_t num_components_;
  bool sequential_;
  std::array<std::array<int, 64>, 3> low_bits_;  // [component][zigzag index]
};

// ---- scans --------------------------------------------------------------------------------------

// A block's coefficients, and a bit for each that is not zero, so that a refinement need not look
// at the zeros.
struct Block {
  int16_t* values;  // in zigzag order
  uint64_t* nonzero;
};

class ScansDecoder {
 public:
  ScansDecoder(const uint8_t* bytes, size_t size, JpegHeader* header, JpegCoefficients* out)
      : bytes_(bytes), size_(size), header_(*header), out_(*out), progress_(*header) {}

  [[nodiscard]] bool decode() {
    if (!prepare()) return false;
    size_t at = header_.entropy_offset;
    for (int num_scans = 1; num_scans <= kMaxScans; ++num_scans) {
      if (!read_scan_header(header_, bytes_, &scan_) || !progress_.take(scan_) || !build_tables() ||
          !decode_scan(&at)) {
        return false;
      }
      const int marker = parse_to_next_scan(bytes_, size_, &at, &header_);
      if (marker == 0) return false;
      if (marker == kEoi) {
        out_.end_offset = at;
        fill_padding();
        return progress_.complete();
      }
    }
    return false;
  }

 private:
  const JpegComponent& component(int c) const { return header_.components[static_cast<size_t>(c)]; }

  // Makes room for the output. False: the bytes can't hold so many blocks, each of which takes at
  // least a bit in its first scan.
  bool prepare() {
    size_t num_blocks = 0;
    for (int c = 0; c < header_.num_components; ++c) {
      num_blocks += static_cast<size_t>(real_blocks_wide(component(c))) *
                    static_cast<size_t>(real_blocks_high(component(c)));
    }
    if (num_blocks > (size_ - header_.entropy_offset) * 8) return false;
    out_.reset(header_);
    for (size_t c = 0; c < nonzero_.size(); ++c)
      nonzero_[c].assign(out_.components[c].size() / 64, 0);
    return true;
  }

  // Builds the tables that the scan uses; a refinement of DC uses none. False: one is no prefix
  // code. (A missing one has no symbols, so the first block fails.)
  bool build_tables() {
    for (size_t i = 0; i < static_cast<size_t>(scan_.num_components); ++i) {
      if (scan_.has_dc() && !scan_.refines()) {
        const size_t index = scan_.dc_tables[i];
        if (index > 3 || !is_dc_table(header_.dc_tables[index])) return false;
        if (!build(header_.dc_tables[index], &dc_[i])) return false;
      }
      if (scan_.has_ac()) {
        const size_t index = scan_.ac_tables[i];
        if (index > 3 || !build(header_.ac_tables[index], &ac_[i])) return false;
      }
    }
    return true;
  }
  static bool build(const JpegHuffmanSpec& spec, SymbolDecoder* decoder) {
    if (!is_prefix_code(spec)) return false;
    decoder->build(spec);
    return true;
  }

  // *at: where its entropy-coded data begin; afterwards the marker behind them.
  bool decode_scan(size_t* at) {
    const bool alone = scan_.num_components == 1;
    const JpegComponent& lone = component(scan_.components[0]);
    const int wide = alone ? real_blocks_wide(lone) : header_.mcus_wide;
    const int high = alone ? real_blocks_high(lone) : header_.mcus_high;
    ScanBits bits(bytes_, size_, *at);
    int mcus_left = header_.restart_interval, number = 0;
    begin_interval();
    for (int y = 0; y < high; ++y) {
      for (int x = 0; x < wide; ++x) {
        if (header_.restart_interval > 0 && mcus_left-- == 0) {
          if (eob_run_ > 0 || !bits.pass_marker(kRst0 + number)) return false;
          number = (number + 1) & 7;
          mcus_left = header_.restart_interval - 1;
          begin_interval();
        }
        const bool sound = alone ? decode_block(bits, 0, y, x) : decode_mcu(bits, y, x);
        if (!sound || bits.overrun()) return false;
      }
    }
    if (eob_run_ > 0 || !bits.at_end()) return false;
    *at = bits.offset();
    return true;
  }

  void begin_interval() {
    predictions_ = {};
    eob_run_ = 0;
  }

  bool decode_mcu(ScanBits& bits, int mcu_y, int mcu_x) {
    for (size_t i = 0; i < static_cast<size_t>(scan_.num_components); ++i) {
      const JpegComponent& it = component(scan_.components[i]);
      for (int y = 0; y < it.mcu_height; ++y) {
        for (int x = 0; x < it.mcu_width; ++x) {
          if (!decode_block(bits, i, mcu_y * it.mcu_height + y, mcu_x * it.mcu_width + x))
            return false;
        }
      }
    }
    return true;
  }

  // Decodes a block of the scan's i-th component.
  bool decode_block(ScanBits& bits, size_t i, int y, int x) {
    const int c = scan_.components[i];
    const auto plane = static_cast<size_t>(c);
    const size_t place = static_cast<size_t>(y) * out_.blocks_wide[plane] + x;
    const Block block{out_.block(c, y, x), &nonzero_[plane][place]};
    if (scan_.refines()) {
      if (scan_.has_ac()) return refine_ac(bits, ac_[i], block);
      if (bits.take(1) != 0) block.values[0] = static_cast<int16_t>(block.values[0] | low_bit());
      return true;
    }
    return (!scan_.has_dc() || decode_dc(bits, dc_[i], &predictions_[i], block.values)) &&
           (!scan_.has_ac() || decode_ac(bits, ac_[i], block));
  }

  // T.81 F.2.2.1; in progressive scans G.1.2.1.
  bool decode_dc(ScanBits& bits, const SymbolDecoder& table, int* prediction, int16_t* values) {
    const int size = table.next(bits);
    if (size < 0) return false;
    *prediction += extend(bits.take(size), size);
    const int value = *prediction * low_bit();
    values[0] = static_cast<int16_t>(value);
    // No sound image has a larger DC, and the next sum can't overflow.
    return value == values[0];
  }

  // T.81 F.2.2.2; in progressive scans G.1.2.2, with runs of blocks that end.
  bool decode_ac(ScanBits& bits, const SymbolDecoder& table, Block block) {
    if (eob_run_ > 0) {
      --eob_run_;
      return true;
    }
    for (int k = std::max(scan_.first, 1); k <= scan_.last; ++k) {
      const int symbol = table.next(bits);
      if (symbol < 0) return false;
      const int run = symbol >> 4, size = symbol & 15;
      if (size == 0 && run < 15) {
        if (run > 0 && progress_.sequential()) return false;
        eob_run_ = (1 << run) - 1 + static_cast<int>(bits.take(run));
        return true;
      }
      k += run;  // of 0xF0's sixteen zeros the loop skips the last
      if (k > scan_.last) return false;
      if (size == 0) continue;
      const int value = extend(bits.take(size), size) * low_bit();
      if (std::abs(value) > kMaxAc) return false;
      block.values[k] = static_cast<int16_t>(value);
      *block.nonzero |= uint64_t{1} << k;
    }
    return true;
  }

  // T.81 G.1.2.3. Every nonzero coefficient passed over has a bit that refines it; runs count only
  // zeros. Magnitudes stay within kMaxAc: the bits added are below those already there.
  bool refine_ac(ScanBits& bits, const SymbolDecoder& table, Block block) {
    int k = scan_.first;
    for (; eob_run_ == 0 && k <= scan_.last; ++k) {
      const int symbol = table.next(bits);
      if (symbol < 0) return false;
      int run = symbol >> 4;
      const int size = symbol & 15;
      if (size > 1) return false;
      if (size == 0 && run < 15) {
        eob_run_ = (1 << run) + static_cast<int>(bits.take(run));
        break;
      }
      int value = 0;
      if (size == 1) value = bits.take(1) != 0 ? low_bit() : -low_bit();
      for (; k <= scan_.last; ++k) {
        if ((*block.nonzero >> k & 1) != 0) {
          refine(bits, &block.values[k]);
        } else if (run-- == 0) {
          break;
        }
      }
      if (k > scan_.last) return false;
      block.values[k] = static_cast<int16_t>(value);
      *block.nonzero |= uint64_t{value != 0} << k;
    }
    if (eob_run_ == 0) return true;
    --eob_run_;
    const uint64_t from_k = k > 63 ? 0 : ~uint64_t{0} << k;
    const uint64_t up_to_last = ~uint64_t{0} >> (63 - scan_.last);
    for (uint64_t left = *block.nonzero & from_k & up_to_last; left != 0; left &= left - 1) {
      refine(bits, &block.values[std::countr_zero(left)]);
    }
    return true;
  }
  void refine(ScanBits& bits, int16_t* value) const {
    if (bits.take(1) == 0) return;
    *value = static_cast<int16_t>(*value + (*value < 0 ? -low_bit() : low_bit()));
  }

  [[nodiscard]] int low_bit() const { return 1 << scan_.low_bit; }

  // Fills padding blocks as libjpeg's encoder does (compress_first_pass in jccoefct.c): no AC, and
  // the DC of the block before, or in a row below the image that of the last block above in the
  // same MCU.
  void fill_padding() {
    const auto fill = [](int16_t* values, int16_t dc) {
      std::fill_n(values, 64, int16_t{0});
      values[0] = dc;
    };
    for (int c = 0; c < header_.num_components; ++c) {
      const JpegComponent& it = component(c);
      const int wide = real_blocks_wide(it), high = real_blocks_high(it);
      for (int y = 0; y < high; ++y) {
        for (int x = wide; x < it.blocks_wide; ++x) {
          fill(out_.block(c, y, x), *out_.block(c, y, wide - 1));
        }
      }
      for (int y = high; y < it.blocks_high; ++y) {
        for (int x = 0; x < it.blocks_wide; ++x) {
          const int last_of_mcu = x - x % it.mcu_width + it.mcu_width - 1;
          fill(out_.block(c, y, x), *out_.block(c, y - 1, last_of_mcu));
        }
      }
    }
  }

  const uint8_t* bytes_;
  size_t size_;
  JpegHeader& header_;
  JpegCoefficients& out_;
  std::array<std::vector<uint64_t>, 3> nonzero_;  // as Block::nonzero
  Progress progress_;
  Scan scan_;                             // the current one
  std::array<SymbolDecoder, 3> dc_, ac_;  // [component of the scan]
  std::array<int, 3> predictions_{};      // DC, [component of the scan]
  int eob_run_ = 0;                       // blocks to come that have no symbols of their own
};

}  // namespace

bool decode_scans(const uint8_t* bytes, size_t size, JpegHeader* header, JpegCoefficients* out) {
  return ScansDecoder(bytes, size, header, out).decode();
}

}  // namespace imseq
