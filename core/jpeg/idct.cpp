#include "jpeg/idct.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace imseq {

namespace {

constexpr int kConstBits = 13;  // fractional bits of the constants
constexpr int kPass1Bits = 2;   // fractional bits kept between the passes

// The constants of jidctint.c, named by their values.
constexpr int k0_298 = 2446, k0_390 = 3196, k0_541 = 4433, k0_765 = 6270, k0_899 = 7373,
              k1_175 = 9633, k1_501 = 12299, k1_847 = 15137, k1_961 = 16069, k2_053 = 16819,
              k2_562 = 20995, k3_072 = 25172;

// Combined as in jidctint-sse2.asm, so that every rotation is x * a + y * b.
constexpr std::array<int16_t, 12> kRotation = {k0_541,          k0_541 - k1_847, k0_541 + k0_765,
                                               k1_175 - k1_961, k1_175,          k1_175 - k0_390,
                                               k0_298 - k0_899, -k0_899,         k2_053 - k2_562,
                                               -k2_562,         k3_072 - k2_562, k1_501 - k0_899};

// Wraps as 16-bit SIMD arithmetic does (the conversion is modulo 2^16, [conv.integral]).
inline int16_t wrap16(int value) { return static_cast<int16_t>(value); }

inline int16_t saturate16(int value) {
  return static_cast<int16_t>(std::clamp(value, -32768, 32767));
}

inline uint8_t to_sample(int16_t value) {
  return static_cast<uint8_t>(std::clamp<int16_t>(value, -128, 127) + 128);
}

// One-dimensional transform of 8 values (Loeffler, Ligtenberg and Moschytz, ICASSP 1989), the
// result scaled by 2^kConstBits. Sums fit 32 bits: none exceeds 32768 * 64570.
inline void transform(const int16_t (&in)[8], const int16_t* __restrict c, int (&out)[8]) {
  const int even2 = in[2] * c[0] + in[6] * c[1];
  const int even3 = in[2] * c[2] + in[6] * c[0];
  const int even0 = wrap16(in[0] + in[4]) * (1 << kConstBits);
  const int even1 = wrap16(in[0] - in[4]) * (1 << kConstBits);
  const int sum0 = even0 + even3, sum3 = even0 - even3;
  const int sum1 = even1 + even2, sum2 = even1 - even2;

  const int16_t z3 = wrap16(in[7] + in[3]), z4 = wrap16(in[5] + in[1]);
  const int odd_z3 = z3 * c[3] + z4 * c[4];
  const int odd_z4 = z3 * c[4] + z4 * c[5];
  const int odd0 = in[7] * c[6] + in[1] * c[7] + odd_z3;
  const int odd1 = in[5] * c[8] + in[3] * c[9] + odd_z4;
  const int odd2 = in[5] * c[9] + in[3] * c[10] + odd_z3;
  const int odd3 = in[7] * c[7] + in[1] * c[11] + odd_z4;

  out[0] = sum0 + odd3;
  out[7] = sum0 - odd3;
  out[1] = sum1 + odd2;
  out[6] = sum1 - odd2;
  out[2] = sum2 + odd1;
  out[5] = sum2 - odd1;
  out[3] = sum3 + odd0;
  out[4] = sum3 - odd0;
}

// Both passes transform eight columns at once. Compilers vectorise the loop over x only if these
// are functions of their own. Rows from kRows on are zero: most blocks need only four.
template <int kRows>
__attribute__((noinline)) void first_pass(const int16_t* __restrict coefficients,
                                          const int16_t* __restrict quant,
                                          const int16_t* __restrict rotation,
                                          int16_t* __restrict out) {
  constexpr int kShift = kConstBits - kPass1Bits;
  for (int x = 0; x < 8; ++x) {
    int16_t in[8] = {};
    int sums[8];
    for (int k = 0; k < kRows; ++k) in[k] = wrap16(coefficients[8 * k + x] * quant[8 * k + x]);
    transform(in, rotation, sums);
    for (int k = 0; k < 8; ++k) {
      out[8 * k + x] = saturate16((sums[k] + (1 << (kShift - 1))) >> kShift);
    }
  }
}

template <int kRows>
__attribute__((noinline)) void second_pass(const int16_t* __restrict in,
                                           const int16_t* __restrict rotation,
                                           int16_t* __restrict out) {
  constexpr int kShift = kConstBits + kPass1Bits + 3;  // 3: both passes scale by sqrt(8)
  for (int x = 0; x < 8; ++x) {
    int16_t column[8] = {};
    int sums[8];
    for (int k = 0; k < kRows; ++k) column[k] = in[8 * k + x];
    transform(column, rotation, sums);
    // The result has 32 - 18 bits: no saturation is needed.
    for (int k = 0; k < 8; ++k) {
      out[8 * k + x] = static_cast<int16_t>((sums[k] + (1 << (kShift - 1))) >> kShift);
    }
  }
}

// Swaps the upper part of every group of bits in x with the lower part of the same group in y.
inline void swap_parts(uint64_t& x, uint64_t& y, uint64_t lower, int shift) {
  const uint64_t low = (x & lower) | (y & lower) << shift;
  y = (x >> shift & lower) | (y & ~lower);
  x = low;
}
constexpr uint64_t kLow32 = 0x00000000FFFFFFFF, kLow16 = 0x0000FFFF0000FFFF,
                   kLow8 = 0x00FF00FF00FF00FF;

// Transposes 4 x 4 values, a row in each word, whose lowest bits are the first value.
inline void transpose_4x4(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d) {
  swap_parts(a, c, kLow32, 32);
  swap_parts(b, d, kLow32, 32);
  swap_parts(a, b, kLow16, 16);
  swap_parts(c, d, kLow16, 16);
}

// Transposes 8 x 8 values as four quarters.
inline void transpose(int16_t* block) {
  uint64_t w[16];  // row y is w[2 * y], w[2 * y + 1]
  std::memcpy(w, block, sizeof(w));
  transpose_4x4(w[0], w[2], w[4], w[6]);
  transpose_4x4(w[1], w[3], w[5], w[7]);
  transpose_4x4(w[8], w[10], w[12], w[14]);
  transpose_4x4(w[9], w[11], w[13], w[15]);
  for (int y = 0; y < 4; ++y) std::swap(w[2 * y + 1], w[2 * y + 8]);
  std::memcpy(block, w, sizeof(w));
}

// Stores columns of 8 samples as rows.
inline void store_transposed(const uint8_t* columns, uint8_t* out, ptrdiff_t stride) {
  uint64_t w[8];
  std::memcpy(w, columns, sizeof(w));
  for (int k = 0; k < 4; ++k) swap_parts(w[k], w[k + 4], kLow32, 32);
  for (int k = 0; k < 8; k += 4) {
    swap_parts(w[k], w[k + 2], kLow16, 16);
    swap_parts(w[k + 1], w[k + 3], kLow16, 16);
  }
  for (int k = 0; k < 8; k += 2) swap_parts(w[k], w[k + 1], kLow8, 8);
  for (int y = 0; y < 8; ++y) std::memcpy(out + y * stride, &w[y], 8);
}

bool only_first_row(const int16_t* coefficients) {
  if (coefficients[8] != 0) return false;  // usually
  int any = 0;
  for (int k = 8; k < 64; ++k) any |= coefficients[k];
  return any == 0;
}

// Where a block may have nonzero coefficients: only in the first place, in the first four rows and
// columns, or anywhere.
enum class Extent { kFirst, kQuarter, kWhole };

constexpr bool in_quarter(int natural) { return natural / 8 < 4 && natural % 8 < 4; }

Extent extent_of(const int16_t* zigzag) {
  static constexpr auto kOutsideQuarter = [] {
    std::array<int16_t, 64> mask{};
    for (int k = 0; k < 64; ++k) mask[kZigzagOfNatural[k]] = in_quarter(k) ? 0 : -1;
    return mask;
  }();
  int16_t outside = 0, inside = 0;
  for (int k = 0; k < 64; ++k) {
    outside = static_cast<int16_t>(outside | (zigzag[k] & kOutsideQuarter[k]));
  }
  if (outside != 0) return Extent::kWhole;
  for (int k = 1; k < 32; ++k) inside = static_cast<int16_t>(inside | zigzag[k]);
  return inside != 0 ? Extent::kQuarter : Extent::kFirst;
}

template <bool kOnlyQuarter>
void to_natural_order(const int16_t* __restrict zigzag, int16_t* __restrict natural) {
#pragma GCC unroll 64
  for (int k = 0; k < 64; ++k) {
    natural[k] = !kOnlyQuarter || in_quarter(k) ? zigzag[kZigzagOfNatural[k]] : int16_t{0};
  }
}

inline int16_t scaled(int16_t coefficient, int16_t quant) {
  return wrap16(wrap16(coefficient * quant) * (1 << kPass1Bits));
}

void transform_first(int16_t coefficient, int16_t quant, uint8_t* out, ptrdiff_t stride) {
  const int16_t sum = wrap16((scaled(coefficient, quant) + 16) >> (kPass1Bits + 3));
  for (int y = 0; y < 8; ++y) std::memset(out + y * stride, to_sample(sum), 8);
}

// coefficients: in natural order, zero beyond the first kRows rows and columns.
template <int kRows>
void transform_block(const int16_t* coefficients, const IdctTable& table, uint8_t* out,
                     ptrdiff_t stride) {
  alignas(16) int16_t block[64], samples[64];
  alignas(16) uint8_t columns[64];
  if (only_first_row(coefficients)) {
    // libjpeg-turbo has this shortcut too, which wraps where the full transform saturates.
    for (size_t k = 0; k < 64; ++k) block[k] = scaled(coefficients[k & 7], table.quant[k & 7]);
  } else {
    first_pass<kRows>(coefficients, table.quant.data(), table.rotation.data(), block);
  }
  transpose(block);
  second_pass<kRows>(block, table.rotation.data(), samples);
  for (int k = 0; k < 64; ++k) columns[k] = to_sample(samples[k]);
  store_transposed(columns, out, stride);
}

}  // namespace

IdctTable::IdctTable(const JpegQuantTable& quant_table) : rotation(kRotation) {
  for (size_t k = 0; k < 64; ++k) {
    quant_zigzag[k] = quant[kNaturalOrder[k]] = wrap16(quant_table.values[k]);
  }
}

void idct_portable(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
                   const IdctTable& table, uint8_t* out, ptrdiff_t stride) {
  BlockWalk walk(coefficients, mcu_width, mcu_step);
  for (int i = 0; i < num_blocks; ++i, out += 8) {
    int16_t* const zigzag = walk.next();
    alignas(16) int16_t natural[64];
    switch (extent_of(zigzag)) {
      case Extent::kFirst:
        transform_first(zigzag[0], table.quant[0], out, stride);
        break;
      case Extent::kQuarter:
        to_natural_order<true>(zigzag, natural);
        transform_block<4>(natural, table, out, stride);
        break;
      case Extent::kWhole:
        to_natural_order<false>(zigzag, natural);
        transform_block<8>(natural, table, out, stride);
    }
    std::memset(zigzag, 0, 64 * sizeof(int16_t));
  }
}

IdctKernel idct_kernel(CpuLevel level) {
  return kernels_of_level<idct_portable, idct_avx2, idct_avx512, idct_neon>(level);
}

}  // namespace imseq
