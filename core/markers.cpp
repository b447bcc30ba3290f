#include "markers.h"

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
    if (ff == end || bytes == end) break;
    if (*bytes != 0) *sound = false;
    ++bytes;
  }
  return static_cast<size_t>(out - begin);
}

}  // namespace

const MarkerKernels kMarkerKernelsPortable = {find, unstuff};

bool find_markers(const JpegHeader& header, const uint8_t* data, size_t size, int64_t num_intervals,
                  uint32_t* markers) {
  constexpr int kRst0 = 0xD0, kEoi = 0xD9;
  const auto wanted = static_cast<size_t>(num_intervals);
  if (marker_kernels(cpu_level()).find(data, size, markers, wanted) < wanted) return false;
  for (size_t i = 0; i < wanted; ++i) {
    const bool is_last = static_cast<int64_t>(i) + 1 == header.num_intervals();
    const int expected = is_last ? kEoi : kRst0 + static_cast<int>(i & 7);
    if (data[markers[i] + 1] != expected) return false;
  }
  return true;
}

const MarkerKernels& marker_kernels(CpuLevel level) {
  switch (level) {
#if defined(__x86_64__)
    case CpuLevel::kAvx2:
      return kMarkerKernelsAvx2;
    case CpuLevel::kAvx512:
      return kMarkerKernelsAvx512;
#endif
    default:
      return kMarkerKernelsPortable;
  }
}

}  // namespace imseq
