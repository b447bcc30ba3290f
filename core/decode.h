// One sample through the recipe: draw the view, decode what it needs, resize, flip, store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "imagenet_seq.h"

namespace imseq {

// Scratch memory and tables of one thread; grows to the largest image seen and stays.
class SampleDecoder {
 public:
  SampleDecoder();
  ~SampleDecoder();
  SampleDecoder(const SampleDecoder&) = delete;
  SampleDecoder& operator=(const SampleDecoder&) = delete;

  // IMSEQ_OK: row is filled. IMSEQ_FOREIGN: Pillow must decide; row is undefined.
  // Reads nothing outside bytes[0, size). flags: IMSEQ_SAMPLE_....
  [[nodiscard]] int32_t decode(const imseq_recipe& recipe, const imseq_key& key,
                               const uint8_t* bytes, size_t size, uint32_t flags, void* row,
                               imseq_error* error);

  // The same from height x width x 3 decoded bytes.
  [[nodiscard]] int32_t apply(const imseq_recipe& recipe, const imseq_key& key,
                              const uint8_t* pixels, int32_t width, int32_t height, void* row,
                              imseq_error* error);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace imseq
