#include "sample/draw.h"

#include <array>
#include <bit>
#include <cfloat>
#include <cmath>

namespace imseq {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "draws need double arithmetic without excess precision");

// Largest side after the resize; larger goes to Pillow.
constexpr int32_t kMaxResized = 1 << 24;

// ---- randomness ---------------------------------------------------------------------------------

// Each augmentation draws from a stream of its own, so that a new one does not shift the draws of
// the others. Numbers are never reused: the same seed would then give other pixels.
enum class Purpose : uint64_t { kCrop = 0, kFlip = 1 };

uint64_t multiply_high(uint64_t a, uint64_t b) {
  const uint64_t a_low = a & 0xffffffff, a_high = a >> 32;
  const uint64_t b_low = b & 0xffffffff, b_high = b >> 32;
  const uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
  const uint64_t carry = a_low * b_high + (middle & 0xffffffff);
  return a_high * b_high + (middle >> 32) + (carry >> 32);
}

// Philox4x64-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011).
// A stream equals NumPy's
//   numpy.random.Philox(key=[seed, kStreamTag], counter=[0, sample, epoch, purpose])
// (negative numbers as two's complement), so that anyone can recompute a crop, as test_augment.py
// does.
class Draws {
 public:
  Draws(const imseq_key& key, Purpose purpose)
      : seed_(key.seed),
        sample_(static_cast<uint64_t>(key.sample)),
        epoch_(static_cast<uint64_t>(key.epoch)),
        purpose_(static_cast<uint64_t>(purpose)) {}

  // In [0, 1), a multiple of 2^-53.
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

  double uniform(double low, double high) { return low + (high - low) * uniform(); }

  // In [0, n). The bias, at most n / 2^64, is too small to be noticed.
  int32_t below(int32_t n) {
    return static_cast<int32_t>(multiply_high(bits(), static_cast<uint64_t>(n)));
  }

 private:
  static constexpr uint64_t kStreamTag = 0x7165736d69;  // "imseq", little-endian

  uint64_t bits() {
    if (used_ == 4) refill();
    return block_[used_++];
  }

  void refill() {
    ++number_;
    uint64_t x0 = number_, x1 = sample_, x2 = epoch_, x3 = purpose_;
    uint64_t k0 = seed_, k1 = kStreamTag;
    for (int round = 0; round < 10; ++round) {
      constexpr uint64_t kMultiplier0 = 0xd2e7470ee14c6c93, kMultiplier1 = 0xca5a826395121157;
      const uint64_t high0 = multiply_high(kMultiplier0, x0), low0 = kMultiplier0 * x0;
      const uint64_t high1 = multiply_high(kMultiplier1, x2), low1 = kMultiplier1 * x2;
      x0 = high1 ^ x1 ^ k0;
      x1 = low1;
      x2 = high0 ^ x3 ^ k1;
      x3 = low0;
      k0 += 0x9e3779b97f4a7c15;
      k1 += 0xbb67ae8584caa73b;
    }
    block_ = {x0, x1, x2, x3};
    used_ = 0;
  }

  uint64_t seed_, sample_, epoch_, purpose_;
  uint64_t number_ = 0;
  std::array<uint64_t, 4> block_{};
  size_t used_ = 4;
};

// ---- arithmetic that is the same everywhere --------------------------------------------------

// libm's exp and log differ between platforms in the last bit, which can move a crop by a pixel.
// These two use only + - * / in one order; their errors stay below 2 units in the last place.

// ln 2 in two parts; the upper has 32 significant bits, so that its product with an exponent is
// exact.
constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;

// Natural logarithm of a normal x > 0.
double log_portable(double x) {
  constexpr uint64_t kFractionMask = (uint64_t{1} << 52) - 1, kOne = uint64_t{1023} << 52;
  const uint64_t word = std::bit_cast<uint64_t>(x);
  int32_t exponent = static_cast<int32_t>(word >> 52) - 1023;
  double mantissa = std::bit_cast<double>((word & kFractionMask) | kOne);
  if (mantissa > 0x1.6a09e667f3bcdp0) {  // sqrt(2): the series converges fastest around 1
    mantissa *= 0.5;
    ++exponent;
  }
  // log m = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...), |s| < 0.172
  const double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double series = 0.0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * square;
  return exponent * kLn2High + (exponent * kLn2Low + 2.0 * (s + s * series));
}

// e^x for |x| < 700.
double exp_portable(double x) {
  const double scaled = x * 0x1.71547652b82fep0;  // 1 / ln 2
  const int32_t exponent = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5));
  const double rest = (x - exponent * kLn2High) - exponent * kLn2Low;  // |rest| < 0.35
  double series = 1.0;
  for (int k = 14; k >= 1; --k) series = 1.0 + series * rest / k;
  return series * std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Python's int(round(x)) for 0 <= x < 2^31: halves go to the even number.
int32_t round_half_even(double x) {
  const int64_t floor = static_cast<int64_t>(x);
  const double rest = x - static_cast<double>(floor);
  const bool up = rest > 0.5 || (rest == 0.5 && floor % 2 == 1);
  return static_cast<int32_t>(floor + (up ? 1 : 0));
}

// ---- geometry -----------------------------------------------------------------------------------

// A box that becomes the whole output.
imseq_view whole_output(const imseq_recipe& recipe, int32_t top, int32_t left, int32_t height,
                        int32_t width) {
  return {top, left, height, width, recipe.out_height, recipe.out_width, 0, 0, 0};
}

// torchvision 0.16 to 0.28, RandomResizedCrop.get_params, when ten tries have found no crop: the
// central crop with the nearest ratio. Empty if no crop of this image has such a ratio.
imseq_view central_crop(const imseq_recipe& recipe, int32_t width, int32_t height) {
  const double ratio = static_cast<double>(width) / height;
  int32_t crop_width = width, crop_height = height;
  if (ratio < recipe.ratio_min) {
    crop_height = round_half_even(width / recipe.ratio_min);
  } else if (ratio > recipe.ratio_max) {
    crop_width = round_half_even(height * recipe.ratio_max);
  }
  return whole_output(recipe, (height - crop_height) / 2, (width - crop_width) / 2, crop_height,
                      crop_width);
}

// torchvision RandomResizedCrop.get_params: the same algorithm with our own random numbers.
imseq_view random_resized_crop(const imseq_recipe& recipe, const imseq_key& key, int32_t width,
                               int32_t height) {
  Draws draws(key, Purpose::kCrop);
  const double area = static_cast<double>(height) * width;
  const double log_min = log_portable(recipe.ratio_min), log_max = log_portable(recipe.ratio_max);
  for (int attempt = 0; attempt < 10; ++attempt) {
    const double target_area = area * draws.uniform(recipe.scale_min, recipe.scale_max);
    const double ratio = exp_portable(draws.uniform(log_min, log_max));
    const double exact_width = std::sqrt(target_area * ratio);
    const double exact_height = std::sqrt(target_area / ratio);
    if (exact_width > width + 1.0 || exact_height > height + 1.0) continue;
    const int32_t crop_width = round_half_even(exact_width);
    const int32_t crop_height = round_half_even(exact_height);
    if (crop_width < 1 || crop_width > width || crop_height < 1 || crop_height > height) continue;
    const int32_t top = draws.below(height - crop_height + 1);
    const int32_t left = draws.below(width - crop_width + 1);
    return whole_output(recipe, top, left, crop_height, crop_width);
  }
  return central_crop(recipe, width, height);
}

// torchvision _compute_resized_output_size. Python's int(a * b / c): the product is below 2^53 and
// therefore exact, so that one rounded division gives the same. False: Pillow must decide.
bool resized_size(const imseq_recipe& recipe, int32_t width, int32_t height, imseq_view* view) {
  view->resized_height = recipe.resize_height == 0 ? height : recipe.resize_height;
  view->resized_width = recipe.resize_height == 0 ? width : recipe.resize_width;
  if (recipe.resize_height != 0 && recipe.resize_width == 0) {
    const double image_short = width <= height ? width : height;
    const double image_long = width <= height ? height : width;
    double new_short = recipe.resize_height;
    double new_long = std::trunc(new_short * image_long / image_short);
    if (recipe.resize_max != 0 && new_long > recipe.resize_max) {
      new_short = std::trunc(recipe.resize_max * new_short / new_long);
      new_long = recipe.resize_max;
    }
    if (new_short < 1 || new_long > kMaxResized) return false;
    view->resized_height = static_cast<int32_t>(width <= height ? new_long : new_short);
    view->resized_width = static_cast<int32_t>(width <= height ? new_short : new_long);
  }
  return true;
}

// torchvision center_crop along one axis: a side that is too short is first padded, half of it
// (rounded down) before the image.
int32_t center_offset(int32_t side, int32_t crop, int32_t rule) {
  if (crop > side) return -((crop - side) / 2);
  if (rule == IMSEQ_CENTER_FLOOR) return (side - crop) / 2;
  return round_half_even((side - crop) / 2.0);
}

bool resize_crop(const imseq_recipe& recipe, int32_t width, int32_t height, imseq_view* view) {
  view->height = height;
  view->width = width;
  if (!resized_size(recipe, width, height, view)) return false;
  if (recipe.crop_height == 0) {
    return view->resized_height == recipe.out_height && view->resized_width == recipe.out_width;
  }
  view->window_top = center_offset(view->resized_height, recipe.crop_height, recipe.center_rule);
  view->window_left = center_offset(view->resized_width, recipe.crop_width, recipe.center_rule);
  return true;
}

}  // namespace

int32_t draw_view(const imseq_recipe& recipe, const imseq_key& key, int32_t width, int32_t height,
                  imseq_view* view) {
  *view = {};
  if (width < 1 || height < 1) return IMSEQ_NOT_DECODED;
  if (recipe.geometry == IMSEQ_GEOMETRY_FIXED_CROP) {
    if (recipe.fixed_height > height - recipe.fixed_top ||
        recipe.fixed_width > width - recipe.fixed_left) {
      return IMSEQ_NOT_DECODED;
    }
    *view = whole_output(recipe, recipe.fixed_top, recipe.fixed_left, recipe.fixed_height,
                         recipe.fixed_width);
    view->flip = recipe.fixed_flip;
    return IMSEQ_OK;
  }
  if (recipe.geometry == IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP) {
    *view = random_resized_crop(recipe, key, width, height);
    if (view->width < 1 || view->height < 1) return IMSEQ_NOT_DECODED;
  } else if (!resize_crop(recipe, width, height, view)) {
    return IMSEQ_NOT_DECODED;
  }
  view->flip = Draws(key, Purpose::kFlip).uniform() < recipe.flip_probability ? 1 : 0;
  return IMSEQ_OK;
}

}  // namespace imseq
