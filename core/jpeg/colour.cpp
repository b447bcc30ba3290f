#include "jpeg/colour.h"

#include <algorithm>
#include <cstring>

namespace imseq {

namespace {

// Doubles a row of n values that have neighbours on both sides; T: samples, or sums of two rows.
// Each pixel is 3/4 of its own value and 1/4 of the nearer neighbour's. Left and right pixels have
// different biases so that rounding errors cancel out.
template <typename T>
inline void double_width(const T* __restrict in, int n, int left_bias, int right_bias, int shift,
                         uint8_t* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const int own = 3 * in[i];
    out[2 * i] = static_cast<uint8_t>((own + in[i - 1] + left_bias) >> shift);
    out[2 * i + 1] = static_cast<uint8_t>((own + in[i + 1] + right_bias) >> shift);
  }
}

inline uint8_t clamp_sample(int16_t value) {
  return static_cast<uint8_t>(std::clamp<int16_t>(value, 0, 255));
}

}  // namespace

void upsample_h2v1(const uint8_t* in, int begin, int end, int width, uint8_t* out) {
  // The outermost pixels of the image are their samples.
  const int first = std::max(begin, 1), last = std::min(end, width - 1);
  if (begin == 0) {
    out[0] = in[0];
    out[1] = static_cast<uint8_t>((3 * in[0] + in[1] + 2) >> 2);
  }
  double_width(in + first, last - first, 1, 2, 2, out + 2 * (first - begin));
  if (end == width) {
    uint8_t* pixel = out + 2 * (width - 1 - begin);
    pixel[0] = static_cast<uint8_t>((3 * in[width - 1] + in[width - 2] + 1) >> 2);
    pixel[1] = in[width - 1];
  }
}

void upsample_h2v2(const uint8_t* __restrict near, const uint8_t* __restrict far, int begin,
                   int end, int width, uint16_t* __restrict sums, uint8_t* out) {
  // An outermost pixel's missing neighbour is the sample itself: 3 s + s = 4 s, as libjpeg-turbo
  // has it.
  const int first = std::max(begin - 1, 0), last = std::min(end + 1, width);
  uint16_t* __restrict row = sums + (first - (begin - 1));
  for (int i = 0; i < last - first; ++i) {
    row[i] = static_cast<uint16_t>(3 * near[first + i] + far[first + i]);
  }
  if (begin == 0) sums[0] = sums[1];
  if (end == width) sums[end - begin + 1] = sums[end - begin];
  double_width(sums + 1, end - begin, 8, 7, 4, out);
}

void upsample_h1v2(const uint8_t* __restrict near, const uint8_t* __restrict far, bool below, int n,
                   uint8_t* __restrict out) {
  const int bias = below ? 2 : 1;
  for (int i = 0; i < n; ++i) out[i] = static_cast<uint8_t>((3 * near[i] + far[i] + bias) >> 2);
}

void replicate(const uint8_t* in, int n, int factor, uint8_t* out) {
  for (int i = 0; i < n; ++i, out += factor) {
    std::memset(out, in[i], static_cast<size_t>(factor));
  }
}

void ycc_to_rgb(const uint8_t* __restrict y, const uint8_t* __restrict cb,
                const uint8_t* __restrict cr, int n, uint8_t* __restrict r, uint8_t* __restrict g,
                uint8_t* __restrict b) {
  // jdcolor.c's factors without their whole parts, so that compilers can use 16-bit multiplication:
  // 1.40200 = 1 + 26345 / 65536, 1.77200 = 2 - 14942 / 65536. Green's factors, 22554 / 65536 and
  // 46802 / 65536, are even, so halving them is exact.
  constexpr int16_t kRed = 26345, kBlue = -14942, kGreenCb = -11277, kGreenCr = -23401;
  const auto rounded_product = [](int16_t factor, int16_t x) {
    return static_cast<int16_t>((((factor * static_cast<int16_t>(2 * x)) >> 16) + 1) >> 1);
  };
  for (int i = 0; i < n; ++i) {
    const auto u = static_cast<int16_t>(cb[i] - 128), v = static_cast<int16_t>(cr[i] - 128);
    const auto green = static_cast<int16_t>((kGreenCb * u + kGreenCr * v + (1 << 14)) >> 15);
    r[i] = clamp_sample(static_cast<int16_t>(y[i] + v + rounded_product(kRed, v)));
    g[i] = clamp_sample(static_cast<int16_t>(y[i] + green));
    b[i] = clamp_sample(static_cast<int16_t>(y[i] + 2 * u + rounded_product(kBlue, u)));
  }
}

const ColourKernels& colour_kernels(CpuLevel level) {
  static constexpr ColourKernels kPortable = {upsample_h2v1, upsample_h2v2, upsample_h1v2,
                                              replicate, ycc_to_rgb};
  return *kernels_of_level<&kPortable, &kColourAvx2, &kColourAvx512, &kColourNeon>(level);
}

}  // namespace imseq
