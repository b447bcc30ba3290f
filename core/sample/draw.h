// Checks recipes and draws the crop and flip of a sample: a pure function of (seed, epoch, sample), equal on every
// platform.
#pragma once

#include "imagenet_seq.h"

namespace imseq {

// Returns IMSEQ_OK, or IMSEQ_ERROR_ARGUMENT and names the field that is out of range.
[[nodiscard]] int32_t check_recipe(const imseq_recipe& recipe, imseq_error* error);

// Fills *view for an image of width x height pixels. The recipe must be valid (check_recipe).
// Returns IMSEQ_OK, or IMSEQ_NOT_DECODED if the core can't produce this view: the resized image would
// be empty, or would not have the output's size.
[[nodiscard]] int32_t draw_view(const imseq_recipe& recipe, const imseq_key& key, int32_t width,
                                int32_t height, imseq_view* view);

}  // namespace imseq
