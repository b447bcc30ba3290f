// Storing pixels in a row of a batch: conversion to the recipe's dtype, layout, and the flip.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "imagenet_seq.h"

namespace imseq {

// What one CpuLevel stores with. Functions come in threes: for values of 1, 2 and 4 bytes. Rows of
// pixels may be read kRowSlack bytes behind their end; nothing but what is asked for is written.
struct StoreKernels {
  static constexpr int kSizes = 3;
  // A channel's 256 values as convert() wants them, in the same number of bytes.
  using PrepareTable = void (*)(const void* table, uint8_t* prepared);
  // The values of n pixels; flip: the last pixel's first. Bytes are copied, others looked up.
  using Convert = void (*)(const uint8_t* pixels, size_t n, bool flip, const uint8_t* prepared,
                           void* out);
  // The values of three channels of n pixels, pixel by pixel.
  using Interleave = void (*)(const void* const* channels, size_t n, void* out);

  std::array<PrepareTable, kSizes> prepare_table;
  std::array<Convert, kSizes> convert;
  // The same into memory that is not read soon: it may go past the caches, which then keep what
  // decoding the next image needs. fence() must follow before others may see it.
  std::array<Convert, kSizes> convert_past_caches;
  void (*fence)();
  std::array<Interleave, kSizes> interleave;
};

const StoreKernels& portable_store_kernels();
const StoreKernels& avx2_store_kernels();
const StoreKernels& avx512_store_kernels();

// Stores images in rows of a batch: out_height x out_width x 3 values of recipe.dtype. Keeps its
// memory.
class PixelStore {
 public:
  // For the images that follow. The table is copied.
  void begin(const imseq_recipe& recipe);
  // Whether store_row() only copies, and flips. Bytes can then be put there at once: row y's first
  // channel at bytes_of_row(), the next channel's channel_bytes() behind.
  [[nodiscard]] bool stores_bytes_by_channel() const { return size_ == 0 && !interleaved_; }
  [[nodiscard]] uint8_t* bytes_of_row(int y, void* batch_row) const {
    return static_cast<uint8_t*>(batch_row) + static_cast<size_t>(y) * out_width_;
  }
  [[nodiscard]] size_t channel_bytes() const { return out_height_ * out_width_; }
  // Row y of an image, three planes of recipe.out_width bytes. flip: the last pixel comes first.
  void store_row(const std::array<const uint8_t*, 3>& planes, int y, bool flip, void* batch_row);
  // After the last row of an image, before other threads may look at it.
  void end_image() const { kernels_->fence(); }

 private:
  [[nodiscard]] void* scratch(size_t channel) {
    return scratch_.data() + channel * out_width_ * value_bytes();
  }
  [[nodiscard]] size_t value_bytes() const { return size_t{1} << size_; }

  const StoreKernels* kernels_ = nullptr;
  size_t size_ = 0;  // log2 of a value's bytes
  size_t out_height_ = 0, out_width_ = 0;
  bool interleaved_ = false;
  std::vector<uint8_t> scratch_;  // three channels of a row before they are interleaved
  alignas(64) std::array<std::array<uint8_t, 256 * 4>, 3> tables_{};
};

}  // namespace imseq
