#include "pack/huffman.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace imseq {

namespace {

constexpr int32_t kMaxCodeLength = 16;

struct Leaf {
  uint64_t weight;
  int32_t symbol;  // or kFreeCode
  int32_t limit;   // of its depth
};

// The leaf that takes the code of ones alone, which a JPEG may not use (T.81, annex C).
constexpr int32_t kFreeCode = -1;

// The depth of each leaf in the tree with the least sum of weight times depth. Leaves must ascend
// by weight, and 2 ^ -limit must add up to 1 at most.
//
// Package-merge (Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman
// codes", J. ACM 37, 1990): a leaf at depth n stands for n coins, one of each depth 1 to n. A coin
// of depth d is worth 2 ^ -d and costs the leaf's weight; the cheapest coins that are worth (number
// of leaves - 1) together make the best tree.
std::vector<int32_t> package_merge(const std::vector<Leaf>& leaves) {
  constexpr int32_t kPackage = -1;
  struct Coin {
    uint64_t cost;
    int32_t leaf;  // or kPackage: two coins, one deeper
  };
  std::array<std::vector<Coin>, kMaxCodeLength + 2> coins;  // [depth], ascending by cost
  std::vector<Coin> single, packages;
  for (int32_t depth = kMaxCodeLength; depth > 0; --depth) {
    const auto d = static_cast<size_t>(depth);
    single.clear();
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (leaves[i].limit >= depth) single.push_back({leaves[i].weight, static_cast<int32_t>(i)});
    }
    packages.clear();
    for (size_t i = 0; i + 1 < coins[d + 1].size(); i += 2) {
      packages.push_back({coins[d + 1][i].cost + coins[d + 1][i + 1].cost, kPackage});
    }
    coins[d].resize(single.size() + packages.size());
    // On a tie the leaf goes first, so that no leaf has a coin without the one above it.
    std::merge(single.begin(), single.end(), packages.begin(), packages.end(), coins[d].begin(),
               [](const Coin& a, const Coin& b) { return a.cost < b.cost; });
  }
  std::vector<int32_t> depths(leaves.size(), 0);
  size_t num_taken = 2 * leaves.size() - 2;
  for (size_t d = 1; num_taken > 0; ++d) {
    size_t num_packages = 0;
    for (size_t i = 0; i < num_taken; ++i) {
      const int32_t leaf = coins[d][i].leaf;
      if (leaf == kPackage) {
        ++num_packages;
      } else {
        ++depths[static_cast<size_t>(leaf)];
      }
    }
    num_taken = 2 * num_packages;
  }
  return depths;
}

// Assigns codes in the order of the symbols, whose lengths must ascend.
HuffmanCode assign_codes(const std::vector<std::pair<int32_t, uint8_t>>& lengths_and_symbols) {
  HuffmanCode result;
  uint32_t next = 0;
  int32_t last_length = 0;
  for (const auto& [length, symbol] : lengths_and_symbols) {
    next <<= length - last_length;
    last_length = length;
    ++result.num_codes[static_cast<size_t>(length)];
    result.symbols[static_cast<size_t>(result.num_symbols++)] = symbol;
    result.code[symbol] = static_cast<uint16_t>(next++);
    result.length[symbol] = static_cast<uint8_t>(length);
  }
  return result;
}

}  // namespace

HuffmanCode fit_huffman_code(const uint64_t* counts, const LengthLimits& limits) {
  // Rarest first; of equals the larger symbol counts as the rarer. The free code weighs nothing and
  // has the greatest limit, so it gets the last code, which is all ones.
  std::vector<Leaf> leaves{{0, kFreeCode, 0}};
  for (size_t symbol = 256; symbol-- > 0;) {
    if (counts[symbol] == 0) continue;
    leaves.push_back({counts[symbol], static_cast<int32_t>(symbol), limits[symbol]});
    leaves[0].limit = std::max(leaves[0].limit, leaves.back().limit);
  }
  std::stable_sort(leaves.begin() + 1, leaves.end(),
                   [](const Leaf& a, const Leaf& b) { return a.weight < b.weight; });
  const std::vector<int32_t> depths = package_merge(leaves);
  std::vector<std::pair<int32_t, uint8_t>> lengths_and_symbols;
  for (size_t i = leaves.size(); i-- > 1;) {
    lengths_and_symbols.emplace_back(depths[i], static_cast<uint8_t>(leaves[i].symbol));
  }
  std::stable_sort(lengths_and_symbols.begin(), lengths_and_symbols.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  return assign_codes(lengths_and_symbols);
}

HuffmanCode fit_huffman_code(const uint64_t* counts) {
  LengthLimits limits;
  limits.fill(kMaxCodeLength);
  return fit_huffman_code(counts, limits);
}

// ---- codes of a pack ----------------------------------------------------------------------------

namespace {

// Whether a baseline image of 8-bit samples can have this symbol (T.81 tables F.1 and F.2).
bool is_baseline_symbol(size_t symbol, HuffmanKind kind) {
  const size_t run = symbol >> 4, size = symbol & 15;
  if (kind == HuffmanKind::kDc) return symbol <= 11;
  return (size >= 1 && size <= 10) || (size == 0 && (run == 0 || run == 15));
}

// Whether there are codes within the limits for all symbols in use and the free one.
bool is_possible(const HuffmanCode& in_use, const LengthLimits& limits) {
  uint32_t taken = 1;  // of 2 ^ kMaxPackLength codes of the greatest length
  for (int32_t i = 0; i < in_use.num_symbols; ++i) {
    taken += 1u << (kMaxPackLength - limits[in_use.symbols[static_cast<size_t>(i)]]);
  }
  return taken <= 1u << kMaxPackLength;
}

}  // namespace

HuffmanCode fit_pack_code(const uint64_t* counts, HuffmanKind kind) {
  constexpr size_t kLargestCappedSize = 7;  // values that an int8_t in a decoding table can hold
  std::array<uint64_t, 256> weights{};
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    if (is_baseline_symbol(symbol, kind)) weights[symbol] = counts[symbol] + 1;
  }
  LengthLimits limits;
  limits.fill(kMaxPackLength);
  const HuffmanCode code = fit_huffman_code(weights.data(), limits);
  if (kind == HuffmanKind::kDc) return code;
  // A symbol that misses the decoding table by one bit costs a slow step each time it occurs;
  // making its code a bit shorter costs the others little.
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    const size_t size = symbol & 15;
    if (code.length[symbol] + size == kMaxPackLength + 1 && size <= kLargestCappedSize) {
      limits[symbol] = static_cast<uint8_t>(kMaxPackLength - size);
    }
  }
  return is_possible(code, limits) ? fit_huffman_code(weights.data(), limits) : code;
}

// ---- bytes --------------------------------------------------------------------------------------

uint8_t* write_dht(const HuffmanCode& code, size_t table, uint8_t* out) {
  *out++ = static_cast<uint8_t>(table % 2 << 4 | table / 2);
  out = std::copy(code.num_codes.begin() + 1, code.num_codes.end(), out);
  return std::copy_n(code.symbols.begin(), code.num_symbols, out);
}

namespace {

// Reads one table and leaves *bytes behind it. False: fit_pack_code can't have made this code.
bool read_pack_code(const uint8_t** bytes, size_t table, HuffmanCode* out) {
  const HuffmanKind kind = kind_of_table(table);
  const size_t num_symbols = kind == HuffmanKind::kDc ? 12 : 162;
  if (*(*bytes)++ != (table % 2 << 4 | table / 2)) return false;
  const uint8_t* const num_codes = *bytes;
  const uint8_t* symbol = *bytes + kMaxCodeLength;
  const uint8_t* const end = symbol + num_symbols;
  std::vector<std::pair<int32_t, uint8_t>> lengths_and_symbols;
  uint32_t taken = 0;  // of 2 ^ kMaxPackLength codes of the greatest length
  for (int32_t length = 1; length <= kMaxCodeLength; ++length) {
    const uint8_t count = num_codes[length - 1];
    if (count > end - symbol || (count > 0 && length > kMaxPackLength)) return false;
    for (int32_t i = 0; i < count; ++i) lengths_and_symbols.emplace_back(length, *symbol++);
    if (count > 0) taken += uint32_t{count} << (kMaxPackLength - length);
  }
  if (symbol != end || taken >= 1u << kMaxPackLength) return false;
  *out = assign_codes(lengths_and_symbols);
  *bytes = end;
  for (size_t i = 0; i < 256; ++i) {
    if ((out->length[i] > 0) != is_baseline_symbol(i, kind)) return false;
  }
  return true;
}

}  // namespace

bool read_pack_tables(const uint8_t* bytes, HuffmanCodes* out) {
  for (size_t table = 0; table < out->size(); ++table) {
    if (!read_pack_code(&bytes, table, &(*out)[table])) return false;
  }
  return true;
}

}  // namespace imseq
