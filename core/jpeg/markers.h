// Markers and byte stuffing of entropy-coded data (T.81 B.1.1.2, B.1.1.5, F.1.2.3).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cpu.h"
#include "jpeg/header.h"

namespace imseq {

struct MarkerKernels {
  // Finds bytes of 0xFF that a byte other than 0 follows: their offsets in [0, size), at most
  // max_markers of them. Returns how many.
  size_t (*find)(const uint8_t* bytes, size_t size, uint32_t* offsets, size_t max_markers);

  // Copies bytes without the 0 that follows each 0xFF. Returns the bytes written; up to kRowSlack
  // bytes behind them may be written, too. *sound becomes false where something other than 0, or
  // nothing, follows 0xFF; how such bytes are copied is left open.
  size_t (*unstuff)(const uint8_t* bytes, size_t size, uint8_t* out, bool* sound);
};

[[nodiscard]] const MarkerKernels& marker_kernels(CpuLevel level);

// Finds where the first num_intervals restart intervals of a scan end: offsets of their markers in the
// entropy-coded data. False where they are not RST0, RST1, ... and, behind the last interval, EOI.
[[nodiscard]] bool find_markers(const JpegHeader& header, const uint8_t* data, size_t size,
                                int64_t num_intervals, uint32_t* markers);

// How the APP9 segment begins in which packs say how long each restart interval is; with its NUL.
constexpr char kIntervalSizes[] = "imseq";

// The same from what packs say of their images (docs/format.md, "Sizes of the restart intervals"): that
// must add up to the file's size, but the markers are not looked at. False where nothing is said, or
// it does not add up.
[[nodiscard]] bool read_markers(const JpegHeader& header, const uint8_t* bytes, size_t size,
                                int64_t num_intervals, uint32_t* markers);

// Whether the marker is there that ends an interval.
[[nodiscard]] bool ends_interval(const uint8_t* marker, int64_t interval, bool is_last);

// Of each level, where this build has them.
extern const MarkerKernels kMarkerKernelsPortable, kMarkerKernelsAvx2, kMarkerKernelsAvx512;

}  // namespace imseq
