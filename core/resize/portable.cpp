// The resize in plain C++: the reference.
#include <algorithm>
#include <cstring>

#include "resize/kernels.h"

namespace imseq {

namespace {

constexpr int kHalf = 1 << (kWeightBits - 1);

// After the shift 10 bits are left; the cast makes compilers clamp 16-bit vectors, as SSE2 can.
inline uint8_t to_byte(int32_t sum) {
  const auto value = static_cast<int16_t>(sum >> kWeightBits);
  return static_cast<uint8_t>(std::clamp(static_cast<int>(value), 0, 255));
}

bool always(const AxisWeights&) { return true; }

constexpr int kStrip = 64;  // outputs of the horizontal pass that are rounded to bytes at a time

// Resizes three planes of a row, or one. kTaps: the number of taps of every output, missing ones
// having weight zero; 0: each output has its own number.
template <int kPlanes, int kTaps>
void horizontal_pass(const AxisWeights& weights, const uint8_t* __restrict in, size_t in_stride,
                     bool flip, uint8_t* __restrict out, size_t out_stride) {
  const uint8_t* const planes[3] = {in, in + in_stride, in + 2 * in_stride};
  int32_t sums[kPlanes][kStrip];
  for (int begin = 0; begin < weights.num_outputs; begin += kStrip) {
    const int n = std::min(kStrip, weights.num_outputs - begin);
    for (int i = 0; i < n; ++i) {
      const int first = weights.first_taps[begin + i];
      const int num_taps = kTaps == 0 ? weights.num_taps[begin + i] : kTaps;
      const int32_t* __restrict w = weights.weights + begin + i;
      for (int p = 0; p < kPlanes; ++p) sums[p][i] = kHalf;
      for (int k = 0; k < num_taps; ++k, w += weights.stride) {
        for (int p = 0; p < kPlanes; ++p) sums[p][i] += *w * planes[p][first + k];
      }
    }
    for (size_t p = 0; p < kPlanes; ++p) {
      uint8_t* __restrict bytes = out + p * out_stride + begin;
      for (int i = 0; i < n; ++i) bytes[i] = to_byte(sums[p][i]);
    }
  }
  if (!flip) return;
  for (size_t p = 0; p < kPlanes; ++p) {
    std::reverse(out + p * out_stride, out + p * out_stride + weights.num_outputs);
  }
}

template <int kPlanes>
void horizontal(const AxisWeights& weights, const void*, const uint8_t* in, size_t in_stride,
                bool flip, uint8_t* out, size_t out_stride) {
  const auto pass = weights.max_taps == 2   ? horizontal_pass<kPlanes, 2>
                    : weights.max_taps == 3 ? horizontal_pass<kPlanes, 3>
                    : weights.max_taps == 4 ? horizontal_pass<kPlanes, 4>
                    : weights.max_taps == 5 ? horizontal_pass<kPlanes, 5>
                                            : horizontal_pass<kPlanes, 0>;
  pass(weights, in, in_stride, flip, out, out_stride);
}

// Each weight, of 24 bits, is split into two 16-bit numbers, because baseline x86-64 has no 32-bit
// multiplication of vectors.
void vertical(const AxisWeights& weights, const void*, int i, const uint8_t* const* rows,
              const Columns& columns, uint8_t* out, size_t out_stride) {
  constexpr size_t kColumns = 16;  // at a time, their sums in registers
  for (size_t p = 0; p < static_cast<size_t>(columns.num_planes); ++p) {
    uint8_t* __restrict plane = out + p * out_stride;
    for (size_t begin = 0; begin < columns.width; begin += kColumns) {
      // The last ones may overlap the ones before.
      const size_t x = std::min(begin, columns.width - kColumns);
      int32_t sums[kColumns];
      for (int32_t& sum : sums) sum = kHalf;
      const int32_t* weight = weights.weights + i;
      for (int k = 0; k < weights.num_taps[i]; ++k, weight += weights.stride) {
        const uint8_t* __restrict row = rows[k] + columns.first + p * columns.width + x;
        const auto high = static_cast<int16_t>(*weight >> 8);
        const auto low = static_cast<int16_t>(*weight & 255);
        for (size_t j = 0; j < kColumns; ++j) {
          const int16_t value = row[j];
          sums[j] += high * value * 256 + low * value;
        }
      }
      for (size_t j = 0; j < kColumns; ++j) plane[x + j] = to_byte(sums[j]);
    }
  }
}

}  // namespace

size_t no_plan_bytes(const AxisWeights&) { return 0; }
void no_plan(const AxisWeights&, void*) {}

bool windows_suffice(const AxisWeights& weights) {
  for (size_t i = 0; i < weights.stride; i += kWindowOutputs) {
    const int32_t* first = weights.first_taps + i;
    if (first[kWindowOutputs - 1] - first[0] + AxisWeights::kTapGroup > 16) return false;
  }
  return true;
}

const ResizeKernels kResizePortable = {always,        no_plan_bytes, no_plan, horizontal<1>,
                                       horizontal<3>, no_plan_bytes, no_plan, vertical};

}  // namespace imseq
