#include "batch.h"

#include <algorithm>
#include <cstddef>

namespace imseq {

namespace {

// Value: a type of the dtype's size. Entries of the table are copied as they are, whatever they
// mean.
template <typename Value, typename Convert>
void store_plane(const uint8_t* __restrict in, ptrdiff_t n, bool flip, ptrdiff_t step,
                 const Convert& convert, Value* __restrict out) {
  if (flip) {
    for (ptrdiff_t x = 0; x < n; ++x) out[x * step] = convert(in[n - 1 - x]);
  } else {
    for (ptrdiff_t x = 0; x < n; ++x) out[x * step] = convert(in[x]);
  }
}

template <typename Value, typename Convert>
void store_planes(const imseq_recipe& recipe, const std::array<const uint8_t*, 3>& planes, int y,
                  bool flip, const Convert& convert_channel, Value* out) {
  const ptrdiff_t height = recipe.out_height, width = recipe.out_width;
  for (ptrdiff_t c = 0; c < 3; ++c) {
    const auto convert = convert_channel(c);
    const uint8_t* in = planes[static_cast<size_t>(c)];
    if (recipe.layout == IMSEQ_CHW) {
      store_plane(in, width, flip, 1, convert, out + (c * height + y) * width);
    } else {
      store_plane(in, width, flip, 3, convert, out + y * width * 3 + c);
    }
  }
}

template <typename Value>
void store_by_table(const imseq_recipe& recipe, const std::array<const uint8_t*, 3>& planes, int y,
                    bool flip, void* out) {
  const auto convert_channel = [&](ptrdiff_t c) {
    const Value* table = static_cast<const Value*>(recipe.table) + c * 256;
    return [table](uint8_t byte) { return table[byte]; };
  };
  store_planes(recipe, planes, y, flip, convert_channel, static_cast<Value*>(out));
}

}  // namespace

void store_row(const imseq_recipe& recipe, const std::array<const uint8_t*, 3>& planes, int y,
               bool flip, void* batch_row) {
  switch (recipe.dtype) {
    case IMSEQ_FLOAT32:
      return store_by_table<uint32_t>(recipe, planes, y, flip, batch_row);
    case IMSEQ_FLOAT16:
    case IMSEQ_BFLOAT16:
      return store_by_table<uint16_t>(recipe, planes, y, flip, batch_row);
    default:
      const auto as_is = [](ptrdiff_t) { return [](uint8_t byte) { return byte; }; };
      return store_planes(recipe, planes, y, flip, as_is, static_cast<uint8_t*>(batch_row));
  }
}

}  // namespace imseq
