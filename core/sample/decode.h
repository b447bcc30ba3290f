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

  // Fills in each sample's status. IMSEQ_OK: its row is filled. IMSEQ_FOREIGN: Pillow must decode;
  // the row is undefined. Below zero: *error says more of the first such sample, whose status is
  // returned. Reads nothing outside a sample's bytes. At most IMSEQ_MAX_GROUP samples.
  [[nodiscard]] int32_t decode(const imseq_recipe& recipe, imseq_sample* samples, int num_samples,
                               imseq_times* times, imseq_error* error);

  // One sample from its height x width x 3 decoded bytes.
  [[nodiscard]] int32_t apply(const imseq_recipe& recipe, const imseq_key& key,
                              const uint8_t* pixels, int32_t width, int32_t height, void* row,
                              imseq_error* error);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace imseq
