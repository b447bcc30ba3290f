// The inverse DCT of idct.h with NEON.
#include <arm_neon.h>

#include "jpeg/idct.h"

namespace imseq {

namespace {

// ---- orders -------------------------------------------------------------------------------------

struct ByteOrder {
  uint8_t index[16];
};

// Look-up indices that take row y from the first half of a block in zigzag order; for the second
// half they are 64 smaller. Indices out of range give zeros.
struct RowOrders {
  ByteOrder row[8];
};
constexpr RowOrders rows_in_zigzag() {
  RowOrders orders{};
  for (int k = 0; k < 128; ++k) {
    orders.row[k / 16].index[k % 16] = static_cast<uint8_t>(2 * kZigzagOfNatural[k / 2] + k % 2);
  }
  return orders;
}
constexpr RowOrders kRowsInZigzag = rows_in_zigzag();

// Rows 2 * k and 2 * k + 1 from columns.
struct RowPairOrders {
  ByteOrder pair[4];
};
constexpr RowPairOrders rows_in_columns() {
  RowPairOrders orders{};
  for (int k = 0; k < 64; ++k) {
    orders.pair[k / 16].index[k % 16] = static_cast<uint8_t>(k % 8 * 8 + k / 8);
  }
  return orders;
}
constexpr RowPairOrders kRowsInColumns = rows_in_columns();

// ---- arithmetic ---------------------------------------------------------------------------------

// The even and odd sums of a transform, before the last additions and subtractions.
struct Sums {
  int32x4_t even[4], odd[4];
};

// transform() of idct.cpp for four columns.
inline Sums transform(const int16x4_t (&in)[8]) {
  Sums out;
  const int32x4_t even2 = vmlal_n_s16(vmull_n_s16(in[2], 4433), in[6], -10704);
  const int32x4_t even3 = vmlal_n_s16(vmull_n_s16(in[2], 10703), in[6], 4433);
  const int32x4_t even0 = vshll_n_s16(vadd_s16(in[0], in[4]), 13);
  const int32x4_t even1 = vshll_n_s16(vsub_s16(in[0], in[4]), 13);
  out.even[0] = vaddq_s32(even0, even3);
  out.even[1] = vaddq_s32(even1, even2);
  out.even[2] = vsubq_s32(even1, even2);
  out.even[3] = vsubq_s32(even0, even3);
  const int16x4_t z3 = vadd_s16(in[7], in[3]), z4 = vadd_s16(in[5], in[1]);
  const int32x4_t odd_z3 = vmlal_n_s16(vmull_n_s16(z3, -6436), z4, 9633);
  const int32x4_t odd_z4 = vmlal_n_s16(vmull_n_s16(z3, 9633), z4, 6437);
  out.odd[0] = vmlal_n_s16(vmlal_n_s16(odd_z4, in[7], -7373), in[1], 4926);
  out.odd[1] = vmlal_n_s16(vmlal_n_s16(odd_z3, in[5], -20995), in[3], 4177);
  out.odd[2] = vmlal_n_s16(vmlal_n_s16(odd_z4, in[5], -4176), in[3], -20995);
  out.odd[3] = vmlal_n_s16(vmlal_n_s16(odd_z3, in[7], -4927), in[1], -7373);
  return out;
}

inline void split(const int16x8_t (&in)[8], int16x4_t (&low)[8], int16x4_t (&high)[8]) {
  for (int k = 0; k < 8; ++k) {
    low[k] = vget_low_s16(in[k]);
    high[k] = vget_high_s16(in[k]);
  }
}

inline void first_pass(int16x8_t (&block)[8]) {
  constexpr int kShift = 11;
  int16x4_t low[8], high[8];
  split(block, low, high);
  const Sums a = transform(low), b = transform(high);
  for (int k = 0; k < 4; ++k) {
    block[k] = vcombine_s16(vqrshrn_n_s32(vaddq_s32(a.even[k], a.odd[k]), kShift),
                            vqrshrn_n_s32(vaddq_s32(b.even[k], b.odd[k]), kShift));
    block[7 - k] = vcombine_s16(vqrshrn_n_s32(vsubq_s32(a.even[k], a.odd[k]), kShift),
                                vqrshrn_n_s32(vsubq_s32(b.even[k], b.odd[k]), kShift));
  }
}

// Samples around 0, by column.
inline void second_pass(const int16x8_t (&block)[8], int8x8_t (&out)[8]) {
  constexpr int kShift = 18 - 16;  // vaddhn drops 16 bits
  int16x4_t low[8], high[8];
  split(block, low, high);
  const Sums a = transform(low), b = transform(high);
  for (int k = 0; k < 4; ++k) {
    out[k] = vqrshrn_n_s16(
        vcombine_s16(vaddhn_s32(a.even[k], a.odd[k]), vaddhn_s32(b.even[k], b.odd[k])), kShift);
    out[7 - k] = vqrshrn_n_s16(
        vcombine_s16(vsubhn_s32(a.even[k], a.odd[k]), vsubhn_s32(b.even[k], b.odd[k])), kShift);
  }
}

inline void transpose(int16x8_t (&block)[8]) {
  int32x4_t pairs[8];
  for (int k = 0; k < 8; k += 2) {
    pairs[k] = vreinterpretq_s32_s16(vtrn1q_s16(block[k], block[k + 1]));
    pairs[k + 1] = vreinterpretq_s32_s16(vtrn2q_s16(block[k], block[k + 1]));
  }
  int64x2_t quads[8];
  constexpr int kFirsts[4] = {0, 1, 4, 5};
  for (const int k : kFirsts) {
    quads[k] = vreinterpretq_s64_s32(vtrn1q_s32(pairs[k], pairs[k + 2]));
    quads[k + 2] = vreinterpretq_s64_s32(vtrn2q_s32(pairs[k], pairs[k + 2]));
  }
  for (int k = 0; k < 4; ++k) {
    block[k] = vreinterpretq_s16_s64(vtrn1q_s64(quads[k], quads[k + 4]));
    block[k + 4] = vreinterpretq_s16_s64(vtrn2q_s64(quads[k], quads[k + 4]));
  }
}

// ---- a block ------------------------------------------------------------------------------------

inline bool is_zero(int16x8_t v) { return vmaxvq_u32(vreinterpretq_u32_s16(v)) == 0; }

// A block whose coefficients are zero but for the first.
inline void transform_dc(int16_t dequantised, uint8_t* out, ptrdiff_t stride) {
  const int16x8_t scaled = vshlq_n_s16(vdupq_n_s16(dequantised), 2);
  const int8x8_t samples = vqmovn_s16(vrshrq_n_s16(scaled, 5));
  const uint8x8_t row = vadd_u8(vreinterpret_u8_s8(samples), vdup_n_u8(128));
  for (int y = 0; y < 8; ++y) vst1_u8(out + y * stride, row);
}

// Converts from zigzag order to rows.
inline void dezigzag(const int16x8_t (&zigzag)[8], int16x8_t (&rows)[8]) {
  uint8x16x4_t first, second;
  for (int k = 0; k < 4; ++k) {
    first.val[k] = vreinterpretq_u8_s16(zigzag[k]);
    second.val[k] = vreinterpretq_u8_s16(zigzag[k + 4]);
  }
  for (int y = 0; y < 8; ++y) {
    const uint8x16_t order = vld1q_u8(kRowsInZigzag.row[y].index);
    const uint8x16_t half = vqtbl4q_u8(first, order);
    rows[y] = vreinterpretq_s16_u8(vqtbx4q_u8(half, second, vsubq_u8(order, vdupq_n_u8(64))));
  }
}

inline void transform_block(const int16_t* coefficients, const int16_t* quant, uint8_t* out,
                            ptrdiff_t stride) {
  int16x8_t zigzag[8], rows[8];
  for (int k = 0; k < 8; ++k) zigzag[k] = vld1q_s16(coefficients + 8 * k);
  int16x8_t others = vsetq_lane_s16(0, zigzag[0], 0);
  for (int k = 1; k < 8; ++k) others = vorrq_s16(others, zigzag[k]);
  if (is_zero(others)) {
    transform_dc(static_cast<int16_t>(coefficients[0] * quant[0]), out, stride);
    return;
  }
  dezigzag(zigzag, rows);
  int16x8_t below = rows[1];
  for (int y = 2; y < 8; ++y) below = vorrq_s16(below, rows[y]);
  for (int y = 0; y < 8; ++y) rows[y] = vmulq_s16(rows[y], vld1q_s16(quant + 8 * y));
  if (is_zero(below)) {
    // libjpeg-turbo has this shortcut too, which wraps where the full transform saturates.
    for (int y = 7; y >= 0; --y) rows[y] = vshlq_n_s16(rows[0], 2);
  } else {
    first_pass(rows);
  }
  transpose(rows);
  int8x8_t columns[8];
  second_pass(rows, columns);
  uint8x16x4_t samples;
  for (int k = 0; k < 4; ++k) {
    samples.val[k] = veorq_u8(vreinterpretq_u8_s8(vcombine_s8(columns[2 * k], columns[2 * k + 1])),
                              vdupq_n_u8(128));
  }
  for (int k = 0; k < 4; ++k) {
    const uint8x16_t two = vqtbl4q_u8(samples, vld1q_u8(kRowsInColumns.pair[k].index));
    vst1_u8(out + 2 * k * stride, vget_low_u8(two));
    vst1_u8(out + (2 * k + 1) * stride, vget_high_u8(two));
  }
}

}  // namespace

void idct_neon(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
               const IdctTable& table, uint8_t* out, ptrdiff_t stride) {
  BlockWalk walk(coefficients, mcu_width, mcu_step);
  for (int i = 0; i < num_blocks; ++i) {
    int16_t* const block = walk.next();
    transform_block(block, table.quant.data(), out + 8 * i, stride);
    for (int k = 0; k < 64; k += 8) vst1q_s16(block + k, vdupq_n_s16(0));
  }
}

}  // namespace imseq
