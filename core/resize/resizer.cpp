#include "resize/resizer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace imseq {

namespace {

constexpr int kHalf = 1 << (kWeightBits - 1);

// The filters of Resample.c, in its order of operations but without branches, so that compilers can
// compute several weights at a time.
struct Box {
  static constexpr double kSupport = 0.5;
  static double weight(double x) { return ((x > -0.5) & (x <= 0.5)) ? 1.0 : 0.0; }
};

struct Bilinear {
  static constexpr double kSupport = 1.0;
  static double weight(double x) {
    const double value = 1.0 - std::fabs(x);
    return value > 0.0 ? value : 0.0;
  }
};

struct Bicubic {
  static constexpr double kSupport = 2.0;
  static double weight(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    const double inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    const double outer = (((x - 5) * x + 8) * x - 4) * a;
    return x < 1.0 ? inner : x < 2.0 ? outer : 0.0;
  }
};

// ---- portable kernels ---------------------------------------------------------------------------

// 10 bits are left; saying so lets compilers clamp 16-bit vectors, which all x86-64 can.
inline uint8_t to_byte(int32_t sum) {
  const auto value = static_cast<int16_t>(sum >> kWeightBits);
  return static_cast<uint8_t>(std::clamp(static_cast<int>(value), 0, 255));
}

bool always(const AxisWeights&) { return true; }
size_t no_plan_bytes(const AxisWeights&) { return 0; }
void no_plan(const AxisWeights&, void*) {}

constexpr int kStrip = 64;  // outputs of the horizontal pass that are rounded to bytes at a time

// Three planes of a row, or one; weights and places serve them all. kTaps: the number of taps of
// every output, missing ones having weight zero; 0: each output has its own.
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
void horizontal_pass_of(const AxisWeights& weights, const uint8_t* in, size_t in_stride, bool flip,
                        uint8_t* out, size_t out_stride) {
  switch (weights.max_taps) {
    case 2:
      return horizontal_pass<kPlanes, 2>(weights, in, in_stride, flip, out, out_stride);
    case 3:
      return horizontal_pass<kPlanes, 3>(weights, in, in_stride, flip, out, out_stride);
    case 4:
      return horizontal_pass<kPlanes, 4>(weights, in, in_stride, flip, out, out_stride);
    case 5:
      return horizontal_pass<kPlanes, 5>(weights, in, in_stride, flip, out, out_stride);
    default:
      return horizontal_pass<kPlanes, 0>(weights, in, in_stride, flip, out, out_stride);
  }
}

void portable_horizontal(const AxisWeights& weights, const void*, const uint8_t* in,
                         size_t in_stride, int num_planes, bool flip, uint8_t* out,
                         size_t out_stride) {
  if (num_planes == 1) {
    horizontal_pass_of<1>(weights, in, in_stride, flip, out, out_stride);
  } else {
    horizontal_pass_of<3>(weights, in, in_stride, flip, out, out_stride);
  }
}

// A weight is below 2 and so has 24 bits. It is taken apart into two 16-bit numbers, which
// compilers for baseline x86-64 multiply eight at a time (32-bit multiplication of vectors came
// with SSE4.1).
void portable_vertical(const AxisWeights& weights, const void*, int i, const uint8_t* const* rows,
                       const Columns& columns, uint8_t* out, size_t out_stride) {
  constexpr size_t kColumns = 16;  // at a time, their sums in registers
  for (size_t p = 0; p < static_cast<size_t>(columns.num_planes); ++p) {
    uint8_t* __restrict plane = out + p * out_stride;
    for (size_t begin = 0; begin < columns.width; begin += kColumns) {
      // The last ones may do again some of what was done before.
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

const ResizeKernels& resize_kernels(CpuLevel level) {
  switch (level) {
#if defined(__x86_64__)
    case CpuLevel::kAvx512:
      return avx512_resize_kernels();
    case CpuLevel::kAvx2:
      return avx2_resize_kernels();
#elif defined(__aarch64__)
    case CpuLevel::kNeon:
      return neon_resize_kernels();
#endif
    default:
      return portable_resize_kernels();
  }
}

}  // namespace

const ResizeKernels& portable_resize_kernels() {
  static constexpr ResizeKernels kernels{
      always,        no_plan_bytes, no_plan,          portable_horizontal,
      no_plan_bytes, no_plan,       portable_vertical};
  return kernels;
}

// ---- weights ------------------------------------------------------------------------------------

// precompute_coeffs of Resample.c for a box that is the whole input.
void ResizeWeights::compute(int in_size, int out_size, int begin, int end, int filter) {
  identity_ = in_size == out_size;
  first_input_ = begin;
  end_input_ = end;
  axis_.num_outputs = end - begin;
  if (identity_) return;
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = std::max(scale, 1.0);
  const double inverse = 1.0 / filter_scale;
  axis_.stride = round_up(static_cast<size_t>(axis_.num_outputs), AxisWeights::kOutputGroup);
  const auto compute_with = [&]<typename Filter>(Filter) {
    const double support = Filter::kSupport * filter_scale;
    find_taps(in_size, scale, support, begin);
    compute_weights<Filter>(inverse);
  };
  if (filter == IMSEQ_FILTER_BOX) return compute_with(Box());
  if (filter == IMSEQ_FILTER_BICUBIC) return compute_with(Bicubic());
  compute_with(Bilinear());
}

void ResizeWeights::find_taps(int in_size, double scale, double support, int begin) {
  const size_t padded = axis_.stride;
  grow(&first_taps_, padded);
  grow(&num_taps_, padded);
  grow(&centers_, padded);
  int max_taps = 1;
  const auto num_outputs = static_cast<size_t>(axis_.num_outputs);
  for (size_t i = 0; i < num_outputs; ++i) {
    const double center = (begin + static_cast<int>(i) + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int last = std::min(static_cast<int>(center + support + 0.5), in_size);
    centers_[i] = center;
    first_taps_[i] = first;
    num_taps_[i] = last - first;
    max_taps = std::max(max_taps, last - first);
  }
  const size_t last = num_outputs - 1;
  first_input_ = first_taps_[0];
  end_input_ = first_taps_[last] + num_taps_[last];
  for (size_t i = 0; i < num_outputs; ++i) first_taps_[i] -= first_input_;
  std::fill(first_taps_.begin() + num_outputs, first_taps_.begin() + padded, first_taps_[last]);
  std::fill(num_taps_.begin() + num_outputs, num_taps_.begin() + padded, 0);
  std::fill(centers_.begin() + num_outputs, centers_.begin() + padded, 0.0);
  axis_.max_taps = max_taps;
  axis_.first_taps = first_taps_.data();
  axis_.num_taps = num_taps_.data();
}

// Tap by tap, all outputs at once; each output's total still adds up in the order of its taps.
template <typename Filter>
void ResizeWeights::compute_weights(double inverse) {
  const size_t n = axis_.stride;
  const auto max_taps = static_cast<size_t>(axis_.max_taps);
  const size_t padded_taps = round_up(max_taps, AxisWeights::kTapGroup);
  grow(&taps_, n * max_taps);
  grow(&totals_, n);
  grow(&weights_, n * padded_taps);
  const int32_t* __restrict first_taps = first_taps_.data();
  const int32_t* __restrict num_taps = num_taps_.data();
  const double* __restrict centers = centers_.data();
  double* __restrict totals = totals_.data();
  std::fill_n(totals, n, 0.0);
  for (int k = 0; k < axis_.max_taps; ++k) {
    double* __restrict taps = taps_.data() + static_cast<size_t>(k) * n;
    const int place = k + first_input_;
    for (size_t i = 0; i < n; ++i) {
      const double value = Filter::weight((place + first_taps[i] - centers[i] + 0.5) * inverse);
      taps[i] = k < num_taps[i] ? value : 0.0;
      totals[i] += taps[i];
    }
  }
  // Pillow leaves weights alone that add up to nothing; dividing by one does the same.
  for (size_t i = 0; i < n; ++i) totals[i] = totals[i] == 0.0 ? 1.0 : totals[i];
  // normalize_coeffs_8bpc.
  for (size_t k = 0; k < max_taps; ++k) {
    const double* __restrict taps = taps_.data() + k * n;
    int32_t* __restrict weights = weights_.data() + k * n;
    for (size_t i = 0; i < n; ++i) {
      const double scaled = taps[i] / totals[i] * (1 << kWeightBits);
      weights[i] = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5));
    }
  }
  std::fill_n(weights_.begin() + static_cast<ptrdiff_t>(n * max_taps), n * (padded_taps - max_taps),
              0);
  axis_.weights = weights_.data();
}

// ---- Resizer ------------------------------------------------------------------------------------

void Resizer::begin(const imseq_view& view, int out_height, int out_width, int num_planes,
                    int filter, int passes) {
  kernels_ = &resize_kernels(cpu_level());
  num_planes_ = num_planes;
  out_height_ = out_height;
  out_width_ = out_width;
  first_row_ = std::clamp(-view.window_top, 0, out_height);
  end_row_ = std::clamp(view.resized_height - view.window_top, first_row_, out_height);
  first_column_ = std::clamp(-view.window_left, 0, out_width);
  end_column_ = std::clamp(view.resized_width - view.window_left, first_column_, out_width);
  source_ = Region{};
  num_added_ = 0;
  flips_ = can_write_rows_ = false;
  zeros_.reserve(static_cast<size_t>(out_width) + kRowSlack);
  if (first_row_ == end_row_ || first_column_ == end_column_) {
    first_row_ = end_row_ = 0;
    num_ready_ = out_height;
    return;
  }
  num_ready_ = first_row_;
  vertical_.compute(view.height, view.resized_height, view.window_top + first_row_,
                    view.window_top + end_row_, filter);
  horizontal_.compute(view.width, view.resized_width, view.window_left + first_column_,
                      view.window_left + end_column_, filter);
  source_ = {view.top + vertical_.first_input(), view.left + horizontal_.first_input(),
             vertical_.end_input() - vertical_.first_input(),
             horizontal_.end_input() - horizontal_.first_input()};
  const int lost_height = view.height - view.resized_height;
  const int lost_width = view.width - view.resized_width;
  vertical_first_ =
      passes == IMSEQ_PASSES_PILLOW_13 && lost_height > 0 && lost_height > 2 * lost_width;
  flips_ = view.flip != 0 && !horizontal_.identity();
  // Where the vertical pass has nothing to do it is the last one.
  can_write_rows_ = end_row_ - first_row_ == out_height &&
                    end_column_ - first_column_ == out_width &&
                    static_cast<size_t>(out_width) >= Columns::kMinWidth && !vertical_.identity();
  lay_out_rows();
  make_plans();
}

void Resizer::lay_out_rows() {
  const auto planes = static_cast<size_t>(num_planes_);
  // A window of 64 bytes that starts at the last input, and what pads a group of taps before it.
  constexpr size_t kBehind = kRowSlack + AxisWeights::kTapGroup;
  source_stride_ = round_up(static_cast<size_t>(source_.width) + kRowSlack, 64);
  resized_stride_ = static_cast<size_t>(end_column_ - first_column_);
  row_bytes_ = round_up(planes * (stores_source_rows() ? source_stride_ : resized_stride_), 64);
  ring_rows_ = std::bit_ceil(static_cast<unsigned>(vertical_.max_taps()));
  rows_.reserve(row_bytes_ * static_cast<size_t>(ring_rows_) + kBehind);
  row_.reserve(planes * source_stride_ + kBehind);
  output_.reserve(planes * std::max(source_stride_, resized_stride_) + 64 + kBehind);
  padded_.reserve(planes * static_cast<size_t>(out_width_) + kRowSlack);
  grow(&tap_rows_, static_cast<size_t>(ring_rows_) + AxisWeights::kTapGroup);
}

void Resizer::make_plans() {
  if (!vertical_.identity()) {
    const AxisWeights& axis = vertical_.axis();
    kernels_->plan_vertically(axis, vertical_plan_.reserve(kernels_->vertical_plan_bytes(axis)));
  }
  if (!horizontal_.identity()) {
    const AxisWeights& axis = horizontal_.axis();
    horizontal_kernels_ =
        kernels_->can_resize_horizontally(axis) ? kernels_ : &portable_resize_kernels();
    const size_t bytes = horizontal_kernels_->horizontal_plan_bytes(axis);
    horizontal_kernels_->plan_horizontally(axis, horizontal_plan_.reserve(bytes));
  }
}

std::array<uint8_t*, 3> Resizer::source_planes() {
  uint8_t* first = stores_source_rows() ? stored_row(num_added_) : row_.data();
  return {first, first + source_stride_, first + 2 * source_stride_};
}

void Resizer::add_row() {
  if (!stores_source_rows()) {
    resize_horizontally(row_.data(), stored_row(num_added_), resized_stride_);
  }
  ++num_added_;
  const auto is_ready = [this](int y) {
    const int i = y - first_row_;
    return vertical_.first_tap(i) + vertical_.num_taps(i) <= num_added_;
  };
  while (num_ready_ < end_row_ && is_ready(num_ready_)) ++num_ready_;
  if (num_ready_ == end_row_) num_ready_ = out_height_;
}

void Resizer::resize_horizontally(const uint8_t* in, uint8_t* out, size_t out_stride) const {
  horizontal_kernels_->horizontal(horizontal_.axis(), horizontal_plan_.data(), in, source_stride_,
                                  num_planes_, flips_, out, out_stride);
}

void Resizer::resize_vertically(int i, uint8_t* out, size_t out_stride) {
  const int first = vertical_.first_tap(i);
  const auto num_taps = static_cast<size_t>(vertical_.num_taps(i));
  size_t tap = 0;
  for (; tap < num_taps; ++tap) tap_rows_[tap] = stored_row(first + static_cast<int>(tap));
  for (; tap % AxisWeights::kTapGroup != 0; ++tap) tap_rows_[tap] = tap_rows_[0];
  const auto resize_columns = [&](const Columns& columns, uint8_t* to) {
    kernels_->vertical(vertical_.axis(), vertical_plan_.data(), i, tap_rows_.data(), columns, to,
                       out_stride);
  };
  const auto num_planes = static_cast<size_t>(num_planes_);
  if (stores_source_rows()) {
    const size_t width = std::max(static_cast<size_t>(source_.width), Columns::kMinWidth);
    for (size_t p = 0; p < num_planes; ++p) {
      resize_columns({p * source_stride_, width, 1}, out + p * out_stride);
    }
  } else if (out_stride == resized_stride_) {  // all planes are one
    resize_columns({0, std::max(num_planes * resized_stride_, Columns::kMinWidth), 1}, out);
  } else {
    resize_columns({0, resized_stride_, num_planes_}, out);
  }
}

void Resizer::write_row(int y, uint8_t* out, size_t out_stride) {
  const int i = y - first_row_;
  if (!vertical_first_ || horizontal_.identity()) return resize_vertically(i, out, out_stride);
  resize_vertically(i, row_.data(), source_stride_);
  resize_horizontally(row_.data(), out, out_stride);
}

std::array<const uint8_t*, 3> Resizer::output_row(int y) {
  if (y < first_row_ || y >= end_row_) return {zeros_.data(), zeros_.data(), zeros_.data()};
  const size_t stride = horizontal_.identity() ? source_stride_ : resized_stride_;
  const uint8_t* row = output_.data();
  if (vertical_.identity()) {
    row = stored_row(vertical_.first_tap(y - first_row_));
  } else {
    write_row(y, output_.data(), stride);
  }
  std::array<const uint8_t*, 3> planes{};
  for (size_t p = 0; p < static_cast<size_t>(num_planes_); ++p) {
    planes[p] = row + p * stride;
    if (end_column_ - first_column_ != out_width_) planes[p] = padded(planes[p], p);
  }
  return planes;
}

const uint8_t* Resizer::padded(const uint8_t* row, size_t plane) {
  const auto width = static_cast<size_t>(end_column_ - first_column_);
  const auto before = static_cast<size_t>(flips_ ? out_width_ - end_column_ : first_column_);
  const auto out_width = static_cast<size_t>(out_width_);
  uint8_t* out = padded_.data() + plane * out_width;
  std::memset(out, 0, before);
  std::memcpy(out + before, row, width);
  std::memset(out + before + width, 0, out_width - before - width);
  return out;
}

}  // namespace imseq
