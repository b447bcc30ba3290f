// Pillow's antialiased resize (libImaging/Resample.c, 8 bits a channel), limited to a window of the
// result.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/memory.h"
#include "imagenet_seq.h"
#include "jpeg/region.h"
#include "resize/kernels.h"
#include "resize/weights.h"

namespace imseq {

// Memory aligned to 64 bytes, which grows to the largest image seen and is kept.
class RowMemory {
 public:
  uint8_t* reserve(size_t bytes) {
    if (lines_.size() * sizeof(Line) < bytes) lines_.resize(divide_up(bytes, sizeof(Line)));
    return data();
  }
  [[nodiscard]] uint8_t* data() { return reinterpret_cast<uint8_t*>(lines_.data()); }
  [[nodiscard]] const uint8_t* data() const {
    return reinterpret_cast<const uint8_t*>(lines_.data());
  }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> lines_;
};

// Resizes one image, row by row:
//
//   resizer.begin(view, out_height, out_width, num_planes, filter, passes);
//   int y = 0;
//   for (row in resizer.source()) {
//     fill resizer.source_planes();
//     resizer.add_row();
//     for (; y < resizer.num_ready(); ++y) use resizer.output_row(y);
//   }
//   for (; y < resizer.num_ready(); ++y) use resizer.output_row(y);  // all, where no row is needed
//
// Use rows that are ready before adding the next one: only as many rows are stored as an output has
// taps, so that they stay in the L1 cache. Reuses its memory.
class Resizer {
 public:
  void begin(const imseq_view& view, int out_height, int out_width, int num_planes, int filter,
             int passes);

  // The part of the image that the output needs; empty where the window lies outside the resized
  // image.
  [[nodiscard]] const Region& source() const { return source_; }
  // Where to write the next row of the source: num_planes rows of source().width bytes, each
  // aligned to 64 bytes; kRowSlack bytes behind each may be overwritten.
  [[nodiscard]] std::array<uint8_t*, 3> source_planes();
  void add_row();
  // Rows [0, num_ready()) of the output can be used; all of them after the last source row.
  [[nodiscard]] int num_ready() const { return num_ready_; }
  // Whether the output is flipped already: the view is, and there is a horizontal pass to do it.
  [[nodiscard]] bool flips() const { return flips_; }
  // The planes of row y of the output: out_width bytes each, zero outside the resized image, and
  // kRowSlack readable bytes. Valid until the next call.
  [[nodiscard]] std::array<const uint8_t*, 3> output_row(int y);
  // Whether write_row() can replace output_row(): there is no padding, and the last pass changes
  // the row.
  [[nodiscard]] bool can_write_rows() const { return can_write_rows_; }
  // Writes row y to its destination, a plane every out_stride bytes, and nothing beside it.
  void write_row(int y, uint8_t* out, size_t out_stride);

 private:
  void lay_out_rows();
  void make_plans();
  [[nodiscard]] bool stores_source_rows() const {
    return vertical_first_ || horizontal_.identity();
  }
  [[nodiscard]] uint8_t* stored_row(int row) {
    return rows_.data() + (static_cast<unsigned>(row) & (ring_rows_ - 1)) * row_bytes_;
  }
  void resize_horizontally(const uint8_t* in, uint8_t* out, size_t out_stride) const;
  // The i-th row that is not padding.
  void resize_vertically(int i, uint8_t* out, size_t out_stride);

  // Adds the zeros beside one plane of an output row.
  const uint8_t* padded(const uint8_t* row, size_t plane);

  const ResizeKernels* kernels_ = nullptr;
  const ResizeKernels* horizontal_kernels_ = nullptr;
  Region source_;
  ResizeWeights horizontal_, vertical_;
  bool vertical_first_ = false;
  bool flips_ = false;
  bool can_write_rows_ = false;
  int num_planes_ = 0;
  int out_height_ = 0, out_width_ = 0;
  int num_added_ = 0, num_ready_ = 0;
  // Output that is not padding.
  int first_row_ = 0, end_row_ = 0, first_column_ = 0, end_column_ = 0;
  size_t source_stride_ = 0;   // bytes from plane to plane of a source row
  size_t resized_stride_ = 0;  // and of a row that has been resized horizontally
  size_t row_bytes_ = 0;       // from stored row to stored row
  unsigned ring_rows_ = 1;     // stored at a time, a power of two
  RowMemory rows_;  // input of the vertical pass: resized rows, or source rows if it comes first
  RowMemory row_;   // one row before the horizontal pass
  RowMemory horizontal_plan_, vertical_plan_, output_, padded_, zeros_;
  std::vector<const uint8_t*> tap_rows_;
};

}  // namespace imseq
