// Storing pixels in a row of a batch: conversion to the recipe's dtype, layout, and the flip.
#pragma once

#include <array>
#include <cstdint>

#include "imagenet_seq.h"

namespace imseq {

// Stores row y of an image, three planes of recipe.out_width bytes, in the batch's row (out_height
// x out_width x 3 values of recipe.dtype). flip: the first pixel comes last.
void store_row(const imseq_recipe& recipe, const std::array<const uint8_t*, 3>& planes, int y,
               bool flip, void* batch_row);

}  // namespace imseq
