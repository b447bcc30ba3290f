#include "jpeg/lookup.h"

#include <algorithm>

namespace imseq {

namespace {

// How far a symbol moves the zigzag index, and its number of extra bits (T.81 F.1.2.1, F.1.2.2).
struct Meaning {
  int advance;
  int size;
};

Meaning meaning_of(uint8_t symbol, HuffmanTable::Kind kind) {
  if (kind == HuffmanTable::Kind::kDc) return {1, symbol};
  const int run = symbol >> 4, size = symbol & 15;
  // A run of 15 of size 0 stands for 16 zeros: 15, and a value of 0 behind them.
  if (size != 0 || run == 15) return {run + 1, size};
  // libjpeg-turbo takes the undefined symbols 0x10 ... 0xE0 for an end of block; no encoder writes
  // them.
  return {run == 0 ? kEndOfBlock : kInvalid, 0};
}

// The part of an AC table for zigzag index k: 0, or 1 + the number of its tail.
size_t part_of(int k) {
  const auto after = std::upper_bound(kTails.begin(), kTails.end(), k);
  return static_cast<size_t>(after - kTails.begin());
}

HuffmanEntry entry_of(const HuffmanSymbol& symbol) {
  if (symbol.advance == kEndOfBlock) return {symbol.length, 63, 63, 0};
  return {symbol.length, symbol.advance, 0, symbol.value};
}

// Fills the entries that begin with a code of `length` bits, in the table and in its tails.
void fill_entries(int length, const Meaning& meaning, size_t num_tables, HuffmanEntry* entries) {
  constexpr int kBits = HuffmanTable::kLookupBits;
  const auto [advance, size] = meaning;
  const size_t num_entries = size_t{1} << (kBits - length);
  const int spare = kBits - length - size;
  // Without extra bits there is nothing that step_by_code (lanes_loop.h) could decode.
  const HuffmanEntry code_alone = advance == kInvalid || size == 0
                                      ? HuffmanEntry()
                                      : HuffmanEntry::of_code(length, advance - 1, size);
  if (spare < 0 || advance == kInvalid) {
    std::fill_n(entries, num_entries, code_alone);
  } else {
    HuffmanEntry* next = entries;
    for (uint32_t extra = 0; extra < 1u << size; ++extra) {
      const HuffmanSymbol symbol{length + size, advance, extend(extra, size)};
      next = std::fill_n(next, size_t{1} << spare, entry_of(symbol));
    }
  }
  for (size_t t = 0; t + 1 < num_tables; ++t) {
    HuffmanEntry* const tail = entries + (1 + t) * HuffmanTable::kLookupSize;
    if (advance <= kTailAdvances[t] || advance == kEndOfBlock) {
      std::copy_n(entries, num_entries, tail);
    } else {
      std::fill_n(tail, num_entries, code_alone);
    }
  }
}

}  // namespace

// ---- tables of one image ------------------------------------------------------------------------

void HuffmanTable::build(const JpegHuffmanSpec& spec, Kind kind, HuffmanEntry* lookup) {
  if (spec_.defined && kind == kind_ && spec == spec_) return;
  spec_ = spec;
  kind_ = kind;
  const size_t num_tables = kind == Kind::kDc ? 1 : 1 + kNumTails;
  size_t at = 0;  // in lookup, where codes ascend
  uint32_t code = 0;
  size_t next = 0;
  for (int length = 1; length <= 16; ++length) {
    const auto n = static_cast<size_t>(length);
    first_value_[n] = static_cast<int32_t>(next) - static_cast<int32_t>(code);
    for (int i = 0; i < spec.counts[n - 1]; ++i, ++code, ++next) {
      if (length > kLookupBits) continue;
      fill_entries(length, meaning_of(spec.values[next], kind), num_tables, lookup + at);
      at += size_t{1} << (kLookupBits - length);
    }
    limit_[n] = code << (16 - length);
    code <<= 1;
  }
  for (size_t t = 0; t < num_tables; ++t) {
    std::fill(lookup + t * kLookupSize + at, lookup + (t + 1) * kLookupSize, HuffmanEntry());
  }
}

HuffmanWord HuffmanTable::find_word(uint64_t bits) const {
  const auto code = static_cast<uint32_t>(bits >> 48);
  int length = 1;
  while (length <= 16 && code >= limit_[static_cast<size_t>(length)]) ++length;
  if (length > 16) return {0, kInvalid, 0};
  const int32_t index =
      first_value_[static_cast<size_t>(length)] + static_cast<int32_t>(code >> (16 - length));
  const auto [advance, size] = meaning_of(spec_.values[static_cast<size_t>(index)], kind_);
  return {advance == kInvalid ? 0 : length, advance, size};
}

HuffmanSymbol HuffmanTable::decode_slowly(uint64_t bits) const {
  const HuffmanWord word = find_word(bits);
  if (word.length == 0) return {1, kInvalid, 0};
  const auto extra =
      word.size == 0 ? 0 : static_cast<uint32_t>(bits << word.length >> (64 - word.size));
  return {word.length + word.size, word.advance, extend(extra, word.size)};
}

HuffmanTables::HuffmanTables() : entries_(size_t{wait_place()} + HuffmanTable::kLookupSize) {
  std::fill(entries_.begin() + wait_place(), entries_.end(), kWaitEntry);
}

void HuffmanTables::build(const JpegHeader& header) {
  for (int c = 0; c < header.num_components; ++c) {
    const size_t dc = dc_index_[c] = header.components[c].dc_table;
    const size_t ac = ac_index_[c] = header.components[c].ac_table;
    dc_[dc].build(header.dc_tables[dc], HuffmanTable::Kind::kDc, entries_.data() + place(c, 0));
    ac_[ac].build(header.ac_tables[ac], HuffmanTable::Kind::kAc, entries_.data() + place(c, 1));
  }
}

HuffmanSymbol HuffmanTables::decode(int component, bool ac, uint64_t bits) const {
  const HuffmanEntry* const lookup = ac ? ac_lookup(component) : dc_lookup(component);
  const HuffmanEntry entry = lookup[bits >> (64 - HuffmanTable::kLookupBits)];
  if (entry.is_whole()) return entry.symbol();
  return (ac ? this->ac(component) : dc(component)).decode_slowly(bits);
}

uint16_t HuffmanTables::place(int component, int k) const {
  if (k == 0) return place(dc_index_[component]);
  return place(4 + ac_index_[component] * kAcParts + part_of(k));
}

// ---- tables that many images share --------------------------------------------------------------

namespace {

// Flat tables are built after this many images in a row with the same tables.
constexpr int kWorthwhile = 8;

// No entry may leave a block, by its values or by an end of block behind the last value.
constexpr int kMaxAdvance = 16;
static_assert([] {
  int max_advance = kMaxAdvance;
  for (size_t t = 0; t < kNumTails; max_advance = kTailAdvances[t++]) {
    if (kTails[t] - 1 + max_advance > 63) return false;
  }
  return max_advance == 1;
}());
// No symbol is added to an entry beyond this advance: rarely one would fit.
constexpr int kFullAdvance = 8;

bool fits_byte(int value) { return value == static_cast<int8_t>(value); }

// Builds one entry symbol by symbol.
class EntryBuilder {
 public:
  explicit EntryBuilder(uint32_t bits) : bits_(bits) {}

  // Adds the next symbol. False: the entry is complete.
  bool add(const HuffmanTable& table, int max_advance) {
    const int left = FlatTables::kLookupBits - used_;
    if (left == 0) return false;
    const HuffmanSymbol symbol = table.decode_slowly(uint64_t{bits_} << (64 - left));
    if (symbol.advance == kInvalid || symbol.length > left) return false;  // too few bits to tell
    if (symbol.advance == kEndOfBlock) {
      used_ += symbol.length;
      entry_.mask = 63;
      return false;
    }
    const int at = advance_ + symbol.advance - 1;
    if (at + 1 > max_advance || !fits_byte(symbol.value)) return false;
    if (num_symbols_ == 0) entry_.first = static_cast<uint8_t>(at);
    if (at - entry_.first > 3) return false;
    entry_.values[static_cast<size_t>(at - entry_.first)] = static_cast<int8_t>(symbol.value);
    used_ += symbol.length;
    advance_ = at + 1;
    ++num_symbols_;
    return advance_ <= kFullAdvance;
  }

  [[nodiscard]] FlatEntry entry() const {
    FlatEntry entry = entry_;
    entry.length = static_cast<uint8_t>(used_);
    entry.advance = static_cast<uint8_t>(advance_ + entry.mask);
    return entry;
  }

 private:
  uint32_t bits_;
  int used_ = 0, advance_ = 0, num_symbols_ = 0;
  FlatEntry entry_{};
};

// For bits that are too few for a value: the code alone, if they hold it.
FlatEntry code_entry(const HuffmanTable& table, uint32_t bits) {
  const HuffmanWord word = table.find_word(uint64_t{bits} << (64 - FlatTables::kLookupBits));
  if (word.size == 0 || word.length > FlatTables::kLookupBits) return {};
  const auto byte = [](int value) { return static_cast<uint8_t>(value); };
  return {0, byte(word.length), byte(word.advance - 1), byte(word.size), {}};
}

FlatEntry dc_entry(const HuffmanTable& dc, const HuffmanTable& ac, uint32_t bits) {
  EntryBuilder builder(bits);
  if (!builder.add(dc, 1)) return code_entry(dc, bits);
  while (builder.add(ac, kMaxAdvance)) {
  }
  return builder.entry();
}

FlatEntry ac_entry(const HuffmanTable& ac, uint32_t bits, int max_advance) {
  EntryBuilder builder(bits);
  // An end of block may not follow a value at the block's end.
  while (builder.add(ac, max_advance) && max_advance > 1) {
  }
  const FlatEntry entry = builder.entry();
  return entry.length == 0 ? code_entry(ac, bits) : entry;
}

}  // namespace

bool FlatTables::serve(const JpegHeader& header, bool may_build) {
  std::array<Pair, kMaxPairs> pairs;
  int num_pairs = 0;
  for (size_t c = 0; c < static_cast<size_t>(header.num_components); ++c) {
    const JpegComponent& component = header.components[c];
    const Pair pair{header.dc_tables[component.dc_table], header.ac_tables[component.ac_table]};
    const auto found = std::find(pairs.begin(), pairs.begin() + num_pairs, pair);
    const auto number = static_cast<size_t>(found - pairs.begin());
    if (number == kMaxPairs) return false;
    if (number == static_cast<size_t>(num_pairs)) pairs[static_cast<size_t>(num_pairs++)] = pair;
    pair_of_component_[c] = static_cast<uint8_t>(number);
  }
  // A grey image has only the first of a pack's two pairs.
  const auto begins_with = [&](const PairSet& set) {
    return num_pairs <= set.num_pairs &&
           std::equal(pairs.begin(), pairs.begin() + num_pairs, set.pairs.begin());
  };
  if (begins_with(built_)) {
    num_seen_ = 0;
    return true;
  }
  if (!begins_with(candidate_)) {
    const bool extends = std::equal(candidate_.pairs.begin(),
                                    candidate_.pairs.begin() + candidate_.num_pairs, pairs.begin());
    if (!extends) num_seen_ = 0;
    candidate_ = {pairs, num_pairs};
  }
  if (++num_seen_ < kWorthwhile || !may_build) return false;
  num_seen_ = 0;
  build();
  return true;
}

uint16_t FlatTables::place(int component, int k) const {
  const size_t part = k == 0 ? 0 : 1 + part_of(k);
  const size_t pair = pair_of_component_[component];
  return static_cast<uint16_t>((pair * kNumParts + part) * kLookupSize);
}

void FlatTables::build() {
  // Allocate first, so that entries_ always matches built_.
  std::vector<HuffmanEntry> unused((1 + kNumTails) * HuffmanTable::kLookupSize);
  entries_.resize(size_t{wait_place()} + kLookupSize);
  built_ = candidate_;
  std::fill(entries_.begin() + wait_place(), entries_.end(), FlatEntry{64, 1, 0, 0, {}});
  for (size_t p = 0; p < static_cast<size_t>(built_.num_pairs); ++p) {
    HuffmanTable dc, ac;
    dc.build(built_.pairs[p].dc, HuffmanTable::Kind::kDc, unused.data());
    ac.build(built_.pairs[p].ac, HuffmanTable::Kind::kAc, unused.data());
    FlatEntry* const entries = entries_.data() + p * kNumParts * kLookupSize;
    for (uint32_t bits = 0; bits < kLookupSize; ++bits) {
      entries[bits] = dc_entry(dc, ac, bits);
      entries[kLookupSize + bits] = ac_entry(ac, bits, kMaxAdvance);
      for (size_t t = 0; t < kNumTails; ++t) {
        entries[(2 + t) * kLookupSize + bits] = ac_entry(ac, bits, kTailAdvances[t]);
      }
    }
  }
}

}  // namespace imseq
