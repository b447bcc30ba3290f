// The resize with NEON.
#include <arm_neon.h>

#include <cstring>

#include "resize/kernels.h"

namespace imseq {

namespace {

constexpr int kHalf = 1 << (kWeightBits - 1);

// sums[p]: four outputs of plane p from the i-th on, not clamped.
template <int kPlanes>
inline void sum_outputs(const AxisWeights& weights, size_t i, const uint8_t* in, size_t in_stride,
                        int32x4_t (&sums)[kPlanes]) {
  const int32x4_t first = vld1q_s32(weights.first_taps + i);
  const int32x4_t place = vsubq_s32(first, vdupq_laneq_s32(first, 0));
  // A look-up gives 0 for indices beyond the window, as for the upper bytes of a pixel's 32 bits.
  const uint32x4_t places = vorrq_u32(vreinterpretq_u32_s32(place), vdupq_n_u32(0xffffff00));
  for (int p = 0; p < kPlanes; ++p) sums[p] = vdupq_n_s32(kHalf);
  const int32_t* weight = weights.weights + i;
  const uint8_t* window = in + weights.first_taps[i];
  for (int tap = 0; tap < weights.max_taps; tap += AxisWeights::kTapGroup) {
    uint8x16_t pixels[kPlanes];
    for (size_t p = 0; p < kPlanes; ++p) {
      pixels[p] = vld1q_u8(window + static_cast<size_t>(tap) + p * in_stride);
    }
    for (uint32_t j = 0; j < AxisWeights::kTapGroup; ++j, weight += weights.stride) {
      const uint8x16_t at = vreinterpretq_u8_u32(vaddq_u32(places, vdupq_n_u32(j)));
      const int32x4_t w = vld1q_s32(weight);
      for (int p = 0; p < kPlanes; ++p) {
        const int32x4_t values = vreinterpretq_s32_u8(vqtbl1q_u8(pixels[p], at));
        sums[p] = vmlaq_s32(sums[p], values, w);
      }
    }
  }
  for (int p = 0; p < kPlanes; ++p) sums[p] = vshrq_n_s32(sums[p], kWeightBits);
}

inline uint8x8_t to_bytes(int32x4_t low, int32x4_t high) {
  return vqmovn_u16(vcombine_u16(vqmovun_s32(low), vqmovun_s32(high)));
}

template <int kPlanes>
void horizontal(const AxisWeights& weights, const void*, const uint8_t* in, size_t in_stride,
                bool flip, uint8_t* out, size_t out_stride) {
  const auto num_outputs = static_cast<size_t>(weights.num_outputs);
  for (size_t x = 0; x < num_outputs; x += 2 * kWindowOutputs) {
    int32x4_t low[kPlanes], high[kPlanes];
    sum_outputs<kPlanes>(weights, x, in, in_stride, low);
    sum_outputs<kPlanes>(weights, x + kWindowOutputs, in, in_stride, high);
    for (size_t p = 0; p < kPlanes; ++p) {
      uint8_t* const plane = out + p * out_stride;
      const size_t left = num_outputs - x;
      uint8x8_t bytes = to_bytes(low[p], high[p]);
      if (flip) bytes = vrev64_u8(bytes);
      if (left >= 8) {
        vst1_u8(plane + (flip ? left - 8 : x), bytes);
      } else {  // behind them are the next plane's first outputs
        uint8_t some[8];
        vst1_u8(some, bytes);
        std::memcpy(plane + (flip ? 0 : x), some + (flip ? 8 - left : 0), left);
      }
    }
  }
}

// A weight, of 24 bits, is high * 2^8 + low: 16-bit factors, eight columns at a time.
void vertical_plane(const AxisWeights& weights, int i, const uint8_t* const* rows, size_t first,
                    size_t width, uint8_t* out) {
  for (size_t begin = 0; begin < width; begin += 16) {
    // The last vector may overlap the one before.
    const size_t x = begin + 16 > width ? width - 16 : begin;
    int32x4_t high[4], low[4];
    for (int q = 0; q < 4; ++q) {
      high[q] = vdupq_n_s32(kHalf >> 8);
      low[q] = vdupq_n_s32(0);
    }
    const int32_t* weight = weights.weights + i;
    for (int k = 0; k < weights.num_taps[i]; ++k, weight += weights.stride) {
      const uint8x16_t row = vld1q_u8(rows[k] + first + x);
      const int16x8_t left = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(row)));
      const int16x8_t right = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(row)));
      const int16x4_t columns[4] = {vget_low_s16(left), vget_high_s16(left), vget_low_s16(right),
                                    vget_high_s16(right)};
      const auto high_weight = static_cast<int16_t>(*weight >> 8);
      const auto low_weight = static_cast<int16_t>(*weight & 255);
      for (int q = 0; q < 4; ++q) {
        high[q] = vmlal_n_s16(high[q], columns[q], high_weight);
        low[q] = vmlal_n_s16(low[q], columns[q], low_weight);
      }
    }
    int32x4_t sums[4];
    for (int q = 0; q < 4; ++q) {
      sums[q] = vshrq_n_s32(vaddq_s32(vshlq_n_s32(high[q], 8), low[q]), kWeightBits);
    }
    vst1q_u8(out + x, vcombine_u8(to_bytes(sums[0], sums[1]), to_bytes(sums[2], sums[3])));
  }
}

void vertical(const AxisWeights& weights, const void*, int i, const uint8_t* const* rows,
              const Columns& columns, uint8_t* out, size_t out_stride) {
  for (size_t p = 0; p < static_cast<size_t>(columns.num_planes); ++p) {
    vertical_plane(weights, i, rows, columns.first + p * columns.width, columns.width,
                   out + p * out_stride);
  }
}

}  // namespace

const ResizeKernels kResizeNeon = {windows_suffice, no_plan_bytes, no_plan, horizontal<1>,
                                   horizontal<3>,   no_plan_bytes, no_plan, vertical};

}  // namespace imseq
