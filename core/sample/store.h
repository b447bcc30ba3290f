// Stores pixels in a row of a batch: converts to the recipe's dtype and layout, and flips.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "imagenet_seq.h"

namespace imseq {

// The functions of one CpuLevel, each for values of 1, 2 and 4 bytes. They may read kRowSlack bytes
// behind the end of a row of pixels, but write only the values asked for.
struct StoreKernels {
  static constexpr int kSizes = 3;
  // Arranges a channel's 256 values for convert(), in the same number of bytes.
  using PrepareTable = void (*)(const void* table, uint8_t* prepared);
  // Converts n pixels; flip: the last pixel first. Values of 1 byte are copied, others looked up.
  using Convert = void (*)(const uint8_t* pixels, size_t n, bool flip, const uint8_t* prepared,
                           void* out);
  // Interleaves three channels of n values each.
  using Interleave = void (*)(const void* const* channels, size_t n, void* out);

  std::array<PrepareTable, kSizes> prepare_table;
  std::array<Convert, kSizes> convert;
  // As convert, for memory that is not read soon: may bypass the caches, which then keep what
  // decoding the next image needs. Call fence() before other threads read the values.
  std::array<Convert, kSizes> convert_past_caches;
  void (*fence)();
  std::array<Interleave, kSizes> interleave;
};

extern const StoreKernels kStoreAvx2, kStoreAvx512;

// Stores images in rows of a batch: out_height x out_width x 3 values of recipe.dtype. Reuses its
// memory.
class PixelStore {
 public:
  // Sets the recipe of the images that follow. The table is copied.
  void begin(const imseq_recipe& recipe);
  // Whether store_row() only copies and flips. Then the caller may write row y itself: the first
  // channel at bytes_of_row(), each next one channel_bytes() further.
  [[nodiscard]] bool stores_bytes_by_channel() const { return size_ == 0 && !interleaved_; }
  [[nodiscard]] uint8_t* bytes_of_row(int y, void* batch_row) const {
    return static_cast<uint8_t*>(batch_row) + static_cast<size_t>(y) * out_width_;
  }
  [[nodiscard]] size_t channel_bytes() const { return out_height_ * out_width_; }
  // Stores row y of an image, three planes of recipe.out_width bytes. flip: the last pixel first.
  void store_row(const std::array<const uint8_t*, 3>& planes, int y, bool flip, void* batch_row);
  // Call after the last row of an image, before other threads read it.
  void end_image() const { kernels_->fence(); }

 private:
  [[nodiscard]] size_t value_bytes() const { return size_t{1} << size_; }

  const StoreKernels* kernels_ = nullptr;
  size_t size_ = 0;  // log2 of a value's bytes
  size_t out_height_ = 0, out_width_ = 0;
  bool interleaved_ = false;
  std::vector<uint8_t> scratch_;  // three channels of a row before they are interleaved
  alignas(64) std::array<std::array<uint8_t, 256 * 4>, 3> tables_{};
};

}  // namespace imseq
