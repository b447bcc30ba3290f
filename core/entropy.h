// Huffman decoding of baseline scans: look-up tables, a bit reader, blocks, and restart intervals.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "jpeg.h"

namespace imseq {

// ---- tables -------------------------------------------------------------------------------------

// One look-up of the next kLookupBits bits. Where the code and its extra bits fit, it gives
// everything.
struct HuffmanEntry {
  uint8_t length;   // bits of the code and its extra bits; 0: see HuffmanTable::decode_slowly
  uint8_t advance;  // from the last coefficient's zigzag index to this one's; or kEndOfBlock
  int16_t value;    // of the coefficient; length 0: code's length << 8 | symbol, 0 unknown
};

class HuffmanTable {
 public:
  static constexpr int kLookupBits = 11;  // 8 KB a table: two of them, busy, fit the L1 cache
  static constexpr int kMaxSymbolBits = 16 + 15;  // a code and its extra bits
  static constexpr uint8_t kEndOfBlock = 64;      // an advance beyond every block
  static constexpr uint8_t kInvalid = 128;        // an advance too, of what is no symbol

  enum class Kind { kDc, kAc };

  // The spec must have passed parse_jpeg. Does nothing when the table was built from the same spec.
  void build(const JpegHuffmanSpec& spec, Kind kind);

  [[nodiscard]] const HuffmanEntry* lookup() const { return lookup_.data(); }

  // The entry for `bits` (the next 64, or at least 31, left-aligned) where lookup() has none: extra
  // bits that do not fit, long codes, and bits that are no code or stand for nothing (advance =
  // kInvalid).
  [[nodiscard]] HuffmanEntry decode_slowly(uint64_t bits) const;

 private:
  void fill_lookup(uint32_t code, int length, uint8_t symbol);

  JpegHuffmanSpec spec_;
  Kind kind_ = Kind::kDc;
  std::array<HuffmanEntry, size_t{1} << kLookupBits> lookup_;
  std::array<uint32_t, 17> limit_;  // codes of n bits are below limit_[n], left-aligned in 16 bits
  std::array<int32_t, 17>
      first_value_;  // index in spec_.values of code 0 of n bits, were there one
};

// ---- bits ---------------------------------------------------------------------------------------

// Bits of an interval whose byte stuffing has been removed, most significant first. It may run
// ahead of the interval's end while a block is decoded, by a block's bits and a refill
// (kBlockBytes) at most: memory must be readable as far as that, and overrun() tells afterwards.
class BitReader {
 public:
  static constexpr size_t kBlockBytes = 64 * 31 / 8 + 16;
  static constexpr int kRefilledBits = 56;

  BitReader(const uint8_t* begin, const uint8_t* end) : next_(begin), end_(end) {}

  // At least kRefilledBits are there afterwards. Branchless: reads 8 bytes, advances by whole bytes
  // used.
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

  // Bits of the interval that have not been consumed; negative behind its end.
  [[nodiscard]] ptrdiff_t bits_left() const { return (end_ - next_) * 8 + count_; }
  [[nodiscard]] bool overrun() const { return bits_left() < 0; }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  uint64_t bits_ = 0;  // left-aligned
  int count_ = 0;      // valid bits in bits_
};

// ---- blocks -------------------------------------------------------------------------------------

// Decodes one block. With kStore, writes its coefficients other than zero to block[order[k]], k
// being the zigzag index; the block must have been zeroed, but for block[0]. Without, only follows
// the DC prediction. Returns the zigzag index of the last coefficient decoded, or -1 on an anomaly.
// Does not check for an overrun: the caller does, block by block.
template <bool kStore>
inline int decode_block(BitReader& reader, const HuffmanTable& dc, const HuffmanTable& ac,
                        int& prediction, const uint8_t* order, int16_t* block) {
  BitReader bits = reader;  // a local copy stays in registers
  // Needs no more than kLookupBits bits, and refills itself before it takes more: three symbols can
  // follow a refill, even if the first of them is of the longest.
  static_assert(BitReader::kRefilledBits - HuffmanTable::kMaxSymbolBits >=
                2 * HuffmanTable::kLookupBits);
  const auto next_entry = [&bits](const HuffmanTable& table) __attribute__((always_inline)) {
    HuffmanEntry entry = table.lookup()[bits.peek(HuffmanTable::kLookupBits)];
    if (entry.length == 0) [[unlikely]] {
      bits.refill();
      entry = table.decode_slowly(bits.bits());
    }
    bits.consume(entry.length);
    return entry;
  };
  bits.refill();
  const HuffmanEntry difference = next_entry(dc);
  prediction += difference.value;
  // libjpeg-turbo stores the low 16 bits; a difference of 2^15 steps is no image's.
  if (difference.advance != 1 || prediction != static_cast<int16_t>(prediction)) return -1;
  if constexpr (kStore) block[0] = static_cast<int16_t>(prediction);
  int k = 0;
  HuffmanEntry entry{0, 0, 0};
  // Takes the next symbol; true when it was the block's last.
  const auto step = [&]() __attribute__((always_inline)) {
    entry = next_entry(ac);
    k += entry.advance;
    if (k > 63) return true;
    if constexpr (kStore) block[order[k]] = entry.value;
    return k == 63;
  };
  do {
    bits.refill();
  } while (!step() && !step() && !step());
  reader = bits;
  if (k <= 63) return k;
  return entry.advance == HuffmanTable::kEndOfBlock ? k - HuffmanTable::kEndOfBlock : -1;
}

// The tables of one image, kept from image to image as long as they are the same.
class HuffmanTables {
 public:
  void build(const JpegHeader& header);
  [[nodiscard]] const HuffmanTable& dc(int component) const {
    return dc_[dc_index_[static_cast<size_t>(component)]];
  }
  [[nodiscard]] const HuffmanTable& ac(int component) const {
    return ac_[ac_index_[static_cast<size_t>(component)]];
  }

 private:
  std::array<HuffmanTable, 4> dc_, ac_;
  std::array<size_t, 3> dc_index_{}, ac_index_{};  // component -> table
};

// ---- restart intervals --------------------------------------------------------------------------

struct Interval {
  const uint8_t* begin;  // without byte stuffing; BitReader::kBlockBytes readable behind the end
  const uint8_t* end;
  int64_t first_mcu, end_mcu;
};

// Splits a scan into its restart intervals, without byte stuffing; without restart markers it is
// one.
class IntervalReader {
 public:
  // The intervals that hold an MCU for which `wanted` may be true come back in intervals(), the
  // others are only counted. False where the markers are not exactly RST0, RST1, ... and EOI, as
  // many as there must be. wanted(first_mcu, end_mcu): whether any MCU of the range is needed.
  template <typename Wanted>
  [[nodiscard]] bool read(const JpegHeader& header, const uint8_t* bytes, size_t size,
                          const Wanted& wanted);
  [[nodiscard]] const std::vector<Interval>& intervals() const { return intervals_; }
  // Behind the EOI marker, in the bytes given to read().
  [[nodiscard]] size_t end_offset() const { return end_offset_; }

 private:
  // Copies (where out is not null) up to the next marker, which *at is left behind. Returns it, 0
  // if none.
  static int copy_to_marker(const uint8_t* bytes, size_t size, size_t* at, uint8_t** out);
  void reserve(size_t size);

  std::vector<uint8_t> arena_;
  std::vector<Interval> intervals_;
  size_t end_offset_ = 0;
};

template <typename Wanted>
bool IntervalReader::read(const JpegHeader& header, const uint8_t* bytes, size_t size,
                          const Wanted& wanted) {
  constexpr int kRst0 = 0xD0, kEoi = 0xD9;
  intervals_.clear();
  reserve(size - header.entropy_offset);
  const int64_t num_mcus = header.num_mcus();
  const int64_t step = header.restart_interval == 0 ? num_mcus : header.restart_interval;
  uint8_t* out = arena_.data();
  size_t at = header.entropy_offset;
  int number = 0;
  for (int64_t mcu = 0; mcu < num_mcus; mcu += step) {
    const int64_t end_mcu = num_mcus - mcu < step ? num_mcus : mcu + step;
    const bool keep = wanted(mcu, end_mcu);
    uint8_t* const begin = out;
    const int marker = copy_to_marker(bytes, size, &at, keep ? &out : nullptr);
    if (marker != (end_mcu == num_mcus ? kEoi : kRst0 + number)) return false;
    number = (number + 1) & 7;
    if (keep) intervals_.push_back({begin, out, mcu, end_mcu});
  }
  std::memset(out, 0, BitReader::kBlockBytes);
  end_offset_ = at;
  return true;
}

}  // namespace imseq
