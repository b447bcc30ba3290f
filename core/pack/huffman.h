// Huffman codes of an encoder, fitted to an image or to a whole pack, and their bytes.
// docs/format.md, "Canonical form", says which codes a pack has.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace imseq {

// A Huffman code as a JPEG stores it (ITU-T T.81, B.2.4.2) and as an encoder uses it.
struct HuffmanCode {
  std::array<uint8_t, 17> num_codes{};  // [length], 1 to 16
  std::array<uint8_t, 256> symbols{};   // in order of their codes
  int32_t num_symbols = 0;
  std::array<uint16_t, 256> code{};   // [symbol]
  std::array<uint8_t, 256> length{};  // [symbol], 0: not used
};

using LengthLimits = std::array<uint8_t, 256>;  // [symbol], 1 to 16

// Counts must be below this, so that no sum of them overflows.
constexpr uint64_t kMaxSymbolCount = uint64_t{1} << 48;

// The code with the fewest bits for counts[0 ... 255] of the symbols among those that keep to the
// limits and leave the code of ones alone unused, as a JPEG must. A pure function of its arguments.
// There must be such a code: the sum of 2 ^ -limit over the symbols that occur is below 1.
[[nodiscard]] HuffmanCode fit_huffman_code(const uint64_t* counts, const LengthLimits& limits);

// The limits that a JPEG sets.
[[nodiscard]] HuffmanCode fit_huffman_code(const uint64_t* counts);

enum class HuffmanKind : uint8_t { kDc, kAc };

// A code for all images of a pack, fitted to the counts of some of them: every symbol that a
// baseline image can need has a code, none is longer than kMaxPackLength, and of the frequent ones
// hardly any, together with its extra bits, misses a decoding table of as many bits.
[[nodiscard]] HuffmanCode fit_pack_code(const uint64_t* counts, HuffmanKind kind);
constexpr int kMaxPackLength = 12;

// The tables of a scan: DC and AC of the first component, DC and AC of the others.
using HuffmanCodes = std::array<HuffmanCode, 4>;
constexpr HuffmanKind kind_of_table(size_t table) {
  return table % 2 == 0 ? HuffmanKind::kDc : HuffmanKind::kAc;
}

// The payload of a DHT segment: 17 bytes and the symbols. Returns its end.
constexpr size_t kMaxDhtBytes = 17 + 256;
uint8_t* write_dht(const HuffmanCode& code, size_t table, uint8_t* out);

// A pack's four tables, the payloads of their DHT segments one after the other. False: the bytes
// are not those of codes that fit_pack_code can have made.
[[nodiscard]] bool read_pack_tables(const uint8_t* bytes, HuffmanCodes* out);
constexpr size_t kPackTablesBytes = 2 * ((17 + 12) + (17 + 162));

}  // namespace imseq
