#include "resize/weights.h"

#include <algorithm>
#include <cmath>

#include "cpu/memory.h"
#include "imagenet_seq.h"

namespace imseq {

namespace {

// The filters of Resample.c, with its order of operations but without branches, so that compilers
// can vectorise them.
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

}  // namespace

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

// Computes tap by tap for all outputs at once; each total still adds up in the order of its taps.
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
  // Pillow does not normalise weights that add up to zero; nor does dividing by one.
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

}  // namespace imseq
