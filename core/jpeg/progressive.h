// Coefficients of JPEGs in several scans: progressive ones (SOF2), and sequential ones whose
// components do not all share one scan. Only packing needs them, once, to write them anew in one
// scan.
#pragma once

#include <cstddef>
#include <cstdint>

#include "jpeg/coefficients.h"

namespace imseq {

// Decodes all scans of a kSeveralScans image, whose header parse_jpeg has read. False: an anomaly
// anywhere up to the EOI marker, or a coefficient that the scans leave out or at less than full
// precision (libjpeg-turbo then guesses it from its neighbours, jdcoefct.c decompress_smooth_data).
//
// The header's Huffman tables and restart interval are those of the last scan afterwards. Blocks
// that only fill up an MCU get what libjpeg's encoder writes there, whatever the file has: scans of
// one component skip them, no pixel depends on them, and so an image has one canonical form however
// its scans were laid out.
[[nodiscard]] bool decode_scans(const uint8_t* bytes, size_t size, JpegHeader* header,
                                JpegCoefficients* out);

}  // namespace imseq
