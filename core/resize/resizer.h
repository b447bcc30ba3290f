// Pillow's antialiased resize (libImaging/Resample.c, 8 bits a channel), of a window of the result
// only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/memory.h"
#include "imagenet_seq.h"
#include "jpeg/region.h"

namespace imseq {

// Resample.c: PRECISION_BITS = 32 - 8 - 2.
constexpr int kWeightBits = 22;

// One axis' weights as kernels read them. Output i is the sum of weights[k * stride + i] * input
// first_taps[i] + k over its taps k, which is rounded. Both arrays are padded to whole groups:
// outputs to a multiple of kOutputGroup, repeating the last first tap, taps to one of kTapGroup.
// Every weight that pads is zero.
struct AxisWeights {
  static constexpr int kOutputGroup = 32, kTapGroup = 4;
  int num_outputs = 0;
  int max_taps = 0;  // of any output
  size_t stride = 0;
  const int32_t* first_taps = nullptr;  // never decreasing
  const int32_t* num_taps = nullptr;
  const int32_t* weights = nullptr;  // below 2.0 in magnitude
};

// Columns that the vertical pass resizes, of planes each of which begins where the one before it
// ends. A plane is at least kMinWidth wide, so that kernels need not write behind its end, where
// memory may be another's, to make use of whole vectors.
struct Columns {
  static constexpr size_t kMinWidth = 64;
  size_t first, width;
  int num_planes;
};

// What one CpuLevel resizes with. Rows begin anywhere and may be read kRowSlack bytes behind their
// end; nothing but the outputs is written. A plan holds the weights in the order in which the kernel
// wants them.
struct ResizeKernels {
  // False: the image shrinks so much that the horizontal pass is left to the portable kernel.
  bool (*can_resize_horizontally)(const AxisWeights& weights);
  size_t (*horizontal_plan_bytes)(const AxisWeights& weights);
  void (*plan_horizontally)(const AxisWeights& weights, void* plan);
  // num_planes rows of pixels, one plane every in_stride bytes. flip: the last output comes first.
  void (*horizontal)(const AxisWeights& weights, const void* plan, const uint8_t* in,
                     size_t in_stride, int num_planes, bool flip, uint8_t* out, size_t out_stride);

  size_t (*vertical_plan_bytes)(const AxisWeights& weights);
  void (*plan_vertically)(const AxisWeights& weights, void* plan);
  // Output i. rows: those of its taps, and then any, up to a multiple of AxisWeights::kTapGroup.
  void (*vertical)(const AxisWeights& weights, const void* plan, int i, const uint8_t* const* rows,
                   const Columns& columns, uint8_t* out, size_t out_stride);
};

const ResizeKernels& portable_resize_kernels();
const ResizeKernels& avx2_resize_kernels();
const ResizeKernels& avx512_resize_kernels();
const ResizeKernels& neon_resize_kernels();

// Pillow's weights along one axis for outputs [begin, end) of `out_size`, from an input of
// `in_size`.
class ResizeWeights {
 public:
  void compute(int in_size, int out_size, int begin, int end, int filter);

  // Where the sizes are equal Pillow leaves the axis alone: output i is input begin + i.
  [[nodiscard]] bool identity() const { return identity_; }
  // Inputs [first_input, end_input) are needed. Taps count from first_input.
  [[nodiscard]] int first_input() const { return first_input_; }
  [[nodiscard]] int end_input() const { return end_input_; }
  [[nodiscard]] int first_tap(int i) const {
    return identity_ ? i : first_taps_[static_cast<size_t>(i)];
  }
  [[nodiscard]] int num_taps(int i) const {
    return identity_ ? 1 : num_taps_[static_cast<size_t>(i)];
  }
  [[nodiscard]] int max_taps() const { return identity_ ? 1 : axis_.max_taps; }
  [[nodiscard]] const AxisWeights& axis() const { return axis_; }

 private:
  template <typename Filter>
  void compute_weights(double inverse);
  void find_taps(int in_size, double scale, double support, int begin);

  bool identity_ = false;
  int first_input_ = 0, end_input_ = 0;
  AxisWeights axis_;
  std::vector<int32_t> first_taps_, num_taps_, weights_;
  std::vector<double> taps_, centers_, totals_;
};

// Memory that starts at a multiple of 64 bytes, grows to the largest image seen and stays.
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
// Rows that are ready must be used before the next one is added, because only as many rows are kept
// as an output has taps: they stay in the processor's first cache. Keeps its memory from image to
// image.
class Resizer {
 public:
  void begin(const imseq_view& view, int out_height, int out_width, int num_planes, int filter,
             int passes);

  // The part of the image that the output needs; empty where the window lies outside the resized
  // image.
  [[nodiscard]] const Region& source() const { return source_; }
  // Where to put the next row of the source: num_planes rows of source().width bytes, each at a
  // multiple of 64 bytes and with kRowSlack bytes behind it that may be overwritten.
  [[nodiscard]] std::array<uint8_t*, 3> source_planes();
  void add_row();
  // Rows [0, num_ready()) of the output can be used; all of them once the last source row is there.
  [[nodiscard]] int num_ready() const { return num_ready_; }
  // Whether the output comes out flipped, because the view is and there is a horizontal pass to do
  // it.
  [[nodiscard]] bool flips() const { return flips_; }
  // Planes of row y of the output, out_width bytes each and kRowSlack that may be read, zero
  // outside the resized image; valid until the next call.
  [[nodiscard]] std::array<const uint8_t*, 3> output_row(int y);
  // Whether write_row() can take the place of output_row(): there is no padding, and the last pass
  // has something to do.
  [[nodiscard]] bool can_write_rows() const { return can_write_rows_; }
  // Writes row y, a plane every out_stride bytes, where it is to lie, and nothing beside it.
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

  // One plane of an output row with the zeros beside it.
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
  int first_row_ = 0, end_row_ = 0, first_column_ = 0,
      end_column_ = 0;         // output that is not padding
  size_t source_stride_ = 0;   // bytes from plane to plane of a source row
  size_t resized_stride_ = 0;  // and of a row that has been resized horizontally
  size_t row_bytes_ = 0;       // from stored row to stored row
  unsigned ring_rows_ = 1;     // stored at a time, a power of two
  RowMemory rows_;  // what the vertical pass reads: resized rows; source rows where it is the first
  RowMemory row_;   // one source row on its way to or from there
  RowMemory horizontal_plan_, vertical_plan_, output_, padded_, zeros_;
  std::vector<const uint8_t*> tap_rows_;
};

}  // namespace imseq
