#include <immintrin.h>

#include "jpeg/markers.h"

namespace imseq {

namespace {

constexpr size_t kStep = 32;

uint32_t equal_bytes(__m256i a, __m256i b) {
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b)));
}

__m256i load(const uint8_t* bytes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}

size_t find(const uint8_t* bytes, size_t size, uint32_t* offsets, size_t max_markers) {
  const __m256i ff = _mm256_set1_epi8(-1), zero = _mm256_setzero_si256();
  size_t num_found = 0, at = 0;
  for (; at + kStep < size && num_found < max_markers; at += kStep) {
    uint32_t marker = equal_bytes(load(bytes + at), ff);
    if (marker == 0) continue;
    marker &= ~equal_bytes(load(bytes + at + 1), zero);
    for (; marker != 0 && num_found < max_markers; marker &= marker - 1) {
      offsets[num_found++] =
          static_cast<uint32_t>(at) + static_cast<uint32_t>(__builtin_ctz(marker));
    }
  }
  for (; at + 1 < size && num_found < max_markers; ++at) {
    if (bytes[at] == 0xFF && bytes[at + 1] != 0) offsets[num_found++] = static_cast<uint32_t>(at);
  }
  return num_found;
}

size_t unstuff(const uint8_t* bytes, size_t size, uint8_t* out, bool* sound) {
  const __m256i ff = _mm256_set1_epi8(-1);
  uint8_t* const begin = out;
  size_t at = 0;
  while (at < size) {
    if (at + kStep <= size) {
      // Copies 32 bytes, of which those behind the first 0xFF are written again.
      const __m256i values = load(bytes + at);
      const uint32_t is_ff = equal_bytes(values, ff);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), values);
      const size_t run = is_ff == 0 ? kStep : static_cast<size_t>(__builtin_ctz(is_ff)) + 1;
      at += run;
      out += run;
      if (is_ff == 0) continue;
    } else {
      *out++ = bytes[at++];
      if (bytes[at - 1] != 0xFF) continue;
    }
    if (at == size || bytes[at] != 0) *sound = false;
    ++at;
  }
  return static_cast<size_t>(out - begin);
}

}  // namespace

const MarkerKernels kMarkersAvx2 = {find, unstuff};

}  // namespace imseq
