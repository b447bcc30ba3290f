// Converts component samples to RGB: chroma upsampling and colour conversion as in libjpeg-turbo.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace imseq {

// Doubles the width with a triangle filter (jdsample.c, h2v1_fancy_upsample). Writes two pixels for
// each of the samples [begin, end) of a row, which is `width` samples long, to out[0 ...]. Also
// reads in[begin - 1] and in[end] if they exist.
void upsample_h2v1(const uint8_t* in, int begin, int end, int width, uint8_t* out);

// The same from two rows, of which the nearer weighs three times the farther (h2v2_fancy_upsample).
// sums: scratch for end - begin + 2 values.
void upsample_h2v2(const uint8_t* near, const uint8_t* far, int begin, int end, int width,
                   uint16_t* sums, uint8_t* out);

// Doubles the height only (h1v2_fancy_upsample). below: the pixel row is the lower one of the
// sample's two.
void upsample_h1v2(const uint8_t* near, const uint8_t* far, bool below, int n, uint8_t* out);

// Repeats each sample `factor` times (int_upsample).
void replicate(const uint8_t* in, int n, int factor, uint8_t* out);

// Converts n pixels of YCbCr to RGB (jdcolor.c, ycc_rgb_convert; T.871 section 7, 16 fractional
// bits).
void ycc_to_rgb(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int n, uint8_t* r,
                uint8_t* g, uint8_t* b);

// The functions above, for one CpuLevel. Kernels may also read kRowSlack bytes behind the end of
// every input and write as many behind the end of every output.
struct ColourKernels {
  decltype(&imseq::upsample_h2v1) upsample_h2v1;
  decltype(&imseq::upsample_h2v2) upsample_h2v2;
  decltype(&imseq::upsample_h1v2) upsample_h1v2;
  decltype(&imseq::replicate) replicate;
  decltype(&imseq::ycc_to_rgb) ycc_to_rgb;
};

[[nodiscard]] const ColourKernels& colour_kernels(CpuLevel level);

extern const ColourKernels kColourAvx2, kColourAvx512, kColourNeon;

}  // namespace imseq
