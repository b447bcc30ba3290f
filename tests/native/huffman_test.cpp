// Huffman codes: optimal within their limits, complete, and never believed blindly.
#include "pack/huffman.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "check.h"

namespace {

using imseq::HuffmanCode;
using imseq::HuffmanKind;
using Counts = std::array<uint64_t, 256>;
using Bytes = std::vector<uint8_t>;

struct Random {
  uint64_t state;
  uint32_t operator()(uint32_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state >> 33) % bound);
  }
};

uint64_t num_bits(const HuffmanCode& code, const Counts& counts) {
  uint64_t result = 0;
  for (size_t symbol = 0; symbol < 256; ++symbol) result += code.length[symbol] * counts[symbol];
  return result;
}

// Every symbol in use has a code, and no code begins with another or consists of ones alone.
bool is_sound(const HuffmanCode& code, const Counts& counts) {
  uint32_t next = 0;  // the least code that is allowed, as 16 bits
  int32_t i = 0;
  for (int length = 1; length <= 16; ++length) {
    for (int k = 0; k < code.num_codes[static_cast<size_t>(length)]; ++k, ++i) {
      const uint8_t symbol = code.symbols[static_cast<size_t>(i)];
      const uint32_t bits = static_cast<uint32_t>(code.code[symbol]) << (16 - length);
      if (code.length[symbol] != length || bits != next) return false;
      next += 1u << (16 - length);
    }
  }
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    if ((code.length[symbol] > 0) != (counts[symbol] > 0)) return false;
  }
  return i == code.num_symbols && next < 1u << 16;
}

bool keeps_to(const HuffmanCode& code, const imseq::LengthLimits& limits) {
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    if (code.length[symbol] > limits[symbol]) return false;
  }
  return true;
}

// The fewest bits of all codes within the limits, found by trying every combination of lengths.
// left: what of the code space is free, in units of 2 ^ -longest; one unit stays free.
uint64_t fewest_bits(const std::vector<uint64_t>& counts, const std::vector<uint8_t>& limits,
                     size_t first, uint32_t left, int longest) {
  if (first == counts.size()) return 0;
  uint64_t best = UINT64_MAX;
  for (int length = 1; length <= limits[first]; ++length) {
    const uint32_t space = 1u << (longest - length);
    if (space >= left) continue;
    const uint64_t rest = fewest_bits(counts, limits, first + 1, left - space, longest);
    if (rest == UINT64_MAX) continue;
    best = std::min(best, rest + counts[first] * static_cast<uint64_t>(length));
  }
  return best;
}

void test_no_code_within_the_limits_has_fewer_bits() {
  Random random{3};
  int num_tried = 0;
  for (int round = 0; round < 4000; ++round) {
    const uint32_t longest = 3 + random(4);
    std::vector<uint64_t> counts(1 + random(6));
    std::vector<uint8_t> length_limits(counts.size());
    Counts all_counts{};
    imseq::LengthLimits all_limits;
    all_limits.fill(static_cast<uint8_t>(longest));
    const uint32_t magnitude = 1 + random(12);
    for (size_t i = 0; i < counts.size(); ++i) {
      counts[i] = 1 + random(1u << magnitude);
      length_limits[i] = static_cast<uint8_t>(random(3) ? longest : 1 + random(longest));
      all_counts[40 * i + 3] = counts[i];
      all_limits[40 * i + 3] = length_limits[i];
    }
    // The free code is as long as the longest limit of a symbol.
    const int deepest = *std::max_element(length_limits.begin(), length_limits.end());
    const uint64_t expected = fewest_bits(counts, length_limits, 0, 1u << deepest, deepest);
    if (expected == UINT64_MAX) continue;  // the limits leave no code
    ++num_tried;
    const HuffmanCode code = imseq::fit_huffman_code(all_counts.data(), all_limits);
    CHECK(num_bits(code, all_counts) == expected);
    CHECK(is_sound(code, all_counts) && keeps_to(code, all_limits));
  }
  CHECK(num_tried > 2000);
}

// Huffman's own algorithm, in its plainest form.
uint64_t bits_of_huffmans_algorithm(std::vector<uint64_t> weights) {
  uint64_t result = 0;
  while (weights.size() > 1) {
    std::sort(weights.begin(), weights.end(), std::greater<>());
    const uint64_t sum = weights.back() + weights[weights.size() - 2];
    weights.resize(weights.size() - 2);
    weights.push_back(sum);
    result += sum;
  }
  return result;
}

void test_where_the_limits_do_not_matter_it_is_huffmans_code() {
  Random random{4};
  for (int round = 0; round < 300; ++round) {
    Counts counts{};
    std::vector<uint64_t> weights{0};  // the free code
    for (uint64_t& count : counts) {
      if (random(3) == 0) continue;
      count = 1 + random(60);  // too even for more than 16 bits
      weights.push_back(count);
    }
    const HuffmanCode code = imseq::fit_huffman_code(counts.data());
    CHECK(num_bits(code, counts) == bits_of_huffmans_algorithm(weights));
    CHECK(is_sound(code, counts));
  }
}

void test_deep_trees_are_cut_at_16_bits() {
  Counts counts{};
  uint64_t last = 1, next = 1;
  for (size_t symbol = 0; symbol < 45; ++symbol) {  // Fibonacci: the deepest trees there are
    counts[200 - symbol] = last;
    const uint64_t sum = last + next;
    last = next;
    next = sum;
  }
  const HuffmanCode code = imseq::fit_huffman_code(counts.data());
  CHECK(code.num_symbols == 45);
  CHECK(is_sound(code, counts));
  for (size_t symbol = 156; symbol < 200; ++symbol) {
    CHECK(code.length[symbol] <= 16);
    CHECK(code.length[symbol] <= code.length[symbol + 1]);
  }
}

void test_of_equal_symbols_the_smaller_comes_first() {
  Counts counts{};
  for (size_t symbol = 10; symbol < 25; ++symbol) counts[symbol] = 7;
  const HuffmanCode code = imseq::fit_huffman_code(counts.data());
  for (size_t i = 0; i < 15; ++i) CHECK(code.symbols[i] == 10 + i);
  CHECK(code.num_codes[4] == 15);
}

void test_no_symbols_and_one() {
  Counts counts{};
  CHECK(imseq::fit_huffman_code(counts.data()).num_symbols == 0);
  counts[77] = 5;
  const HuffmanCode code = imseq::fit_huffman_code(counts.data());
  CHECK(code.num_symbols == 1 && code.length[77] == 1 && code.code[77] == 0);
}

// ---- codes of a pack ----------------------------------------------------------------------------

bool has_all_baseline_symbols(const HuffmanCode& code, HuffmanKind kind) {
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    const size_t run = symbol >> 4, size = symbol & 15;
    const bool is_ac = (size > 0 && size <= 10) || symbol == 0x00 || symbol == 0xF0;
    const bool needed = kind == HuffmanKind::kDc ? run == 0 && size <= 11 : is_ac;
    if ((code.length[symbol] > 0) != needed) return false;
  }
  return true;
}

Counts random_counts(Random& random) {
  Counts counts{};
  const uint32_t shift = random(30);
  for (uint64_t& count : counts) {
    if (random(3) == 0) count = static_cast<uint64_t>(random(1000)) << random(shift + 1);
  }
  return counts;
}

void test_a_pack_code_has_every_baseline_symbol_in_12_bits() {
  Random random{5};
  for (int round = 0; round < 500; ++round) {
    const Counts counts = random_counts(random);
    for (const HuffmanKind kind : {HuffmanKind::kDc, HuffmanKind::kAc}) {
      const HuffmanCode code = imseq::fit_pack_code(counts.data(), kind);
      CHECK(has_all_baseline_symbols(code, kind));
      Counts in_use{};
      for (size_t symbol = 0; symbol < 256; ++symbol) in_use[symbol] = code.length[symbol] > 0;
      CHECK(is_sound(code, in_use));
      CHECK(*std::max_element(code.length.begin(), code.length.end()) <= 12);
    }
  }
}

// Counts as of an image: of each run and size about a fourth of the size below.
Counts typical_counts() {
  Counts counts{};
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    counts[symbol] = (uint64_t{1} << 40) >> (2 * (symbol & 15) + (symbol >> 4));
  }
  counts[0x00] = uint64_t{1} << 37;
  return counts;
}

// The pack code without the care for frequent symbols, and what that care asks for.
struct Plain {
  Counts weights{};
  HuffmanCode code;
  std::vector<size_t> missing;  // symbols whose code should be a bit shorter
  uint32_t space = 1;           // that all codes then need at least, in units of 2 ^ -12

  explicit Plain(const Counts& counts) {
    const HuffmanCode of_pack = imseq::fit_pack_code(counts.data(), HuffmanKind::kAc);
    for (size_t symbol = 0; symbol < 256; ++symbol) {
      if (of_pack.length[symbol] > 0) weights[symbol] = counts[symbol] + 1;
    }
    imseq::LengthLimits limits;
    limits.fill(12);
    code = imseq::fit_huffman_code(weights.data(), limits);
    for (size_t symbol = 0; symbol < 256; ++symbol) {
      const size_t size = symbol & 15;
      if (size >= 1 && size <= 7 && code.length[symbol] + size == 13) {
        missing.push_back(symbol);
        space += 1u << size;
      } else if (code.length[symbol] > 0) {
        ++space;
      }
    }
  }
};

void test_frequent_symbols_fit_the_decoding_table_with_their_extra_bits() {
  const Counts counts = typical_counts();
  const Plain plain(counts);
  CHECK(plain.missing.size() > 3);
  CHECK(plain.space <= 4096);
  const HuffmanCode code = imseq::fit_pack_code(counts.data(), HuffmanKind::kAc);
  for (const size_t symbol : plain.missing) CHECK(code.length[symbol] + (symbol & 15) <= 12);
  CHECK(num_bits(code, plain.weights) >= num_bits(plain.code, plain.weights));
  CHECK(num_bits(code, plain.weights) < num_bits(plain.code, plain.weights) * 101 / 100);
}

// So many symbols just miss the decoding table that they cannot all have shorter codes.
void test_shorter_codes_than_there_are_are_not_asked_for() {
  Counts counts{};
  for (size_t size = 1; size <= 7; ++size) {
    for (size_t run = 0; run < 16; ++run) counts[run << 4 | size] = uint64_t{1} << (27 + size);
  }
  uint64_t count = uint64_t{1} << 38;  // they take a half, so these must take the other
  for (const size_t symbol : {0x08, 0x09, 0x0A, 0x18, 0x19, 0x1A}) {
    counts[symbol] = count;
    count /= 2;
  }
  const Plain plain(counts);
  CHECK(plain.space > 4096);
  const HuffmanCode code = imseq::fit_pack_code(counts.data(), HuffmanKind::kAc);
  CHECK(code.length == plain.code.length);
}

// ---- bytes --------------------------------------------------------------------------------------

Bytes pack_tables(const Counts& counts) {
  Bytes bytes(imseq::kPackTablesBytes);
  uint8_t* out = bytes.data();
  for (size_t table = 0; table < 4; ++table) {
    const HuffmanKind kind = imseq::kind_of_table(table);
    out = imseq::write_dht(imseq::fit_pack_code(counts.data(), kind), table, out);
  }
  CHECK(out == bytes.data() + bytes.size());
  return bytes;
}

void test_tables_come_back_as_they_were_written() {
  const Counts counts = typical_counts();
  const Bytes bytes = pack_tables(counts);
  imseq::HuffmanCodes codes;
  CHECK(imseq::read_pack_tables(bytes.data(), &codes));
  for (size_t table = 0; table < 4; ++table) {
    const HuffmanCode expected = imseq::fit_pack_code(counts.data(), imseq::kind_of_table(table));
    CHECK(codes[table].code == expected.code && codes[table].length == expected.length);
    CHECK(codes[table].symbols == expected.symbols);
  }
}

void test_damaged_tables_are_refused_or_sound() {
  const Bytes bytes = pack_tables(typical_counts());
  Random random{6};
  int num_refused = 0;
  for (int round = 0; round < 100000; ++round) {
    Bytes damaged = bytes;
    for (uint32_t i = 1 + random(3); i > 0; --i) {
      damaged[random(static_cast<uint32_t>(bytes.size()))] = static_cast<uint8_t>(random(256));
    }
    imseq::HuffmanCodes codes;
    if (!imseq::read_pack_tables(damaged.data(), &codes)) {
      ++num_refused;
      continue;
    }
    for (size_t table = 0; table < 4; ++table) {
      CHECK(has_all_baseline_symbols(codes[table], imseq::kind_of_table(table)));
    }
  }
  CHECK(num_refused > 90000);
  CHECK(num_refused < 100000);  // an unchanged byte, or two symbols of one length exchanged
}

}  // namespace

int main() {
  test_no_code_within_the_limits_has_fewer_bits();
  test_where_the_limits_do_not_matter_it_is_huffmans_code();
  test_deep_trees_are_cut_at_16_bits();
  test_of_equal_symbols_the_smaller_comes_first();
  test_no_symbols_and_one();
  test_a_pack_code_has_every_baseline_symbol_in_12_bits();
  test_frequent_symbols_fit_the_decoding_table_with_their_extra_bits();
  test_shorter_codes_than_there_are_are_not_asked_for();
  test_tables_come_back_as_they_were_written();
  test_damaged_tables_are_refused_or_sound();
  if (failures > 0) std::printf("%d checks failed\n", failures.load());
  return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
