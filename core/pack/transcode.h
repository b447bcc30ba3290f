// Re-codes JPEGs without loss for packing: the same coefficients with other Huffman tables and with
// restart markers. docs/format.md, "Canonical form", defines the result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "imagenet_seq.h"
#include "jpeg/coefficients.h"
#include "jpeg/header.h"
#include "pack/tokens.h"

namespace imseq {

struct TranscodeSettings {
  int32_t restart_interval;  // MCUs, 0: none
  bool strip;                // omit metadata that does not affect how the image looks
  const uint8_t* tables;     // of the pack; null: fitted to the image
};

// Reuses its memory, except that of very large images.
class Transcoder {
 public:
  // Returns statuses as imseq_transcode. *entropy_offset: where the entropy-coded data begin in
  // `out`.
  [[nodiscard]] int32_t transcode(const uint8_t* bytes, size_t size,
                                  const TranscodeSettings& settings, uint8_t* out, size_t capacity,
                                  size_t* out_size, size_t* entropy_offset, imseq_error* error);

  // Adds to counts. False: the image can't be re-coded, and nothing is added.
  [[nodiscard]] bool count_symbols(const uint8_t* bytes, size_t size, int32_t restart_interval,
                                   uint64_t* counts);

  // The header of the last image.
  [[nodiscard]] const JpegHeader& header() const { return header_; }
  // Call after every image: frees the memory if the image was very large.
  void trim();

 private:
  bool take_apart(const uint8_t* bytes, size_t size, int32_t restart_interval);

  JpegHeader header_;
  JpegCoefficients coefficients_;
  ScanTokens scan_;
};

}  // namespace imseq
