// Writes the marker segments of a re-coded image. docs/format.md, "Canonical form", defines them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "jpeg/header.h"
#include "pack/huffman.h"

namespace imseq {

// Collects marker segments.
struct HeaderWriter {
  std::vector<uint8_t> bytes;

  void segment(uint8_t code, const std::vector<uint8_t>& payload) {
    const size_t size = payload.size() + 2;
    bytes.insert(bytes.end(),
                 {0xFF, code, static_cast<uint8_t>(size >> 8), static_cast<uint8_t>(size)});
    bytes.insert(bytes.end(), payload.begin(), payload.end());
  }
};

// Writes everything before the scan header, except the intervals' sizes. strip: of the metadata
// only those that affect how the image looks. False: there are some that would be wrong for the
// re-coded image.
[[nodiscard]] bool write_head(const JpegHeader& header, const uint8_t* bytes, bool strip,
                              int32_t restart_interval, const HuffmanCodes& codes,
                              HeaderWriter* writer);
void write_scan_header(const JpegHeader& header, HeaderWriter* writer);

// The APP9 segment with the bytes that each restart interval takes, its marker included; and its
// own size, 0 where there are too many intervals for a segment.
[[nodiscard]] size_t interval_sizes_bytes(size_t num_intervals);
void write_interval_sizes(const std::vector<size_t>& sizes, HeaderWriter* writer);

}  // namespace imseq
