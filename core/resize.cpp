#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace imseq {

namespace {

// Resample.c: PRECISION_BITS = 32 - 8 - 2.
constexpr int kPrecisionBits = 22;
constexpr int kHalf = 1 << (kPrecisionBits - 1);
// Rows may be read this far behind their end: by the last columns of the vertical pass, and with
// weight zero by the few taps of an unrolled horizontal pass.
constexpr size_t kSlack = 64;

// The filters of Resample.c, in its order of operations.
double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

double bilinear(double x) {
  if (x < 0.0) x = -x;
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
  constexpr double a = -0.5;
  if (x < 0.0) x = -x;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

struct Filter {
  double (*function)(double);
  double support;
};

Filter filter_of(int filter) {
  if (filter == IMSEQ_FILTER_BOX) return {box, 0.5};
  if (filter == IMSEQ_FILTER_BICUBIC) return {bicubic, 2.0};
  return {bilinear, 1.0};
}

// normalize_coeffs_8bpc.
int32_t fixed_point(double weight) {
  const double scaled = weight * (1 << kPrecisionBits);
  return static_cast<int32_t>(weight < 0 ? scaled - 0.5 : scaled + 0.5);
}

// 10 bits are left; saying so lets compilers clamp 16-bit vectors, which all x86-64 can.
inline uint8_t to_byte(int32_t sum) {
  const auto value = static_cast<int16_t>(sum >> kPrecisionBits);
  return static_cast<uint8_t>(std::clamp(static_cast<int>(value), 0, 255));
}

template <typename T>
void grow(std::vector<T>* memory, size_t size) {
  if (memory->size() < size) memory->resize(size);
}

constexpr int kStrip = 64;  // outputs of the horizontal pass that are rounded to bytes at a time

// Three planes of a row, or one; weights and places serve them all. kTaps: the number of taps of
// every output, missing ones having weight zero; 0: each output has its own.
template <int kPlanes, int kTaps>
void horizontal_pass(const uint8_t* __restrict in, size_t in_stride, const ResizeWeights& weights,
                     int num_outputs, uint8_t* __restrict out, size_t out_stride) {
  const uint8_t* const planes[3] = {in, in + in_stride, in + 2 * in_stride};
  const int32_t* __restrict w = weights.weights(0);
  const int max_taps = weights.max_taps();
  int32_t sums[kPlanes][kStrip];
  for (int begin = 0; begin < num_outputs; begin += kStrip) {
    const int n = std::min(kStrip, num_outputs - begin);
    for (int i = 0; i < n; ++i, w += max_taps) {
      const int first = weights.first_tap(begin + i);
      const int num_taps = kTaps == 0 ? weights.num_taps(begin + i) : kTaps;
      for (int p = 0; p < kPlanes; ++p) {
        int32_t sum = kHalf;
        for (int k = 0; k < num_taps; ++k) sum += w[k] * planes[p][first + k];
        sums[p][i] = sum;
      }
    }
    for (size_t p = 0; p < kPlanes; ++p) {
      uint8_t* __restrict bytes = out + p * out_stride + begin;
      for (int i = 0; i < n; ++i) bytes[i] = to_byte(sums[p][i]);
    }
  }
}

using HorizontalPass = void (*)(const uint8_t*, size_t, const ResizeWeights&, int, uint8_t*,
                                size_t);

template <int kPlanes>
HorizontalPass horizontal_pass_of(int num_taps) {
  switch (num_taps) {
    case 2:
      return horizontal_pass<kPlanes, 2>;
    case 3:
      return horizontal_pass<kPlanes, 3>;
    case 4:
      return horizontal_pass<kPlanes, 4>;
    case 5:
      return horizontal_pass<kPlanes, 5>;
    default:
      return horizontal_pass<kPlanes, 0>;
  }
}

// The vertical pass takes so many columns at a time, their sums in registers.
constexpr int kColumns = 16;

constexpr size_t round_up_to_columns(size_t size) {
  return (size + kColumns - 1) / kColumns * kColumns;
}

// out[i] = sum of weights[k] * rows[k * row_bytes + i]; n is a multiple of kColumns. A weight is
// below 2 and so has 24 bits. It is taken apart into two 16-bit numbers, which compilers for
// baseline x86-64 multiply eight at a time (32-bit multiplication of vectors came with SSE4.1).
void vertical_pass(const uint8_t* __restrict rows, size_t row_bytes,
                   const int32_t* __restrict weights, int num_taps, size_t n,
                   uint8_t* __restrict out) {
  for (size_t i = 0; i < n; i += kColumns) {
    int32_t sums[kColumns];
    for (int j = 0; j < kColumns; ++j) sums[j] = kHalf;
    const uint8_t* __restrict row = rows + i;
    for (int k = 0; k < num_taps; ++k, row += row_bytes) {
      const auto high = static_cast<int16_t>(weights[k] >> 8);
      const auto low = static_cast<int16_t>(weights[k] & 255);
      for (int j = 0; j < kColumns; ++j) {
        const int16_t value = row[j];
        sums[j] += high * value * 256 + low * value;
      }
    }
    for (int j = 0; j < kColumns; ++j) out[i + static_cast<size_t>(j)] = to_byte(sums[j]);
  }
}

}  // namespace

// precompute_coeffs of Resample.c for a box that is the whole input.
void ResizeWeights::compute(int in_size, int out_size, int begin, int end, int filter) {
  const auto num_outputs = static_cast<size_t>(end - begin);
  identity_ = in_size == out_size;
  first_input_ = begin;
  end_input_ = end;
  if (identity_) return;
  const auto [function, unit_support] = filter_of(filter);
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = std::max(scale, 1.0);
  const double support = unit_support * filter_scale;
  const double inverse = 1.0 / filter_scale;
  const auto row_taps = static_cast<size_t>(std::ceil(support)) * 2 + 1;
  grow(&taps_, num_outputs * row_taps);
  grow(&first_taps_, num_outputs);
  grow(&num_taps_, num_outputs);
  std::fill_n(taps_.begin(), num_outputs * row_taps, 0.0);
  max_taps_ = 1;
  first_input_ = in_size;
  end_input_ = 0;
  for (size_t i = 0; i < num_outputs; ++i) {
    double* taps = taps_.data() + i * row_taps;
    const double center = (begin + static_cast<int>(i) + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int last = std::min(static_cast<int>(center + support + 0.5), in_size);
    double total = 0.0;
    for (int x = 0; x < last - first; ++x) {
      taps[x] = function((x + first - center + 0.5) * inverse);
      total += taps[x];
    }
    for (int x = 0; x < last - first && total != 0.0; ++x) taps[x] /= total;
    first_taps_[i] = first;
    num_taps_[i] = last - first;
    max_taps_ = std::max(max_taps_, last - first);
    first_input_ = std::min(first_input_, first);
    end_input_ = std::max(end_input_, last);
  }
  grow(&weights_, num_outputs * static_cast<size_t>(max_taps_));
  int32_t* weights = weights_.data();
  for (size_t i = 0; i < num_outputs; ++i) {
    for (size_t k = 0; k < static_cast<size_t>(max_taps_); ++k) {
      *weights++ = fixed_point(taps_[i * row_taps + k]);
    }
  }
}

void Resizer::begin(const imseq_view& view, int out_height, int out_width, int num_planes,
                    int filter, int passes) {
  num_planes_ = num_planes;
  out_width_ = out_width;
  first_row_ = std::clamp(-view.window_top, 0, out_height);
  end_row_ = std::clamp(view.resized_height - view.window_top, first_row_, out_height);
  first_column_ = std::clamp(-view.window_left, 0, out_width);
  end_column_ = std::clamp(view.resized_width - view.window_left, first_column_, out_width);
  source_ = Region{};
  // What lies outside the resized image is never written again.
  zeros_.assign(static_cast<size_t>(out_width), 0);
  padded_.assign(static_cast<size_t>(out_width * num_planes), 0);
  if (first_row_ == end_row_ || first_column_ == end_column_) {
    first_row_ = end_row_ = 0;
    return;
  }
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
  source_stride_ = static_cast<size_t>(source_.width);
  resized_stride_ = static_cast<size_t>(end_column_ - first_column_);
  const auto planes = static_cast<size_t>(num_planes);
  row_bytes_ = round_up_to_columns(planes * (vertical_first_ ? source_stride_ : resized_stride_));
  grow(&rows_, row_bytes_ * static_cast<size_t>(source_.height) + kSlack);
  grow(&row_, round_up_to_columns(planes * source_stride_) + kSlack);
  grow(&output_, round_up_to_columns(planes * resized_stride_) + kSlack);
}

std::array<uint8_t*, 3> Resizer::source_planes(int y) {
  const bool straight = vertical_first_ || horizontal_.identity();
  uint8_t* first = straight ? stored_row(y - source_.top) : row_.data();
  return {first, first + source_stride_, first + 2 * source_stride_};
}

void Resizer::add_row(int y) {
  if (vertical_first_ || horizontal_.identity()) return;
  resize_horizontally(row_.data(), stored_row(y - source_.top));
}

void Resizer::resize_horizontally(const uint8_t* in, uint8_t* out) const {
  const int num_taps = horizontal_.max_taps();
  const HorizontalPass pass =
      num_planes_ == 1 ? horizontal_pass_of<1>(num_taps) : horizontal_pass_of<3>(num_taps);
  // Taps count from the first column of the box, the row begins with the first one needed.
  pass(in - horizontal_.first_input(), source_stride_, horizontal_, end_column_ - first_column_,
       out, resized_stride_);
}

const uint8_t* Resizer::resize_vertically(int i, uint8_t* out) {
  if (vertical_.identity()) return stored_row(i);
  vertical_pass(stored_row(vertical_.first_tap(i) - vertical_.first_input()), row_bytes_,
                vertical_.weights(i), vertical_.num_taps(i), row_bytes_, out);
  return out;
}

std::array<const uint8_t*, 3> Resizer::output_row(int y) {
  if (y < first_row_ || y >= end_row_) return {zeros_.data(), zeros_.data(), zeros_.data()};
  const uint8_t* row =
      resize_vertically(y - first_row_, vertical_first_ ? row_.data() : output_.data());
  if (vertical_first_ && !horizontal_.identity()) {
    resize_horizontally(row, output_.data());
    row = output_.data();
  }
  std::array<const uint8_t*, 3> planes{};
  for (size_t p = 0; p < static_cast<size_t>(num_planes_); ++p) {
    planes[p] = row + p * resized_stride_;
    if (resized_stride_ == static_cast<size_t>(out_width_)) continue;
    uint8_t* padded = padded_.data() + p * static_cast<size_t>(out_width_);
    std::memcpy(padded + first_column_, planes[p], resized_stride_);
    planes[p] = padded;
  }
  return planes;
}

}  // namespace imseq
