#include "sample/store.h"

#include <cstring>

#include "cpu/memory.h"

namespace imseq {

namespace {

// ---- portable kernels ---------------------------------------------------------------------------

// Value: an integer of the dtype's size; values are copied bit by bit.
template <typename Value>
void prepare_table(const void* table, uint8_t* prepared) {
  std::memcpy(prepared, table, 256 * sizeof(Value));
}

void copy(const uint8_t* pixels, size_t n, bool flip, const uint8_t*, void* out) {
  if (!flip) {
    std::memcpy(out, pixels, n);
    return;
  }
  auto* bytes = static_cast<uint8_t*>(out);
  for (size_t x = 0; x < n; ++x) bytes[x] = pixels[n - 1 - x];
}

template <typename Value>
void look_up(const uint8_t* __restrict pixels, size_t n, bool flip, const uint8_t* prepared,
             void* out) {
  const auto* __restrict table = reinterpret_cast<const Value*>(prepared);
  auto* __restrict values = static_cast<Value*>(out);
  if (flip) {
    for (size_t x = 0; x < n; ++x) values[x] = table[pixels[n - 1 - x]];
  } else {
    for (size_t x = 0; x < n; ++x) values[x] = table[pixels[x]];
  }
}

template <typename Value>
void interleave(const void* const* channels, size_t n, void* out) {
  const auto* __restrict red = static_cast<const Value*>(channels[0]);
  const auto* __restrict green = static_cast<const Value*>(channels[1]);
  const auto* __restrict blue = static_cast<const Value*>(channels[2]);
  auto* __restrict values = static_cast<Value*>(out);
  for (size_t x = 0; x < n; ++x) {
    values[3 * x] = red[x];
    values[3 * x + 1] = green[x];
    values[3 * x + 2] = blue[x];
  }
}

constexpr StoreKernels kPortable = {
    {prepare_table<uint8_t>, prepare_table<uint16_t>, prepare_table<uint32_t>},
    {copy, look_up<uint16_t>, look_up<uint32_t>},
    {copy, look_up<uint16_t>, look_up<uint32_t>},
    [] {},
    {interleave<uint8_t>, interleave<uint16_t>, interleave<uint32_t>}};

}  // namespace

void PixelStore::begin(const imseq_recipe& recipe) {
  kernels_ = kernels_of_level<&kPortable, &kStoreAvx2, &kStoreAvx512, &kPortable>(cpu_level());
  size_ = recipe.dtype == IMSEQ_UINT8 ? 0 : recipe.dtype == IMSEQ_FLOAT32 ? 2 : 1;
  out_height_ = static_cast<size_t>(recipe.out_height);
  out_width_ = static_cast<size_t>(recipe.out_width);
  interleaved_ = recipe.layout == IMSEQ_HWC;
  grow(&scratch_, 3 * out_width_ * value_bytes() + kRowSlack);
  if (size_ == 0) return;
  const auto* table = static_cast<const uint8_t*>(recipe.table);
  for (size_t c = 0; c < 3; ++c) {
    kernels_->prepare_table[size_](table + c * 256 * value_bytes(), tables_[c].data());
  }
}

void PixelStore::store_row(const std::array<const uint8_t*, 3>& planes, int y, bool flip,
                           void* batch_row) {
  const size_t row_bytes = out_width_ * value_bytes();
  const auto row = static_cast<size_t>(y);
  auto* out = static_cast<uint8_t*>(batch_row);
  std::array<const void*, 3> channels{};
  const auto& convert = interleaved_ ? kernels_->convert : kernels_->convert_past_caches;
  for (size_t c = 0; c < 3; ++c) {
    channels[c] = planes[c];
    if (interleaved_ && size_ == 0 && !flip) continue;
    void* to =
        interleaved_ ? scratch_.data() + c * row_bytes : out + (c * out_height_ + row) * row_bytes;
    convert[size_](planes[c], out_width_, flip, tables_[c].data(), to);
    channels[c] = to;
  }
  if (interleaved_) {
    kernels_->interleave[size_](channels.data(), out_width_, out + row * 3 * row_bytes);
  }
}

}  // namespace imseq
