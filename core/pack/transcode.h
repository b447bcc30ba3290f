// Packing's lossless re-coding: the same coefficients under other Huffman tables, with restart
// markers. docs/format.md, "Canonical form", says what comes out.
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
  bool strip;                // leave out metadata that does not change what the image looks like
  const uint8_t* tables;     // of the pack; null: fitted to the image
};

// Keeps its memory from image to image, but for that of very large ones.
class Transcoder {
 public:
  // Statuses as of imseq_transcode. *entropy_offset: where the entropy-coded data begin in `out`.
  [[nodiscard]] int32_t transcode(const uint8_t* bytes, size_t size,
                                  const TranscodeSettings& settings, uint8_t* out, size_t capacity,
                                  size_t* out_size, size_t* entropy_offset, imseq_error* error);

  // Adds to counts. False: not to be re-coded, nothing is added.
  [[nodiscard]] bool count_symbols(const uint8_t* bytes, size_t size, int32_t restart_interval,
                                   uint64_t* counts);

  // Of the last image.
  [[nodiscard]] const JpegHeader& header() const { return header_; }
  // After every image, whatever came of it: frees what so few images need that a thread should not
  // keep it.
  void trim();

 private:
  bool take_apart(const uint8_t* bytes, size_t size, int32_t restart_interval);

  JpegHeader header_;
  JpegCoefficients coefficients_;
  ScanTokens scan_;
};

}  // namespace imseq
