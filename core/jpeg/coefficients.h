// Decodes all coefficients of an image, for packing. Pixels come from region.h, which is faster.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "jpeg/header.h"

namespace imseq {

// The quantised coefficients of all blocks.
struct JpegCoefficients {
  // Blocks row by row, 64 values each in zigzag order.
  std::array<std::vector<int16_t>, 3> components;
  std::array<int, 3> blocks_wide{};
  size_t end_offset = 0;  // first byte behind the EOI marker

  // Makes room for the image's blocks, all zero.
  void reset(const JpegHeader& header);
  [[nodiscard]] int16_t* block(int component, int y, int x) {
    const auto c = static_cast<size_t>(component);
    return components[c].data() + (static_cast<size_t>(y) * blocks_wide[c] + x) * 64;
  }
  [[nodiscard]] const int16_t* block(int component, int y, int x) const {
    return const_cast<JpegCoefficients*>(this)->block(component, y, x);
  }
};

// Decodes a kBaseline image. False: there is an anomaly before the EOI marker.
[[nodiscard]] bool decode_coefficients(const JpegHeader& header, const uint8_t* bytes, size_t size,
                                       JpegCoefficients* out);

// Decodes all scans of a kSeveralScans image, whose header parse_jpeg has read. False: there is an
// anomaly before the EOI marker, or the scans omit a coefficient or some of its bits (libjpeg-turbo
// then guesses it from its neighbours, jdcoefct.c decompress_smooth_data).
//
// Afterwards the header's Huffman tables and restart interval are those of the last scan. Blocks
// that only pad an MCU get the values that libjpeg's encoder writes there: scans of one component
// skip them and no pixel depends on them, so the canonical form must not depend on the file's.
[[nodiscard]] bool decode_scans(const uint8_t* bytes, size_t size, JpegHeader* header,
                                JpegCoefficients* out);

}  // namespace imseq
