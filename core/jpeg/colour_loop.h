// The functions of colour.h written with vectors. Included only by colour_*.cpp, each of which is
// compiled for one kind of processor.
#pragma once

#include "cpu/vectors.h"
#include "jpeg/colour.h"

namespace imseq {

namespace {

// Doubles a row: each pixel is 3/4 of its own value and 1/4 of the nearer neighbour's. Values are
// samples, or sums of two rows: vector_at(i) gives kWords of them from the i-th on, value_at(i) the
// i-th. The last step writes up to 2 * kWords - 2 pixels too many.
template <int kLeftBias, int kRightBias, int kShift, typename VectorAt, typename ValueAt>
inline void double_width(const VectorAt& vector_at, const ValueAt& value_at, int begin, int end,
                         int width, uint8_t* out) {
  const int first = begin == 0 ? 1 : begin, last = end == width ? width - 1 : end;
  for (int i = first; i < last; i += kWords) {
    const Words own = vector_at(i), own3 = add(add(own, own), own);
    const Words left = add(add(own3, words(kLeftBias)), vector_at(i - 1));
    const Words right = add(add(own3, words(kRightBias)), vector_at(i + 1));
    store(out + 2 * (i - begin), interleave_shifted<kShift>(left, right));
  }
  // An outermost pixel's missing neighbour is the sample itself.
  if (begin == 0) {
    out[0] = static_cast<uint8_t>((4 * value_at(0) + kLeftBias) >> kShift);
    out[1] = static_cast<uint8_t>((3 * value_at(0) + value_at(1) + kRightBias) >> kShift);
  }
  if (end == width) {
    const int own = value_at(width - 1);
    uint8_t* const pixel = out + 2 * (width - 1 - begin);
    pixel[0] = static_cast<uint8_t>((3 * own + value_at(width - 2) + kLeftBias) >> kShift);
    pixel[1] = static_cast<uint8_t>((4 * own + kRightBias) >> kShift);
  }
}

void upsample_h2v1_loop(const uint8_t* in, int begin, int end, int width, uint8_t* out) {
  const auto vector_at = [&](int i) { return load_words(in + i); };
  const auto value_at = [&](int i) -> int { return in[i]; };
  double_width<1, 2, 2>(vector_at, value_at, begin, end, width, out);
}

void upsample_h2v2_loop(const uint8_t* near, const uint8_t* far, int begin, int end, int width,
                        uint16_t* /*sums*/, uint8_t* out) {
  const auto vector_at = [&](int i) {
    const Words own = load_words(near + i);
    return add(add(add(own, own), own), load_words(far + i));
  };
  const auto value_at = [&](int i) { return 3 * near[i] + far[i]; };
  double_width<8, 7, 4>(vector_at, value_at, begin, end, width, out);
}

struct Rgb {
  Words red, green, blue;
};

// u = Cb - 128, v = Cr - 128. Red and blue need one product each, and 14 bits of 1.402 and 1.772
// give the same as jdcolor.c's 16 for all 256 values (colour_test.cpp tries them). Green's two
// factors are even, so halving them to fit 16 bits is exact.
inline Rgb to_rgb(Words y, Words u, Words v) {
  return {add(y, scaled(add(v, v), 22970)), add(y, scaled_sum<-22554 / 2, -46802 / 2>(u, v)),
          add(y, scaled(add(u, u), 29033))};
}

void ycc_to_rgb_loop(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int n, uint8_t* r,
                     uint8_t* g, uint8_t* b) {
  const Words centre = words(128);
  for (int i = 0; i < n; i += 2 * kWords) {
    const Bytes ys = load(y + i), cbs = load(cb + i), crs = load(cr + i);
    const Rgb first = to_rgb(first_half(ys), subtract(first_half(cbs), centre),
                             subtract(first_half(crs), centre));
    const Rgb second = to_rgb(second_half(ys), subtract(second_half(cbs), centre),
                              subtract(second_half(crs), centre));
    store(r + i, pack(first.red, second.red));
    store(g + i, pack(first.green, second.green));
    store(b + i, pack(first.blue, second.blue));
  }
}

constexpr ColourKernels kVectorKernels = {upsample_h2v1_loop, upsample_h2v2_loop, upsample_h1v2,
                                          replicate, ycc_to_rgb_loop};

}  // namespace

}  // namespace imseq
