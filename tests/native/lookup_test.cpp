// Look-ups of bits: whatever tables say of any bits, at any place of a block, is what codes say one
// symbol after the other.
#include "jpeg/lookup.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

using imseq::FlatEntry;
using imseq::FlatTables;
using imseq::HuffmanEntry;
using imseq::HuffmanSymbol;
using imseq::HuffmanTable;
using imseq::HuffmanTables;
using imseq::HuffmanWord;
using imseq::JpegHeader;
using imseq::JpegHuffmanSpec;
using imseq::kEndOfBlock;
using imseq::kInvalid;

int num_failures = 0;
std::mt19937 generator(1);

void expect(bool holds, const char* what, long long a = 0, long long b = 0, long long c = 0) {
  if (holds) return;
  if (++num_failures > 20) std::exit(EXIT_FAILURE);
  std::fprintf(stderr, "failed: %s (%lld, %lld, %lld)\n", what, a, b, c);
}

int draw(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<unsigned>(high - low + 1));
}

// ---- codes --------------------------------------------------------------------------------------

// Any code that a header may have: lengths by chance, and never complete.
JpegHuffmanSpec random_spec(std::vector<uint8_t> symbols) {
  std::shuffle(symbols.begin(), symbols.end(), generator);
  JpegHuffmanSpec spec;
  spec.defined = true;
  const int shortest = draw(1, 5);
  uint32_t free = (1u << 16) - 1;  // codes of 16 bits; that of ones alone must not be given out
  size_t num_codes = 0;
  for (int length = shortest; length <= 16; ++length) {
    const uint32_t taken = 1u << (16 - length);
    const int wanted = length == 16 ? 255 : draw(0, 1 << std::min(length - shortest + 1, 6));
    for (int i = 0; i < wanted && num_codes < symbols.size() && free >= taken; ++i) {
      ++spec.counts[static_cast<size_t>(length - 1)];
      spec.values[num_codes] = symbols[num_codes];
      ++num_codes;
      free -= taken;
    }
  }
  expect(imseq::is_prefix_code(spec), "a code");
  return spec;
}

// What encoders write, and now and then what they don't: symbols that stand for nothing.
JpegHuffmanSpec random_table(HuffmanTable::Kind kind) {
  std::vector<uint8_t> symbols;
  if (kind == HuffmanTable::Kind::kDc) {
    for (int size = 0; size < 16; ++size) symbols.push_back(static_cast<uint8_t>(size));
    return random_spec(symbols);
  }
  const int max_run = draw(0, 15), max_size = draw(1, 15);
  for (int run = 0; run <= max_run; ++run) {
    for (int size = 1; size <= max_size; ++size) {
      symbols.push_back(static_cast<uint8_t>(run << 4 | size));
    }
  }
  symbols.insert(symbols.end(), {0x00, 0xF0});
  if (draw(0, 2) == 0) symbols.push_back(0x70);
  return random_spec(symbols);
}

// Three components with tables 0, 1 and 1, or one with tables 0.
JpegHeader header_of(const JpegHuffmanSpec (&dc)[2], const JpegHuffmanSpec (&ac)[2],
                     int num_components = 3) {
  JpegHeader header;
  header.num_components = num_components;
  for (size_t t = 0; t < 2; ++t) {
    header.dc_tables[t] = dc[t];
    header.ac_tables[t] = ac[t];
  }
  for (size_t c = 1; c < 3; ++c) header.components[c].dc_table = header.components[c].ac_table = 1;
  return header;
}

JpegHeader random_header(int num_components = 3) {
  using Kind = HuffmanTable::Kind;
  return header_of({random_table(Kind::kDc), random_table(Kind::kDc)},
                   {random_table(Kind::kAc), random_table(Kind::kAc)}, num_components);
}

// ---- what entries mean --------------------------------------------------------------------------

// What a look-up does: bits taken, values written, and where in the block, or behind it, one is
// then.
struct Step {
  int length = 0;
  int position = 0;
  std::vector<std::pair<int, int>> values;  // position and value, other than 0
};

Step step_of(const HuffmanEntry& entry, int k) {
  const int behind = k + static_cast<int>(entry.advance());
  Step step{entry.length(), behind & ~static_cast<int>(entry.mask()), {}};
  if (entry.value() != 0) step.values.push_back({behind - 1, entry.value()});
  return step;
}

Step step_of(const FlatEntry& entry, int k) {
  Step step{entry.length, (k + entry.advance) & ~entry.mask, {}};
  for (int i = 0; i < 4; ++i) {
    const int value = entry.values[static_cast<size_t>(i)];
    if (value != 0) step.values.push_back({k + entry.first + i, value});
  }
  return step;
}

// The same, symbol by symbol, until `length` bits are taken; `valid` is false where they are not
// taken by whole symbols of one block.
struct SlowStep : Step {
  bool valid = true;
};

SlowStep slow_step(const HuffmanTables& tables, int component, int k, uint64_t bits, int length) {
  SlowStep step;
  step.position = k;
  while (step.length < length && step.valid) {
    const bool is_dc = step.position == 0;
    const HuffmanTable& table = is_dc ? tables.dc(component) : tables.ac(component);
    const HuffmanSymbol symbol = table.decode_slowly(bits << step.length);
    step.valid = step.position < 64 && symbol.advance != kInvalid;
    step.length += symbol.length;
    step.position = symbol.advance == kEndOfBlock ? 64 : step.position + symbol.advance;
    if (symbol.value != 0) step.values.push_back({step.position - 1, symbol.value});
  }
  step.valid = step.valid && step.length == length && step.position <= 64;
  return step;
}

// An entry that gives values, or that one of `code_length`, `run` and `size`, must be true.
void check_whole(const HuffmanTables& tables, int component, int k, uint64_t bits,
                 const Step& step) {
  const SlowStep expected = slow_step(tables, component, k, bits, step.length);
  expect(expected.valid, "an entry takes whole symbols of one block", component, k, step.length);
  expect(step.position == expected.position, "where an entry leads", component, k, step.position);
  expect(step.values == expected.values, "an entry's values", component, k, step.length);
}

void check_code(const HuffmanTables& tables, int component, int k, uint64_t bits, int length,
                int run, int size) {
  const HuffmanTable& table = k == 0 ? tables.dc(component) : tables.ac(component);
  const HuffmanWord word = table.find_word(bits);
  expect(word.length == length && word.advance == run + 1 && word.size == size, "a code alone",
         component, k, length);
  expect(size > 0, "a code alone has extra bits", component, k, length);
}

// ---- tests --------------------------------------------------------------------------------------

void test_image_tables(HuffmanTables* tables, const JpegHeader& header) {
  tables->build(header);
  for (int c = 0; c < header.num_components; ++c) {
    int num_whole = 0;
    for (int k = 0; k < 64; ++k) {
      const HuffmanEntry* const entries = tables->entries() + tables->place(c, k);
      for (size_t i = 0; i < HuffmanTable::kLookupSize; i += k % 8 == 0 ? 1 : 7) {
        const uint64_t rest = generator() | uint64_t{generator()} << 32;
        const uint64_t bits =
            uint64_t{i} << (64 - HuffmanTable::kLookupBits) | rest >> HuffmanTable::kLookupBits;
        const HuffmanEntry entry = entries[i];
        if (entry.is_whole()) {
          ++num_whole;
          check_whole(*tables, c, k, bits, step_of(entry, k));
        } else if (entry.advance() != 0) {
          check_code(*tables, c, k, bits, static_cast<int>(entry.advance()),
                     static_cast<int>(entry.mask()), entry.value());
        }
      }
    }
    expect(num_whole > 0, "entries that tell everything", c);
  }
}

void test_flat_tables(FlatTables* flat, const HuffmanTables& tables, const JpegHeader& header) {
  for (int i = 0; i < 20; ++i) (void)flat->serve(header, true);
  expect(flat->serve(header, true), "tables that come up often are served");
  for (int c = 0; c < header.num_components; ++c) {
    int num_whole = 0;
    for (int k = 0; k < 64; ++k) {
      const FlatEntry* const entries = flat->entries() + flat->place(c, k);
      for (size_t i = 0; i < FlatTables::kLookupSize; i += k % 8 == 0 ? 1 : 7) {
        const uint64_t rest = generator() | uint64_t{generator()} << 32;
        const uint64_t bits =
            uint64_t{i} << (64 - FlatTables::kLookupBits) | rest >> FlatTables::kLookupBits;
        const FlatEntry& entry = entries[i];
        if (entry.length != 0) {
          ++num_whole;
          check_whole(tables, c, k, bits, step_of(entry, k));
        } else if (entry.advance != 0) {
          check_code(tables, c, k, bits, entry.advance, entry.first, entry.mask);
        } else {
          expect(entry.first == 0 && entry.mask == 0, "an entry that tells nothing is zero", c, k);
        }
      }
    }
    expect(num_whole > 0, "entries that tell something", c);
  }
}

void test_random_codes() {
  const auto tables = std::make_unique<HuffmanTables>();  // kept, as a decoder keeps it
  FlatTables flat;
  for (int i = 0; i < 60; ++i) {
    const JpegHeader header = random_header(i % 4 == 3 ? 1 : 3);
    test_image_tables(tables.get(), header);
    test_flat_tables(&flat, *tables, header);
  }
}

// A table that stays, while another one of the image changes, and that comes back in another slot.
void test_tables_are_kept() {
  JpegHeader header = random_header();
  const auto tables = std::make_unique<HuffmanTables>();
  for (int i = 0; i < 10; ++i) {
    std::swap(header.dc_tables[0], header.dc_tables[1]);
    if (i % 2 == 0) std::swap(header.ac_tables[0], header.ac_tables[1]);
    if (i % 3 == 0) header.ac_tables[1] = random_table(HuffmanTable::Kind::kAc);
    test_image_tables(tables.get(), header);
  }
}

bool serves_after(FlatTables* flat, const JpegHeader& header, int num_images) {
  bool served = false;
  for (int i = 0; i < num_images; ++i) served = flat->serve(header, true);
  return served;
}

void test_which_images_are_served() {
  const JpegHeader pack = random_header(), other = random_header();
  JpegHeader grey = pack, grey_of_other = other;
  grey.num_components = grey_of_other.num_components = 1;
  constexpr int kMany = 20;

  FlatTables flat;
  expect(!flat.serve(pack, true), "the first image is not worth tables");
  expect(!FlatTables(flat).serve(pack, true), "nor is the second");
  for (int i = 0; i < kMany; ++i) {
    expect(!flat.serve(pack, false), "no tables where they may not be made");
  }
  expect(flat.serve(pack, true), "tables, now that they may be made");
  expect(flat.serve(grey, false), "grey images have the first pair of a pack's tables");
  expect(!flat.serve(other, false), "another pack's are others");
  for (int i = 0; i < kMany; ++i) {
    expect(flat.serve(pack, true) && !flat.serve(other, true), "packs in turns: the first stays");
  }
  expect(serves_after(&flat, other, kMany), "the other pack's, once it comes alone");
  expect(!flat.serve(pack, true), "and no longer the first one's");

  FlatTables grey_first;
  expect(serves_after(&grey_first, grey, kMany), "grey images alone");
  expect(!grey_first.serve(pack, true), "colour has more");
  expect(serves_after(&grey_first, pack, kMany), "and gets it");
  expect(grey_first.serve(grey, true), "with grey as before");
  expect(!grey_first.serve(grey_of_other, true), "but not another pack's");

  JpegHeader three = pack;
  three.dc_tables[2] = other.dc_tables[0];
  three.ac_tables[2] = other.ac_tables[0];
  three.components[2].dc_table = three.components[2].ac_table = 2;
  FlatTables none;
  expect(!serves_after(&none, three, kMany), "three pairs are too many");
}

}  // namespace

int main() {
  test_random_codes();
  test_tables_are_kept();
  test_which_images_are_served();
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
