// Decodes samples by a recipe: draws the view, decodes the part it needs, resizes, flips, stores.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "imagenet_seq.h"

namespace imseq {

// Scratch memory and tables of one thread. Samples beyond 2 MB are given back after each image.
class SampleDecoder {
 public:
  SampleDecoder();
  ~SampleDecoder();
  SampleDecoder(const SampleDecoder&) = delete;
  SampleDecoder& operator=(const SampleDecoder&) = delete;

  // Sets each sample's status. IMSEQ_OK: its row is filled. IMSEQ_NOT_DECODED: Pillow must decode it
  // and the row is undefined. Below zero: an error; the first one is returned and described in
  // *error. Reads nothing outside a sample's bytes. At most IMSEQ_MAX_GROUP samples.
  [[nodiscard]] int32_t decode(const imseq_recipe& recipe, imseq_sample* samples, int num_samples,
                               imseq_times* times, imseq_error* error);

  // Does the same for one sample that is decoded already: height x width x 3 bytes.
  [[nodiscard]] int32_t apply(const imseq_recipe& recipe, const imseq_key& key,
                              const uint8_t* pixels, int32_t width, int32_t height, void* row,
                              imseq_error* error);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace imseq
