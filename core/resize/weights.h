// The weights of Pillow's resize (libImaging/Resample.c, 8 bits a channel) along one axis.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace imseq {

// Resample.c: PRECISION_BITS = 32 - 8 - 2.
constexpr int kWeightBits = 22;

// One axis' weights as kernels read them. Output i is the rounded sum of weights[k * stride + i] *
// input[first_taps[i] + k] over its taps k. Outputs are padded to a multiple of kOutputGroup, for
// which the last first tap is repeated, and taps to a multiple of kTapGroup. Padding weights are
// zero.
struct AxisWeights {
  static constexpr int kOutputGroup = 32, kTapGroup = 4;
  int num_outputs = 0;
  int max_taps = 0;  // of any output
  size_t stride = 0;
  const int32_t* first_taps = nullptr;  // never decreasing
  const int32_t* num_taps = nullptr;
  const int32_t* weights = nullptr;  // below 2.0 in magnitude
};

// Computes Pillow's weights along one axis, for outputs [begin, end) of `out_size` from `in_size`
// inputs.
class ResizeWeights {
 public:
  void compute(int in_size, int out_size, int begin, int end, int filter);

  // If the sizes are equal Pillow leaves the axis alone: output i is input begin + i.
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

}  // namespace imseq
