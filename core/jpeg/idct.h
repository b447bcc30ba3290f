// Dequantisation and the inverse DCT: libjpeg's accurate integer method (jidctint.c, "islow").
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/cpu.h"
#include "jpeg/header.h"

namespace imseq {

// The factors of the transform. The rotations' constants are kept in memory because compilers turn
// known constants into shifts and additions, which on vectors are three times slower than 16-bit
// multiplication.
struct IdctTable {
  explicit IdctTable(const JpegQuantTable& quant_table);
  IdctTable() = default;

  std::array<int16_t, 64> quant{};  // natural order
  alignas(64) std::array<int16_t, 64> quant_zigzag{};
  std::array<int16_t, 12> rotation{};
};

// Transforms num_blocks blocks whose outputs lie side by side, and sets their coefficients to zero.
// Block i: 64 quantised coefficients in zigzag order at
//   coefficients + (i / mcu_width) * mcu_step + (i % mcu_width) * 64,
// best aligned to 64 bytes; its 8 x 8 samples begin at out + 8 * i, with rows `stride` bytes apart.
// Nothing beside the samples is written.
//
// Bit-exact with libjpeg-turbo's x86 SIMD code (jidctint-sse2.asm, jidctint-avx2.asm) for *every*
// input: products of dequantisation and sums before multiplication wrap at 16 bits, the
// intermediate result and the samples saturate. For coefficients that an encoder can have written
// this is the same as jidctint.c.
using IdctFunction = void(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
                          const IdctTable& table, uint8_t* out, ptrdiff_t stride);
using IdctKernel = IdctFunction*;

[[nodiscard]] IdctKernel idct_kernel(CpuLevel level);

// The kernels. idct_portable is the reference; the others pass it blocks out of their range.
IdctFunction idct_portable, idct_avx2, idct_avx512, idct_neon;

// Zigzag index of each coefficient, row by row.
inline constexpr uint8_t kZigzagOfNatural[64] = {
    0,  1,  5,  6,  14, 15, 27, 28, 2,  4,  7,  13, 16, 26, 29, 42, 3,  8,  12, 17, 25, 30,
    41, 43, 9,  11, 18, 24, 31, 40, 44, 53, 10, 19, 23, 32, 39, 45, 52, 54, 20, 22, 33, 38,
    46, 51, 55, 60, 21, 34, 37, 47, 50, 56, 59, 61, 35, 36, 48, 49, 57, 58, 62, 63};

// Iterates over the blocks of a run. Always inlined: otherwise the linker could keep the copy that
// was compiled for one kind of processor, for all.
class BlockWalk {
 public:
  __attribute__((always_inline)) BlockWalk(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step)
      : next_(coefficients),
        left_in_mcu_(mcu_width),
        mcu_width_(mcu_width),
        to_next_mcu_(mcu_step - 64 * mcu_width) {}

  __attribute__((always_inline)) int16_t* next() {
    int16_t* const block = next_;
    next_ += 64;
    if (--left_in_mcu_ == 0) {
      next_ += to_next_mcu_;
      left_in_mcu_ = mcu_width_;
    }
    return block;
  }

 private:
  int16_t* next_;
  int left_in_mcu_;
  int mcu_width_;
  ptrdiff_t to_next_mcu_;
};

}  // namespace imseq
