// Dequantisation and the inverse DCT: libjpeg's accurate integer method (jidctint.c, "islow").
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu.h"
#include "jpeg.h"

namespace imseq {

// What the transform multiplies by. The constants of the rotations lie in memory beside the
// quantisation table because compilers turn constants they know into chains of shifts and
// additions, which on vectors is three times slower than 16-bit multiplication.
struct IdctTable {
  explicit IdctTable(const JpegQuantTable& quant_table);
  IdctTable() = default;

  std::array<int16_t, 64> quant{};  // natural order
  alignas(64) std::array<int16_t, 64> quant_zigzag{};
  std::array<int16_t, 12> rotation{};
};

// 8 x 8 samples from one block of quantised coefficients in natural order, none of them other than
// zero behind zigzag index `last`. Rows of out are `stride` bytes apart.
//
// Bit-exact with libjpeg-turbo's x86 SIMD code (jidctint-sse2.asm, jidctint-avx2.asm) for *every*
// input: products of dequantisation and sums before multiplication wrap at 16 bits, the
// intermediate result and the samples saturate. For coefficients that an encoder can have written
// this is the same as jidctint.c.
void idct_block(const int16_t* coefficients, const IdctTable& table, int last, uint8_t* out,
                ptrdiff_t stride);

// Transforms num_blocks blocks whose output lies side by side, and leaves their coefficients zero.
// Block i: 64 quantised coefficients in zigzag order at
// coefficients + (i / mcu_width) * mcu_step + (i % mcu_width) * 64, where its 8 x 8 samples begin at
// out + 8 * i, with rows `stride` bytes apart. Writes nothing beside the blocks' samples. All levels
// agree with idct_block for every input.
using IdctKernel = void (*)(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step,
                            int num_blocks, const IdctTable& table, uint8_t* out, ptrdiff_t stride);

[[nodiscard]] IdctKernel idct_kernel(CpuLevel level);

void idct_portable(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
                   const IdctTable& table, uint8_t* out, ptrdiff_t stride);
void idct_avx512(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
                 const IdctTable& table, uint8_t* out, ptrdiff_t stride);

}  // namespace imseq
