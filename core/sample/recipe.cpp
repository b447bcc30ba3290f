#include <cfloat>
#include <initializer_list>

#include "abi/status.h"
#include "sample/draw.h"

namespace imseq {
namespace {

constexpr int32_t kMaxSide = 1 << 16;  // of an output, a resize or a crop given by a recipe
constexpr double kMaxRatio = 1e9;      // keeps exp and log (draw.cpp) far from subnormals

int32_t refuse(imseq_error* error, const char* field, const char* domain, double value) {
  return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "recipe.%s must be %s, got %g", field, domain,
              value);
}

struct Field {
  const char* name;
  int64_t value, lowest, highest;
};

int32_t check_ranges(std::initializer_list<Field> fields, imseq_error* error) {
  for (const Field& field : fields) {
    if (field.value >= field.lowest && field.value <= field.highest) continue;
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "recipe.%s must be between %lld and %lld, got %lld", field.name,
                static_cast<long long>(field.lowest), static_cast<long long>(field.highest),
                static_cast<long long>(field.value));
  }
  return IMSEQ_OK;
}

// Comparisons are written so that NaN fails them.
int32_t check_random_resized_crop(const imseq_recipe& recipe, imseq_error* error) {
  if (!(recipe.scale_min >= 0.0)) {
    return refuse(error, "scale_min", "at least 0", recipe.scale_min);
  }
  if (!(recipe.scale_max >= recipe.scale_min && recipe.scale_max <= DBL_MAX)) {
    return refuse(error, "scale_max", "finite and at least scale_min", recipe.scale_max);
  }
  if (!(recipe.ratio_min >= 1.0 / kMaxRatio)) {
    return refuse(error, "ratio_min", "at least 1e-9", recipe.ratio_min);
  }
  if (!(recipe.ratio_max >= recipe.ratio_min && recipe.ratio_max <= kMaxRatio)) {
    return refuse(error, "ratio_max", "at least ratio_min and at most 1e9", recipe.ratio_max);
  }
  return IMSEQ_OK;
}

int32_t check_resize_crop(const imseq_recipe& recipe, imseq_error* error) {
  const int32_t status = check_ranges(
      {{"resize_height", recipe.resize_height, 0, kMaxSide},
       {"resize_width", recipe.resize_width, 0, recipe.resize_height == 0 ? 0 : kMaxSide},
       {"resize_max", recipe.resize_max, 0,
        recipe.resize_height == 0 || recipe.resize_width != 0 ? 0 : kMaxSide},
       {"crop_height", recipe.crop_height, 0, kMaxSide},
       {"crop_width", recipe.crop_width, 0, kMaxSide},
       {"center_rule", recipe.center_rule, IMSEQ_CENTER_ROUND, IMSEQ_CENTER_FLOOR}},
      error);
  if (status != IMSEQ_OK) return status;
  if (recipe.resize_max != 0 && recipe.resize_max <= recipe.resize_height) {
    return refuse(error, "resize_max", "0 or more than resize_height", recipe.resize_max);
  }
  if ((recipe.crop_height == 0) != (recipe.crop_width == 0)) {
    return refuse(error, "crop_width", "zero exactly when crop_height is", recipe.crop_width);
  }
  if (recipe.crop_height != 0 && recipe.crop_height != recipe.out_height) {
    return refuse(error, "crop_height", "0 or equal to out_height", recipe.crop_height);
  }
  if (recipe.crop_width != 0 && recipe.crop_width != recipe.out_width) {
    return refuse(error, "crop_width", "0 or equal to out_width", recipe.crop_width);
  }
  return IMSEQ_OK;
}

int32_t check_fixed_crop(const imseq_recipe& recipe, imseq_error* error) {
  return check_ranges({{"fixed_top", recipe.fixed_top, 0, INT32_MAX},
                       {"fixed_left", recipe.fixed_left, 0, INT32_MAX},
                       {"fixed_height", recipe.fixed_height, 1, INT32_MAX},
                       {"fixed_width", recipe.fixed_width, 1, INT32_MAX},
                       {"fixed_flip", recipe.fixed_flip, 0, 1}},
                      error);
}

}  // namespace

int32_t check_recipe(const imseq_recipe& recipe, imseq_error* error) {
  const int32_t status = check_ranges(
      {{"geometry", recipe.geometry, IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP, IMSEQ_GEOMETRY_FIXED_CROP},
       {"out_height", recipe.out_height, 1, kMaxSide},
       {"out_width", recipe.out_width, 1, kMaxSide},
       {"filter", recipe.filter, IMSEQ_FILTER_BOX, IMSEQ_FILTER_BICUBIC},
       {"passes", recipe.passes, IMSEQ_PASSES_HORIZONTAL_FIRST, IMSEQ_PASSES_PILLOW_13},
       {"dtype", recipe.dtype, IMSEQ_UINT8, IMSEQ_BFLOAT16},
       {"layout", recipe.layout, IMSEQ_CHW, IMSEQ_HWC},
       {"strict", recipe.strict, 0, 1},
       {"max_pixels", recipe.max_pixels, 0, INT64_MAX}},
      error);
  if (status != IMSEQ_OK) return status;
  if (!(recipe.flip_probability >= 0.0 && recipe.flip_probability <= 1.0)) {
    return refuse(error, "flip_probability", "between 0 and 1", recipe.flip_probability);
  }
  if ((recipe.table == nullptr) != (recipe.dtype == IMSEQ_UINT8)) {
    return refuse(error, "table", "NULL exactly for dtype 0 (uint8); this dtype is", recipe.dtype);
  }
  if (recipe.geometry == IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP) {
    return check_random_resized_crop(recipe, error);
  }
  if (recipe.geometry == IMSEQ_GEOMETRY_RESIZE_CROP) return check_resize_crop(recipe, error);
  return check_fixed_crop(recipe, error);
}

}  // namespace imseq
