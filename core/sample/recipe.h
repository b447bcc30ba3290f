// The rules that a recipe must keep.
#pragma once

#include "imagenet_seq.h"

namespace imseq {

// IMSEQ_OK, or IMSEQ_ERROR_ARGUMENT with the field that is out of its domain.
[[nodiscard]] int32_t check_recipe(const imseq_recipe& recipe, imseq_error* error);

}  // namespace imseq
