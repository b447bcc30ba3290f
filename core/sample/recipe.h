// Checks recipes.
#pragma once

#include "imagenet_seq.h"

namespace imseq {

// Returns IMSEQ_OK, or IMSEQ_ERROR_ARGUMENT and names the field that is out of range.
[[nodiscard]] int32_t check_recipe(const imseq_recipe& recipe, imseq_error* error);

}  // namespace imseq
