// Huffman tables for decoding: of one image, and of many images that share them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "jpeg/header.h"

namespace imseq {

// A decoded symbol and its extra bits.
struct HuffmanSymbol {
  int length;   // bits of the code and its extra bits
  int advance;  // how far the zigzag index moves; or one of the two below
  int value;    // of the last coefficient advanced over; the others are zero
};

constexpr int kEndOfBlock = 64;  // as an advance: the rest of the block is zero
constexpr int kInvalid = 128;    // as an advance: the bits are no symbol

// What the next kLookupBits bits decode to. If they hold the code and its extra bits, the entry is
// whole. Its packing lets the decoding loop do without a branch at the end of a block: the position
// in consecutive blocks becomes (position + advance) & ~mask.
class HuffmanEntry {
 public:
  constexpr HuffmanEntry() = default;  // unknown: HuffmanTable::decode_slowly must decode it
  constexpr HuffmanEntry(int length, int advance, int mask, int value)
      : bits_(static_cast<uint32_t>(length) | static_cast<uint32_t>(advance) << 8 |
              static_cast<uint32_t>(mask) << 14 | static_cast<uint32_t>(value) << 20) {}

  // A code whose extra bits do not fit: its length, the run of zeros before the coefficient, and
  // the number of extra bits.
  [[nodiscard]] static constexpr HuffmanEntry of_code(int length, int run, int size) {
    return {0, length, run, size};
  }

  [[nodiscard]] constexpr bool is_whole() const { return (bits_ & 255) != 0; }
  [[nodiscard]] constexpr int length() const { return static_cast<int>(bits_ & 63); }
  [[nodiscard]] constexpr uint32_t advance() const { return bits_ >> 8 & 63; }
  [[nodiscard]] constexpr uint32_t mask() const { return bits_ >> 14 & 63; }
  [[nodiscard]] constexpr int value() const { return static_cast<int32_t>(bits_) >> 20; }
  // The symbol of a whole entry.
  [[nodiscard]] constexpr HuffmanSymbol symbol() const {
    return {length(), mask() != 0 ? kEndOfBlock : static_cast<int>(advance()), value()};
  }

 private:
  uint32_t bits_ = 0;
};

// The entry of an idle lane. Length 64 is masked to 0 bits, yet is not 0, which would mean an entry
// that is not whole.
constexpr HuffmanEntry kWaitEntry{64, 1, 0, 0};

// From zigzag index kTails[0] on, a run could leave the block. There other tables are used, whose
// whole entries advance by kTailAdvances at most.
constexpr int kNumTails = 4;
constexpr std::array<int, kNumTails> kTails = {48, 56, 60, 62};
constexpr std::array<int, kNumTails> kTailAdvances = {8, 4, 2, 1};

// A code and its meaning.
struct HuffmanWord {
  int length;   // 0: the bits begin with no code, or with one without meaning
  int advance;  // as in HuffmanSymbol
  int size;     // extra bits that follow the code
};

class HuffmanTable {
 public:
  static constexpr int kLookupBits = 11;  // 8 KB per table: two fit the L1 cache
  static constexpr size_t kLookupSize = size_t{1} << kLookupBits;
  static constexpr int kMaxSymbolBits = 16 + 15;  // a code and its extra bits

  enum class Kind { kDc, kAc };

  // The spec must have passed parse_jpeg. Does nothing if the table was built from the same spec.
  // Fills kLookupSize entries, and for an AC table as many again for each of kTails.
  void build(const JpegHuffmanSpec& spec, Kind kind, HuffmanEntry* lookup);

  // Decodes the symbol at the start of `bits` (at least 31, left-aligned); kInvalid: it is none.
  [[nodiscard]] HuffmanSymbol decode_slowly(uint64_t bits) const;

  // Decodes the code at the start of `bits` (at least 16, left-aligned).
  [[nodiscard]] HuffmanWord find_word(uint64_t bits) const;

 private:
  JpegHuffmanSpec spec_;
  Kind kind_ = Kind::kDc;
  std::array<uint32_t, 17> limit_{};  // codes of n bits are below limit_[n], left-aligned in 16
  // first_value_[n] + c: index in spec_.values of the code c of n bits.
  std::array<int32_t, 17> first_value_{};
};

// The tables of one image. Tables equal to the previous image's are not built again.
class HuffmanTables {
 public:
  HuffmanTables();
  void build(const JpegHeader& header);

  // As HuffmanTable::decode_slowly, by the entries where they suffice.
  [[nodiscard]] HuffmanSymbol decode(int component, bool ac, uint64_t bits) const;

  [[nodiscard]] const HuffmanTable& dc(int component) const { return dc_[dc_index_[component]]; }
  [[nodiscard]] const HuffmanTable& ac(int component) const { return ac_[ac_index_[component]]; }
  [[nodiscard]] const HuffmanEntry* dc_lookup(int component) const {
    return entries() + place(component, 0);
  }
  [[nodiscard]] const HuffmanEntry* ac_lookup(int component) const {
    return entries() + place(component, 1);
  }

  // All entries, and the index of the first one for zigzag index k.
  [[nodiscard]] const HuffmanEntry* entries() const { return entries_.data(); }
  [[nodiscard]] uint16_t place(int component, int k) const;
  [[nodiscard]] static uint16_t wait_place() { return place(4 + 4 * kAcParts); }

 private:
  static constexpr size_t kAcParts = 1 + kNumTails;
  [[nodiscard]] static constexpr uint16_t place(size_t part) {
    return static_cast<uint16_t>(part * HuffmanTable::kLookupSize);
  }

  std::array<HuffmanTable, 4> dc_, ac_;
  std::array<size_t, 3> dc_index_{}, ac_index_{};  // component -> table
  std::vector<HuffmanEntry> entries_;
};

// ---- tables that many images share --------------------------------------------------------------

// What the next 12 bits decode to: up to four small coefficients, and the end of the block. These
// tables are large and take about a millisecond to build, so they are for images that share Huffman
// tables: packs.
struct FlatEntry {
  uint8_t length;   // bits used; 0: advance, first and mask are as in HuffmanEntry::of_code
  uint8_t advance;  // as in HuffmanEntry
  uint8_t first;    // offset of the values from the current position
  uint8_t mask;     // as in HuffmanEntry
  std::array<int8_t, 4> values;
};
static_assert(sizeof(FlatEntry) == 8);

class FlatTables {
 public:
  static constexpr int kLookupBits = 12;
  static constexpr size_t kLookupSize = size_t{1} << kLookupBits;
  static constexpr int kMaxPairs = 2;

  // True: entries() decode this image. They are built when enough images in a row had the same
  // tables; since that replaces the entries of all images, only if may_build is true.
  [[nodiscard]] bool serve(const JpegHeader& header, bool may_build);

  [[nodiscard]] const FlatEntry* entries() const { return entries_.data(); }
  // Index of the first entry for zigzag index k of a component.
  [[nodiscard]] uint16_t place(int component, int k) const;
  [[nodiscard]] static uint16_t wait_place() {
    return static_cast<uint16_t>(kMaxPairs * kNumParts * kLookupSize);
  }

 private:
  // The DC table's entries, the AC table's, and those of its tails.
  static constexpr size_t kNumParts = 2 + kNumTails;
  struct Pair {
    JpegHuffmanSpec dc, ac;
    bool operator==(const Pair&) const = default;
  };

  struct PairSet {
    std::array<Pair, kMaxPairs> pairs;
    int num_pairs = 0;
  };

  void build();  // from the candidate

  PairSet built_, candidate_;
  int num_seen_ = 0;  // images in a row that fit candidate_ but not built_
  std::array<uint8_t, 3> pair_of_component_{};
  std::vector<FlatEntry> entries_;
};

}  // namespace imseq
