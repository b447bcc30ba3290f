#include "jpeg/coefficients.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/cpu.h"
#include "jpeg/lookup.h"
#include "jpeg/markers.h"

namespace imseq {

namespace {

// ---- bits ---------------------------------------------------------------------------------------

// Reads bits of an unstuffed interval, most significant first. While a block is decoded it may read
// kBlockBytes (a block's bits and a refill) behind the interval's end: these must be readable, and
// overrun() tells afterwards.
class BitReader {
 public:
  static constexpr size_t kBlockBytes = 64 * 31 / 8 + 16;
  static constexpr int kRefilledBits = 56;

  BitReader(const uint8_t* begin, const uint8_t* end) : next_(begin), end_(end) {}

  // Ensures kRefilledBits bits. Branchless: loads 8 bytes, advances by the whole bytes used.
  void refill() {
    uint64_t word;
    std::memcpy(&word, next_, 8);
    if constexpr (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) word = __builtin_bswap64(word);
    bits_ |= word >> count_;
    next_ += (63 - count_) >> 3;
    count_ |= kRefilledBits;
  }
  [[nodiscard]] uint64_t bits() const { return bits_; }
  [[nodiscard]] uint32_t peek(int n) const { return static_cast<uint32_t>(bits_ >> (64 - n)); }
  void consume(int n) {
    bits_ <<= n;
    count_ -= n;
  }
  [[nodiscard]] int count() const { return count_; }

  // Bits of the interval not yet consumed; negative behind its end.
  [[nodiscard]] ptrdiff_t bits_left() const { return (end_ - next_) * 8 + count_; }
  [[nodiscard]] bool overrun() const { return bits_left() < 0; }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  uint64_t bits_ = 0;  // left-aligned
  int count_ = 0;      // valid bits in bits_
};

// ---- blocks -------------------------------------------------------------------------------------

// Decodes one block. Writes only nonzero coefficients, so the block must be zero before. False: an
// anomaly. The caller must check for an overrun after each block.
bool decode_block(BitReader& reader, const HuffmanTables& tables, int component, int& prediction,
                  int16_t* block) {
  BitReader bits = reader;  // a local copy stays in registers
  // A symbol that is looked up takes at most kLookupBits bits; others are preceded by a refill of
  // their own. So three symbols can follow a refill, even if the first is of the longest.
  constexpr int kLookupBits = HuffmanTable::kLookupBits;
  static_assert(BitReader::kRefilledBits - HuffmanTable::kMaxSymbolBits >= 2 * kLookupBits);
  const auto next_symbol = [&bits](const HuffmanEntry* lookup, const HuffmanTable& table)
                               __attribute__((always_inline)) {
                                 const HuffmanEntry entry = lookup[bits.peek(kLookupBits)];
                                 if (entry.is_whole()) [[likely]] {
                                   bits.consume(entry.length());
                                   return entry.symbol();
                                 }
                                 bits.refill();
                                 const HuffmanSymbol symbol = table.decode_slowly(bits.bits());
                                 bits.consume(symbol.length);
                                 return symbol;
                               };
  const HuffmanTable& dc = tables.dc(component);
  const HuffmanTable& ac = tables.ac(component);
  const HuffmanEntry* const ac_lookup = tables.ac_lookup(component);
  bits.refill();
  const HuffmanSymbol difference = next_symbol(tables.dc_lookup(component), dc);
  prediction += difference.value;
  // No sound image has a larger sum; libjpeg-turbo would cut it to 16 bits.
  if (difference.advance != 1 || prediction != static_cast<int16_t>(prediction)) return false;
  block[0] = static_cast<int16_t>(prediction);
  int k = 0;
  HuffmanSymbol symbol{0, 0, 0};
  // Takes the next symbol; true when it was the block's last.
  const auto step = [&]() __attribute__((always_inline)) {
    symbol = next_symbol(ac_lookup, ac);
    k += symbol.advance;
    if (k > 63) return true;
    block[k] = static_cast<int16_t>(symbol.value);
    return k == 63;
  };
  do {
    bits.refill();
  } while (!step() && !step() && !step());
  reader = bits;
  return k <= 63 || symbol.advance == kEndOfBlock;
}

// ---- the image ----------------------------------------------------------------------------------

// Decodes one MCU of all components. False: an anomaly.
bool decode_mcu(const JpegHeader& header, const HuffmanTables& tables, int64_t mcu,
                BitReader& reader, std::array<int, 3>& predictions, JpegCoefficients* out) {
  const int mcu_y = static_cast<int>(mcu / header.mcus_wide);
  const int mcu_x = static_cast<int>(mcu % header.mcus_wide);
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[static_cast<size_t>(c)];
    for (int y = 0; y < component.mcu_height; ++y) {
      for (int x = 0; x < component.mcu_width; ++x) {
        int16_t* block =
            out->block(c, mcu_y * component.mcu_height + y, mcu_x * component.mcu_width + x);
        int& prediction = predictions[static_cast<size_t>(c)];
        if (!decode_block(reader, tables, c, prediction, block) || reader.overrun()) return false;
      }
    }
  }
  return true;
}

// Whether the bytes can hold the blocks, each of which takes at least a bit for DC and for AC.
bool can_hold_blocks(size_t entropy_bytes, const JpegHeader& header) {
  size_t num_blocks = 0;
  for (const JpegComponent& component : header.used_components()) {
    num_blocks += static_cast<size_t>(component.blocks_wide) * component.blocks_high;
  }
  return num_blocks <= entropy_bytes * 4;
}

}  // namespace

void JpegCoefficients::reset(const JpegHeader& header) {
  for (size_t c = 0; c < components.size(); ++c) {
    const JpegComponent& component = header.components[c];
    blocks_wide[c] = component.blocks_wide;
    components[c].assign(static_cast<size_t>(component.blocks_wide) * component.blocks_high * 64,
                         0);
  }
}

bool decode_coefficients(const JpegHeader& header, const uint8_t* bytes, size_t size,
                         JpegCoefficients* out) {
  const uint8_t* const data = bytes + header.entropy_offset;
  const size_t data_size = size - header.entropy_offset;
  if (!can_hold_blocks(data_size, header)) return false;
  out->reset(header);
  const int64_t num_intervals = header.num_intervals();
  // Every interval has a marker of two bytes.
  if (data_size > UINT32_MAX || static_cast<int64_t>(data_size / 2) < num_intervals) return false;
  std::vector<uint32_t> markers(num_intervals);
  if (!find_markers(header, data, data_size, num_intervals, markers.data())) return false;
  const auto tables = std::make_unique<HuffmanTables>();
  tables->build(header);
  std::vector<uint8_t> unstuffed(data_size + kRowSlack + BitReader::kBlockBytes);
  const MarkerKernels& kernels = marker_kernels(cpu_level());
  int64_t mcu = 0;
  size_t at = 0;
  for (const uint32_t marker : markers) {
    bool sound = true;
    const size_t length = kernels.unstuff(data + at, marker - at, unstuffed.data(), &sound);
    BitReader bits(unstuffed.data(), unstuffed.data() + length);
    std::array<int, 3> predictions{};
    const int64_t end_mcu = std::min(mcu + header.interval_mcus(), header.num_mcus());
    for (; sound && mcu < end_mcu; ++mcu) {
      sound = decode_mcu(header, *tables, mcu, bits, predictions, out);
    }
    if (!sound || bits.bits_left() >= 8) return false;
    at = marker + 2;
  }
  out->end_offset = header.entropy_offset + at;
  return true;
}

}  // namespace imseq
