// Pillow's antialiased resize (libImaging/Resample.c, 8 bits a channel), of a window of the result
// only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "imagenet_seq.h"
#include "region.h"

namespace imseq {

// Pillow's weights along one axis for outputs [begin, end) of `out_size`, from an input of
// `in_size`.
class ResizeWeights {
 public:
  void compute(int in_size, int out_size, int begin, int end, int filter);

  // Where the sizes are equal Pillow leaves the axis alone: output i is input i.
  [[nodiscard]] bool identity() const { return identity_; }
  // Inputs [first_input, end_input) are needed.
  [[nodiscard]] int first_input() const { return first_input_; }
  [[nodiscard]] int end_input() const { return end_input_; }
  // The i-th output, counted from `begin`, takes inputs [first_tap(i), first_tap(i) + num_taps(i)).
  // Its weights have 22 fractional bits; max_taps() of them are stored, those behind the last input
  // zero.
  [[nodiscard]] int first_tap(int i) const { return first_taps_[static_cast<size_t>(i)]; }
  [[nodiscard]] int num_taps(int i) const { return num_taps_[static_cast<size_t>(i)]; }
  [[nodiscard]] int max_taps() const { return max_taps_; }
  [[nodiscard]] const int32_t* weights(int i) const {
    return weights_.data() + static_cast<size_t>(i) * static_cast<size_t>(max_taps_);
  }

 private:
  bool identity_ = false;
  int first_input_ = 0, end_input_ = 0, max_taps_ = 0;
  std::vector<int> first_taps_, num_taps_;
  std::vector<int32_t> weights_;
  std::vector<double> taps_;
};

// Resizes one image, row by row:
//
//   resizer.begin(view, out_height, out_width, num_planes, filter, passes);
//   for (y in resizer.source()) { fill resizer.source_planes(y); resizer.add_row(y); }
//   for (y in 0 ... out_height) use resizer.output_row(y);
//
// Keeps its memory from image to image.
class Resizer {
 public:
  void begin(const imseq_view& view, int out_height, int out_width, int num_planes, int filter,
             int passes);

  // The part of the image that the output needs; empty where the window lies outside the resized
  // image.
  [[nodiscard]] const Region& source() const { return source_; }
  // Where to put row y of the image: num_planes rows of source().width bytes.
  [[nodiscard]] std::array<uint8_t*, 3> source_planes(int y);
  void add_row(int y);
  // Planes of row y of the output, out_width bytes each, zero outside the resized image; valid
  // until the next call.
  [[nodiscard]] std::array<const uint8_t*, 3> output_row(int y);

 private:
  [[nodiscard]] uint8_t* stored_row(int row) {
    return rows_.data() + static_cast<size_t>(row) * row_bytes_;
  }
  void resize_horizontally(const uint8_t* in, uint8_t* out) const;
  // The i-th row that is not padding: written to out, or the stored row where there is nothing to
  // do.
  const uint8_t* resize_vertically(int i, uint8_t* out);

  Region source_;
  ResizeWeights horizontal_, vertical_;
  bool vertical_first_ = false;
  int num_planes_ = 0;
  int out_width_ = 0;
  int first_row_ = 0, end_row_ = 0, first_column_ = 0,
      end_column_ = 0;         // output that is not padding
  size_t source_stride_ = 0;   // bytes from plane to plane of a source row
  size_t resized_stride_ = 0;  // and of a row that has been resized horizontally
  size_t row_bytes_ = 0;       // from stored row to stored row
  std::vector<uint8_t>
      rows_;  // what the vertical pass reads: resized rows; source rows where it is the first
  std::vector<uint8_t> row_;  // one source row on its way to or from there
  std::vector<uint8_t> output_, padded_, zeros_;
};

}  // namespace imseq
