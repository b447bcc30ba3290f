// The kernels of the resize's two passes, a set for each CpuLevel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cpu.h"
#include "resize/weights.h"

namespace imseq {

// The columns that the vertical pass resizes, of planes that follow each other without a gap. A
// plane is at least kMinWidth wide, so that kernels use whole vectors without writing behind its
// end.
struct Columns {
  static constexpr size_t kMinWidth = 64;
  size_t first, width;
  int num_planes;
};

// Rows begin anywhere and may be read kRowSlack bytes behind their end; only outputs are written. A
// plan holds the weights in the order in which a kernel reads them.
struct ResizeKernels {
  // False: the image shrinks so much that the portable kernel must do the horizontal pass.
  bool (*can_resize_horizontally)(const AxisWeights& weights);
  size_t (*horizontal_plan_bytes)(const AxisWeights& weights);
  void (*plan_horizontally)(const AxisWeights& weights, void* plan);
  // A row of one plane, and of three, a plane every in_stride bytes. flip: the last output comes
  // first.
  using Horizontal = void (*)(const AxisWeights& weights, const void* plan, const uint8_t* in,
                              size_t in_stride, bool flip, uint8_t* out, size_t out_stride);
  Horizontal horizontal_of_one, horizontal_of_three;

  size_t (*vertical_plan_bytes)(const AxisWeights& weights);
  void (*plan_vertically)(const AxisWeights& weights, void* plan);
  // Output i. rows: those of its taps, and then any, up to a multiple of AxisWeights::kTapGroup.
  void (*vertical)(const AxisWeights& weights, const void* plan, int i, const uint8_t* const* rows,
                   const Columns& columns, uint8_t* out, size_t out_stride);
};

extern const ResizeKernels kResizePortable, kResizeAvx2, kResizeAvx512, kResizeNeon;

// For kernels that need no plan.
size_t no_plan_bytes(const AxisWeights& weights);
void no_plan(const AxisWeights& weights, void* plan);

// Whether the pixels of four taps of each kWindowOutputs outputs lie in a window of 16 bytes.
constexpr size_t kWindowOutputs = 4;
[[nodiscard]] bool windows_suffice(const AxisWeights& weights);

}  // namespace imseq
