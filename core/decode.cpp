#include "decode.h"

#include <array>
#include <new>

#include "augment.h"
#include "batch.h"
#include "jpeg.h"
#include "region.h"
#include "resize.h"
#include "status.h"

namespace imseq {

struct SampleDecoder::State {
  JpegHeader header;
  RegionDecoder decoder;
  Resizer resizer;

  int32_t decode(const imseq_recipe& recipe, const imseq_key& key, const uint8_t* bytes,
                 size_t size, uint32_t flags, void* row);
  int32_t apply(const imseq_recipe& recipe, const imseq_key& key, const uint8_t* pixels, int width,
                int height, void* row);

 private:
  void store_rows(const imseq_recipe& recipe, const imseq_view& view, int num_planes, void* row);
};

namespace {

Soundness soundness_of(const imseq_recipe& recipe, uint32_t flags) {
  if ((flags & IMSEQ_SAMPLE_CLEAN) != 0) return Soundness::kRegion;
  return recipe.strict != 0 ? Soundness::kAll : Soundness::kMarkers;
}

bool is_empty(const Region& region) { return region.height == 0; }

int32_t out_of_memory(imseq_error* error, const imseq_key& key, size_t size) {
  return fail(error, IMSEQ_ERROR_MEMORY, key.sample, -1, 0, "no memory to decode %zu bytes", size);
}

}  // namespace

int32_t SampleDecoder::State::decode(const imseq_recipe& recipe, const imseq_key& key,
                                     const uint8_t* bytes, size_t size, uint32_t flags, void* row) {
  if (parse_jpeg(bytes, size, &header) != JpegKind::kBaseline) return IMSEQ_FOREIGN;
  const int64_t num_pixels = int64_t{header.width} * header.height;
  if (recipe.max_pixels > 0 && num_pixels > recipe.max_pixels) return IMSEQ_FOREIGN;
  imseq_view view;
  const int32_t status = draw_view(recipe, key, header.width, header.height, &view);
  if (status != IMSEQ_OK) return status;
  const int num_planes = header.colour == JpegColour::kGrey ? 1 : 3;
  resizer.begin(view, recipe.out_height, recipe.out_width, num_planes, recipe.filter,
                recipe.passes);
  // Even where padding is all that is seen the image must be one that Pillow would open.
  const Region source = is_empty(resizer.source()) ? Region{0, 0, 1, 1} : resizer.source();
  if (!decoder.decode(header, bytes, size, source, soundness_of(recipe, flags))) {
    return IMSEQ_FOREIGN;
  }
  const Region& needed = resizer.source();
  for (int y = needed.top; y < needed.top + needed.height; ++y) {
    decoder.row(y, resizer.source_planes(y).data());
    resizer.add_row(y);
  }
  store_rows(recipe, view, num_planes, row);
  return IMSEQ_OK;
}

int32_t SampleDecoder::State::apply(const imseq_recipe& recipe, const imseq_key& key,
                                    const uint8_t* pixels, int width, int height, void* row) {
  imseq_view view;
  const int32_t status = draw_view(recipe, key, width, height, &view);
  if (status != IMSEQ_OK) return status;
  resizer.begin(view, recipe.out_height, recipe.out_width, 3, recipe.filter, recipe.passes);
  const Region& source = resizer.source();
  for (int y = source.top; y < source.top + source.height; ++y) {
    const uint8_t* pixel = pixels + (static_cast<size_t>(y) * width + source.left) * 3;
    const std::array<uint8_t*, 3> planes = resizer.source_planes(y);
    for (int x = 0; x < source.width; ++x, pixel += 3) {
      for (size_t c = 0; c < 3; ++c) planes[c][x] = pixel[c];
    }
    resizer.add_row(y);
  }
  store_rows(recipe, view, 3, row);
  return IMSEQ_OK;
}

void SampleDecoder::State::store_rows(const imseq_recipe& recipe, const imseq_view& view,
                                      int num_planes, void* row) {
  for (int y = 0; y < recipe.out_height; ++y) {
    std::array<const uint8_t*, 3> planes = resizer.output_row(y);
    if (num_planes == 1) planes = {planes[0], planes[0], planes[0]};
    store_row(recipe, planes, y, view.flip != 0, row);
  }
}

SampleDecoder::SampleDecoder() : state_(std::make_unique<State>()) {}
SampleDecoder::~SampleDecoder() = default;

int32_t SampleDecoder::decode(const imseq_recipe& recipe, imseq_sample* samples, int num_samples,
                              imseq_times* /*times*/, imseq_error* error) {
  int32_t result = IMSEQ_OK;
  for (imseq_sample* s = samples; s != samples + num_samples; ++s) {
    try {
      s->status =
          state_->decode(recipe, s->key, s->bytes, static_cast<size_t>(s->size), s->flags, s->row);
    } catch (const std::bad_alloc&) {
      s->status = IMSEQ_ERROR_MEMORY;
      if (result == IMSEQ_OK) {
        result = out_of_memory(error, s->key, static_cast<size_t>(s->size));
      }
    }
  }
  return result;
}

int32_t SampleDecoder::apply(const imseq_recipe& recipe, const imseq_key& key,
                             const uint8_t* pixels, int32_t width, int32_t height, void* row,
                             imseq_error* error) try {
  return state_->apply(recipe, key, pixels, width, height, row);
} catch (const std::bad_alloc&) {
  return out_of_memory(error, key, static_cast<size_t>(width) * static_cast<size_t>(height) * 3);
}

}  // namespace imseq
