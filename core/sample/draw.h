// Random draws of a sample: a pure function of (seed, epoch, sample), the same on every platform.
#pragma once

#include "imagenet_seq.h"

namespace imseq {

// The geometry of a sample of width x height pixels. The recipe must be valid (check_recipe).
// Fills *view; returns IMSEQ_OK, or IMSEQ_FOREIGN where the core can't produce this view (the
// resized image does not have the output's size, or would be empty).
[[nodiscard]] int32_t draw_view(const imseq_recipe& recipe, const imseq_key& key, int32_t width,
                                int32_t height, imseq_view* view);

}  // namespace imseq
