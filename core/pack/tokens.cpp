#include "pack/tokens.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace imseq {

namespace {

constexpr uint32_t kEndOfBlock = 0x00, kSixteenZeros = 0xF0;

// The index of the table in HuffmanCodes, times 256.
constexpr uint32_t dc_table_of(int component) { return component == 0 ? 0x000 : 0x200; }
constexpr uint32_t ac_table_of(int component) { return component == 0 ? 0x100 : 0x300; }

// Bit k is set where block[k] is not zero.
uint64_t nonzero_mask(const int16_t* block) {
#if defined(__SSE2__)
  uint64_t zeros = 0;
  for (int i = 0; i < 64; i += 16) {
    const auto* in = reinterpret_cast<const __m128i*>(block + i);
    // Packing saturates, so no other value becomes zero.
    const __m128i bytes = _mm_packs_epi16(_mm_loadu_si128(in), _mm_loadu_si128(in + 1));
    const int is_zero = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    zeros |= static_cast<uint64_t>(is_zero) << i;
  }
  return ~zeros;
#else
  constexpr uint64_t kLow15 = 0x7FFF7FFF7FFF7FFFu;
  static_assert(std::endian::native == std::endian::little, "the first value has the lowest bit");
  uint64_t mask = 0;
  for (int i = 0; i < 64; i += 4) {
    uint64_t four;
    std::memcpy(&four, block + i, sizeof(four));
    const uint64_t top_bits = (((four & kLow15) + kLow15) | four) & ~kLow15;
    // The product collects the four top bits from bit 48 on.
    mask |= (((top_bits >> 15) * 0x0001000200040008u) >> 48 & 0xF) << i;
  }
  return mask;
#endif
}

// [value & kCategoryMask]: the category of the value and its extra bits (T.81 F.1.2.1.1), as in a
// token. Undefined for values that are too large.
constexpr uint32_t kCategoryMask = 0xFFF;
constexpr auto kCategories = [] {
  std::array<Token, kCategoryMask + 1> table{};
  for (int value = -kMaxDcDifference; value <= kMaxDcDifference; ++value) {
    const auto magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    const auto size = static_cast<uint32_t>(std::bit_width(magnitude));
    const auto extra = static_cast<uint32_t>(value < 0 ? value - 1 : value) & ((1u << size) - 1);
    table[static_cast<uint32_t>(value) & kCategoryMask] = size | extra << kExtraShift;
  }
  return table;
}();

constexpr Token category(int32_t value) {
  return kCategories[static_cast<uint32_t>(value) & kCategoryMask];
}

constexpr bool is_too_large(int32_t value, int32_t largest) {
  return static_cast<uint32_t>(value + largest) > static_cast<uint32_t>(2 * largest);
}

}  // namespace

// T.81 F.1.2.1 and F.1.2.2.
Token* ScanTokens::collect_block(const int16_t* block, int component, Token* out) {
  int32_t& last_dc = last_dc_[static_cast<size_t>(component)];
  const int32_t difference = block[0] - last_dc;
  last_dc = block[0];
  *out++ = dc_table_of(component) | category(difference);
  bool too_large = is_too_large(difference, kMaxDcDifference);
  const uint32_t table = ac_table_of(component);
  int last = 0;
  for (uint64_t mask = nonzero_mask(block) & ~uint64_t{1}; mask != 0; mask &= mask - 1) {
    const int k = std::countr_zero(mask);
    int run = k - last - 1;
    for (; run > 15; run -= 16) *out++ = table | kSixteenZeros;
    *out++ = table | static_cast<uint32_t>(run) << 4 | category(block[k]);
    too_large |= is_too_large(block[k], kMaxAc);
    last = k;
  }
  if (last != 63) *out++ = table | kEndOfBlock;
  too_large_ |= too_large;
  return out;
}

Token* ScanTokens::collect_mcu(const JpegHeader& header, const JpegCoefficients& coefficients,
                               int x, int y, Token* out) {
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[static_cast<size_t>(c)];
    for (int v = 0; v < component.mcu_height; ++v) {
      const int16_t* block =
          coefficients.block(c, y * component.mcu_height + v, x * component.mcu_width);
      for (int h = 0; h < component.mcu_width; ++h, block += 64) {
        out = collect_block(block, c, out);
      }
    }
  }
  return out;
}

// Makes room for a row of MCUs, at most 64 tokens per block, so that no token needs a check.
void ScanTokens::make_room(const JpegHeader& header, size_t num_tokens) {
  size_t row_blocks = 0;
  for (const JpegComponent& component : header.used_components()) {
    row_blocks += static_cast<size_t>(component.blocks_wide) * component.mcu_height;
  }
  const size_t needed = num_tokens + row_blocks * 64;
  if (needed > tokens_.size()) tokens_.resize(std::max(needed, tokens_.size() * 2));
}

bool ScanTokens::collect(const JpegHeader& header, const JpegCoefficients& coefficients,
                         int32_t restart_interval) {
  const int64_t interval = restart_interval > 0 ? restart_interval : header.num_mcus();
  int64_t mcus_left = interval;
  size_t num_tokens = 0;
  interval_ends_.clear();
  last_dc_ = {};
  too_large_ = false;
  for (int y = 0; y < header.mcus_high; ++y) {
    make_room(header, num_tokens);
    Token* out = tokens_.data() + num_tokens;
    for (int x = 0; x < header.mcus_wide; ++x) {
      if (mcus_left == 0) {
        interval_ends_.push_back(static_cast<size_t>(out - tokens_.data()));
        last_dc_ = {};
        mcus_left = interval;
      }
      --mcus_left;
      out = collect_mcu(header, coefficients, x, y, out);
    }
    num_tokens = static_cast<size_t>(out - tokens_.data());
  }
  interval_ends_.push_back(num_tokens);
  return !too_large_;
}

SymbolCounts ScanTokens::counts() const {
  SymbolCounts result{};
  for (const Token token : *this) ++result[token & kTokenSymbol];
  return result;
}

}  // namespace imseq
