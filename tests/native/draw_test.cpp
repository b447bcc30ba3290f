// draw_view and check_recipe. Distributions, and equality with NumPy's Philox and with torchvision,
// are tests/decode/test_augment.py's; here are exact cases, invariants and refusals, so that sanitizers
// see them.
#include "sample/draw.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>

namespace {

int num_failures = 0;

void expect(bool holds, const char* what, long long a = 0, long long b = 0, long long c = 0) {
  if (holds) return;
  ++num_failures;
  std::fprintf(stderr, "failed: %s (%lld, %lld, %lld)\n", what, a, b, c);
}

imseq_recipe training_recipe() {
  imseq_recipe recipe = {};
  recipe.geometry = IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP;
  recipe.out_height = recipe.out_width = 224;
  recipe.filter = IMSEQ_FILTER_BILINEAR;
  recipe.scale_min = 0.08;
  recipe.scale_max = 1.0;
  recipe.ratio_min = 3.0 / 4.0;
  recipe.ratio_max = 4.0 / 3.0;
  recipe.flip_probability = 0.5;
  return recipe;
}

imseq_recipe validation_recipe(int32_t resize, int32_t crop) {
  imseq_recipe recipe = {};
  recipe.geometry = IMSEQ_GEOMETRY_RESIZE_CROP;
  recipe.out_height = recipe.out_width = crop;
  recipe.filter = IMSEQ_FILTER_BILINEAR;
  recipe.resize_height = resize;
  recipe.crop_height = recipe.crop_width = crop;
  return recipe;
}

imseq_view draw(const imseq_recipe& recipe, const imseq_key& key, int32_t width, int32_t height) {
  imseq_view view;
  expect(imseq::check_recipe(recipe, nullptr) == IMSEQ_OK, "the recipe is valid");
  expect(imseq::draw_view(recipe, key, width, height, &view) == IMSEQ_OK, "the view exists", width,
         height);
  return view;
}

bool inside(const imseq_view& view, int32_t width, int32_t height) {
  return view.top >= 0 && view.left >= 0 && view.height >= 1 && view.width >= 1 &&
         view.height <= height - view.top && view.width <= width - view.left;
}

void test_crops_lie_inside_the_image() {
  const int32_t sizes[][2] = {{1, 1},     {1, 4000},  {5000, 3},      {2, 2},
                              {500, 375}, {224, 224}, {65535, 65535}, {INT32_MAX, 1}};
  for (const auto& [width, height] : sizes) {
    for (int64_t sample = 0; sample < 500; ++sample) {
      const imseq_view view = draw(training_recipe(), {7, 0, sample}, width, height);
      expect(inside(view, width, height), "crop inside the image", width, height, sample);
      expect(view.resized_height == 224 && view.resized_width == 224, "resized to the output");
      expect(view.window_top == 0 && view.window_left == 0, "the window is the whole crop");
    }
  }
}

void test_extreme_recipes_stay_defined() {
  imseq_recipe recipe = training_recipe();
  recipe.scale_min = 0.0;
  recipe.scale_max = std::numeric_limits<double>::max();
  recipe.ratio_min = 1e-9;
  recipe.ratio_max = 1e9;
  for (int64_t sample = 0; sample < 500; ++sample) {
    const imseq_view view = draw(recipe, {7, 0, sample}, 500, 375);
    expect(inside(view, 500, 375), "crop inside the image", sample);
  }
  recipe.ratio_min = recipe.ratio_max = 4.0;  // a 1x1 image has no crop four times as wide as high
  imseq_view view;
  expect(imseq::draw_view(recipe, {7, 0, 0}, 1, 1, &view) == IMSEQ_NOT_DECODED, "no such crop");
}

void test_each_part_of_the_key_matters() {
  const imseq_key keys[] = {{1, 2, 3},
                            {2, 2, 3},
                            {1, 3, 3},
                            {1, 2, 4},
                            {1, 3, 2},
                            {1, -2, 3},
                            {1, 2, -3},
                            {uint64_t{1} << 63, 2, 3},
                            {1, int64_t{1} << 40, 3},
                            {1, 2, int64_t{1} << 40}};
  imseq_view views[std::size(keys)];
  for (size_t i = 0; i < std::size(keys); ++i) {
    views[i] = draw(training_recipe(), keys[i], 5000, 4000);
    const imseq_view again = draw(training_recipe(), keys[i], 5000, 4000);
    expect(std::memcmp(&views[i], &again, sizeof(again)) == 0, "the same key, the same view", i);
    for (size_t j = 0; j < i; ++j) {
      expect(std::memcmp(&views[i], &views[j], sizeof(again)) != 0, "other key, other view", i, j);
    }
  }
}

void test_flip_probability_is_exact_at_its_ends() {
  imseq_recipe recipe = training_recipe();
  int num_flipped = 0;
  for (int64_t sample = 0; sample < 4000; ++sample) {
    recipe.flip_probability = 0.0;
    const imseq_view never = draw(recipe, {0, 0, sample}, 500, 375);
    recipe.flip_probability = 1.0;
    const imseq_view always = draw(recipe, {0, 0, sample}, 500, 375);
    recipe.flip_probability = 0.5;
    const imseq_view half = draw(recipe, {0, 0, sample}, 500, 375);
    expect(never.flip == 0 && always.flip == 1, "p = 0 never flips, p = 1 always", sample);
    expect(half.top == never.top && half.left == never.left, "flips don't shift crops", sample);
    num_flipped += half.flip;
  }
  expect(num_flipped > 1850 && num_flipped < 2150, "half of them flip", num_flipped);
}

void expect_window(const imseq_recipe& recipe, int32_t width, int32_t height,
                   int32_t resized_height, int32_t resized_width, int32_t window_top,
                   int32_t window_left) {
  const imseq_view view = draw(recipe, {0, 0, 0}, width, height);
  expect(view.top == 0 && view.left == 0 && view.height == height && view.width == width,
         "the box is the whole image", width, height);
  expect(view.resized_height == resized_height && view.resized_width == resized_width,
         "resized height and width", width, view.resized_height, view.resized_width);
  expect(view.window_top == window_top && view.window_left == window_left, "top and left of window",
         width, view.window_top, view.window_left);
}

// Values from torchvision 0.28: _compute_resized_output_size and center_crop.
void test_resize_and_center_crop() {
  const imseq_recipe usual = validation_recipe(256, 224);
  expect_window(usual, 500, 375, 256, 341, 16, 58);  // round(58.5) is 58
  expect_window(usual, 375, 500, 341, 256, 58, 16);
  expect_window(usual, 255, 253, 256, 258, 16, 17);
  expect_window(usual, 1, 4000, 1024000, 256, 511888, 16);

  imseq_recipe rule = validation_recipe(0, 224);
  expect_window(rule, 227, 229, 229, 227, 2, 2);  // halves go to the even number: 2.5 and 1.5
  rule.center_rule = IMSEQ_CENTER_FLOOR;
  expect_window(rule, 227, 229, 229, 227, 2, 1);

  expect_window(validation_recipe(0, 224), 101, 300, 300, 101, 38,
                -61);  // padded to the left and right

  imseq_recipe limited = usual;
  limited.resize_max = 300;
  expect_window(limited, 500, 375, 225, 300, 0, 38);  // 256 * 300 / 341 = 225.2

  imseq_recipe exact = validation_recipe(100, 0);
  exact.resize_width = 200;
  exact.out_height = 100;
  exact.out_width = 200;
  expect_window(exact, 31, 57, 100, 200, 0, 0);
}

void test_what_only_pillow_can_decide() {
  imseq_view view;
  imseq_recipe unsized = validation_recipe(224, 0);
  unsized.out_height = unsized.out_width = 224;
  expect(imseq::draw_view(unsized, {}, 300, 300, &view) == IMSEQ_OK, "a square fits");
  expect(imseq::draw_view(unsized, {}, 300, 298, &view) == IMSEQ_NOT_DECODED,
         "not the output's size");
  expect(
      imseq::draw_view(validation_recipe(256, 224), {}, 1, INT32_MAX, &view) == IMSEQ_NOT_DECODED,
      "a resized image beyond any memory");
  imseq_recipe empty = validation_recipe(256, 224);
  empty.resize_max = 257;
  expect(imseq::draw_view(empty, {}, 1, 4000, &view) == IMSEQ_NOT_DECODED, "a resized side of 0");
  expect(imseq::draw_view(empty, {}, 0, 10, &view) == IMSEQ_NOT_DECODED, "an empty image");
}

void test_fixed_crop() {
  imseq_recipe recipe = {};
  recipe.geometry = IMSEQ_GEOMETRY_FIXED_CROP;
  recipe.out_height = 10;
  recipe.out_width = 20;
  recipe.fixed_top = 3;
  recipe.fixed_left = 4;
  recipe.fixed_height = 5;
  recipe.fixed_width = 6;
  recipe.fixed_flip = 1;
  const imseq_view view = draw(recipe, {}, 10, 8);
  expect(view.top == 3 && view.left == 4 && view.height == 5 && view.width == 6, "the given crop");
  expect(view.resized_height == 10 && view.resized_width == 20 && view.flip == 1,
         "the given output");
  imseq_view outside;
  expect(imseq::draw_view(recipe, {}, 9, 8, &outside) == IMSEQ_NOT_DECODED,
         "too wide for the image");
  expect(imseq::draw_view(recipe, {}, 10, 7, &outside) == IMSEQ_NOT_DECODED,
         "too high for the image");
}

void expect_refused(const imseq_recipe& recipe, const char* field, const char* value) {
  imseq_error error = {};
  const int32_t status = imseq::check_recipe(recipe, &error);
  expect(status == IMSEQ_ERROR_ARGUMENT && error.code == IMSEQ_ERROR_ARGUMENT, field);
  const bool says =
      std::strstr(error.message, field) != nullptr && std::strstr(error.message, value) != nullptr;
  expect(says, error.message);
}

template <typename T>
void expect_refused_with(T imseq_recipe::* member, T value, const char* field, const char* text,
                         imseq_recipe recipe = training_recipe()) {
  recipe.*member = value;
  expect_refused(recipe, field, text);
}

void test_invalid_recipes_are_refused() {
  expect_refused_with(&imseq_recipe::geometry, 0, "geometry", "got 0");
  expect_refused_with(&imseq_recipe::geometry, 4, "geometry", "got 4");
  expect_refused_with(&imseq_recipe::out_height, 0, "out_height", "got 0");
  expect_refused_with(&imseq_recipe::out_width, 65537, "out_width", "got 65537");
  expect_refused_with(&imseq_recipe::filter, 3, "filter", "got 3");
  expect_refused_with(&imseq_recipe::passes, -1, "passes", "got -1");
  expect_refused_with(&imseq_recipe::dtype, 4, "dtype", "got 4");
  expect_refused_with(&imseq_recipe::dtype, 1, "table", "1");
  expect_refused_with(&imseq_recipe::layout, 2, "layout", "got 2");
  expect_refused_with(&imseq_recipe::strict, 2, "strict", "got 2");
  expect_refused_with(&imseq_recipe::max_pixels, int64_t{-1}, "max_pixels", "got -1");
  expect_refused_with(&imseq_recipe::flip_probability, 1.5, "flip_probability", "1.5");
  expect_refused_with(&imseq_recipe::flip_probability, std::nan(""), "flip_probability", "nan");
  expect_refused_with(&imseq_recipe::scale_min, -0.5, "scale_min", "-0.5");
  expect_refused_with(&imseq_recipe::scale_max, 0.01, "scale_max", "0.01");
  expect_refused_with(&imseq_recipe::scale_max, std::nan(""), "scale_max", "nan");
  expect_refused_with(&imseq_recipe::ratio_min, 0.0, "ratio_min", "0");
  expect_refused_with(&imseq_recipe::ratio_max, 0.5, "ratio_max", "0.5");
  const imseq_recipe usual = validation_recipe(256, 224);
  expect_refused_with(&imseq_recipe::resize_height, -1, "resize_height", "got -1", usual);
  expect_refused_with(&imseq_recipe::resize_max, 256, "resize_max", "256", usual);
  expect_refused_with(&imseq_recipe::crop_height, 225, "crop_height", "225", usual);
  expect_refused_with(&imseq_recipe::crop_width, 0, "crop_width", "0", usual);
  expect_refused_with(&imseq_recipe::center_rule, 2, "center_rule", "got 2", usual);
  const imseq_recipe unresized = validation_recipe(0, 224);
  expect_refused_with(&imseq_recipe::resize_width, 5, "resize_width", "got 5", unresized);
  imseq_recipe fixed = training_recipe();
  fixed.geometry = IMSEQ_GEOMETRY_FIXED_CROP;
  expect_refused(fixed, "fixed_height", "got 0");
}

}  // namespace

int main() {
  test_crops_lie_inside_the_image();
  test_extreme_recipes_stay_defined();
  test_each_part_of_the_key_matters();
  test_flip_probability_is_exact_at_its_ends();
  test_resize_and_center_crop();
  test_what_only_pillow_can_decide();
  test_fixed_crop();
  test_invalid_recipes_are_refused();
  return num_failures == 0 ? 0 : 1;
}
