// Converts the coefficients of an image to the symbols of its Huffman codes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "jpeg/coefficients.h"

namespace imseq {

// A symbol to be coded: bits 0 to 9 are the table and the symbol in it, bits 16 and up the extra
// bits.
using Token = uint32_t;
constexpr int kExtraShift = 16;
constexpr uint32_t kTokenSymbol = 0x3FF;

using SymbolCounts = std::array<uint64_t, 4 * 256>;  // [table and symbol, as in a token]

// The tokens of a scan.
class ScanTokens {
 public:
  // False: a coefficient is too large for 8-bit samples.
  [[nodiscard]] bool collect(const JpegHeader& header, const JpegCoefficients& coefficients,
                             int32_t restart_interval);

  [[nodiscard]] const Token* begin() const { return tokens_.data(); }
  [[nodiscard]] const Token* end() const { return begin() + interval_ends_.back(); }
  [[nodiscard]] size_t num_intervals() const { return interval_ends_.size(); }
  [[nodiscard]] const Token* interval_end(size_t i) const { return begin() + interval_ends_[i]; }

  [[nodiscard]] SymbolCounts counts() const;

 private:
  void make_room(const JpegHeader& header, size_t num_tokens);
  Token* collect_mcu(const JpegHeader& header, const JpegCoefficients& coefficients, int x, int y,
                     Token* out);
  Token* collect_block(const int16_t* block, int component, Token* out);

  std::vector<Token> tokens_;
  std::vector<size_t> interval_ends_;
  std::array<int32_t, 3> last_dc_{};
  bool too_large_ = false;
};

}  // namespace imseq
