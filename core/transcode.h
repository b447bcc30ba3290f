// Packing's lossless re-coding: the same coefficients under Huffman tables fitted to the image.
// docs/format.md, "Canonical form", says what comes out.
#pragma once

#include <array>
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

// The code with the fewest bits for counts[0 ... 255] of the symbols among those that a JPEG
// allows: at most 16 bits (reached by T.81's adjustment K.3 where the optimum is longer) and no
// code of ones alone. A pure function of counts.
[[nodiscard]] HuffmanCode fit_huffman_code(const uint32_t* counts);

}  // namespace imseq
