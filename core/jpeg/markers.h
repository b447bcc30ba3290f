// Markers and byte stuffing of entropy-coded data (T.81 B.1.1.2, B.1.1.5, F.1.2.3).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cpu.h"
#include "jpeg/header.h"

namespace imseq {

struct MarkerKernels {
  // Finds up to max_markers bytes of 0xFF that a byte other than 0 follows. Writes their offsets
  // and returns their number.
  size_t (*find)(const uint8_t* bytes, size_t size, uint32_t* offsets, size_t max_markers);

  // Copies bytes without the 0 that follows each 0xFF. Returns the number of bytes written; may
  // write up to kRowSlack bytes behind them. Sets *sound to false if something other than 0, or
  // nothing, follows a 0xFF; what is copied then is undefined.
  size_t (*unstuff)(const uint8_t* bytes, size_t size, uint8_t* out, bool* sound);
};

[[nodiscard]] const MarkerKernels& marker_kernels(CpuLevel level);

// Finds the markers behind the first num_intervals restart intervals of a scan: their offsets in
// the entropy-coded data. False: they are not RST0, RST1, ... and, behind the last interval, EOI.
[[nodiscard]] bool find_markers(const JpegHeader& header, const uint8_t* data, size_t size,
                                int64_t num_intervals, uint32_t* markers);

// The first bytes, with their NUL, of the APP9 segment in which packs store the size of each
// restart interval.
constexpr char kIntervalSizes[] = "imseq";

// The same from the sizes that packs store in their images (docs/format.md, "Sizes of the restart
// intervals"), without reading the markers. False: there are no sizes, or they do not add up to the
// file's size.
[[nodiscard]] bool read_markers(const JpegHeader& header, const uint8_t* bytes, size_t size,
                                int64_t num_intervals, uint32_t* markers);

// Whether this is the marker that ends the interval.
[[nodiscard]] bool ends_interval(const uint8_t* marker, int64_t interval, bool is_last);

extern const MarkerKernels kMarkersAvx2, kMarkersAvx512;

}  // namespace imseq
