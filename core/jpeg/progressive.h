// Decodes all coefficients of JPEGs with several scans: progressive ones (SOF2), and sequential
// ones whose components do not share one scan. Only packing needs them, to write them in one scan.
#pragma once

#include <cstddef>
#include <cstdint>

#include "jpeg/coefficients.h"

namespace imseq {

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
