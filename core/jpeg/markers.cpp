#include "jpeg/markers.h"

#include <cstring>

namespace imseq {

namespace {

const uint8_t* find_ff(const uint8_t* from, const uint8_t* end) {
  const void* found = std::memchr(from, 0xFF, static_cast<size_t>(end - from));
  return found == nullptr ? end : static_cast<const uint8_t*>(found);
}

size_t find(const uint8_t* bytes, size_t size, uint32_t* offsets, size_t max_markers) {
  const uint8_t* const end = bytes + size;
  size_t num_found = 0;
  for (const uint8_t* at = bytes; num_found < max_markers; ++at) {
    at = find_ff(at, end);
    if (end - at < 2) break;
    if (at[1] != 0) offsets[num_found++] = static_cast<uint32_t>(at - bytes);
  }
  return num_found;
}

size_t unstuff(const uint8_t* bytes, size_t size, uint8_t* out, bool* sound) {
  const uint8_t* const end = bytes + size;
  uint8_t* const begin = out;
  while (bytes < end) {
    const uint8_t* ff = find_ff(bytes, end);
    const auto run = static_cast<size_t>(ff - bytes) + (ff == end ? 0 : 1);
    std::memcpy(out, bytes, run);
    out += run;
    bytes += run;
    if (ff == end) break;
    if (bytes == end || *bytes++ != 0) *sound = false;
  }
  return static_cast<size_t>(out - begin);
}

}  // namespace

bool ends_interval(const uint8_t* marker, int64_t interval, bool is_last) {
  const int expected = is_last ? kEoi : kRst0 + static_cast<int>(interval & 7);
  return marker[0] == 0xFF && marker[1] == expected;
}

bool find_markers(const JpegHeader& header, const uint8_t* data, size_t size, int64_t num_intervals,
                  uint32_t* markers) {
  const auto wanted = static_cast<size_t>(num_intervals);
  if (marker_kernels(cpu_level()).find(data, size, markers, wanted) < wanted) return false;
  for (int64_t i = 0; i < num_intervals; ++i) {
    if (!ends_interval(data + markers[i], i, i + 1 == header.num_intervals())) return false;
  }
  return true;
}

bool read_markers(const JpegHeader& header, const uint8_t* bytes, size_t size,
                  int64_t num_intervals, uint32_t* markers) {
  // The segment lies right before the scan header.
  if (header.segments.size() < 2) return false;
  const JpegSegment& segment = header.segments[header.segments.size() - 2];
  const auto num_sizes = static_cast<size_t>(header.num_intervals());
  const JpegPayload payload = segment.payload(bytes);
  if (segment.marker != kApp9 || payload.size != sizeof(kIntervalSizes) + 2 * num_sizes ||
      !payload.starts_with(kIntervalSizes, sizeof(kIntervalSizes))) {
    return false;
  }
  uint32_t end = 0;  // at most 32763 sizes of 16 bits
  for (size_t i = 0; i < num_sizes; ++i) {
    const auto interval_bytes = static_cast<uint32_t>(payload.u16(sizeof(kIntervalSizes) + 2 * i));
    if (interval_bytes < 2) return false;
    end += interval_bytes;
    if (static_cast<int64_t>(i) < num_intervals) markers[i] = end - 2;
  }
  return end == size - header.entropy_offset;
}

const MarkerKernels& marker_kernels(CpuLevel level) {
  static constexpr MarkerKernels kPortable = {find, unstuff};
  return *kernels_of_level<&kPortable, &kMarkersAvx2, &kMarkersAvx512, &kPortable>(level);
}

}  // namespace imseq
