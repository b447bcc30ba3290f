#include <immintrin.h>

#include "jpeg/markers.h"

namespace imseq {

namespace {

constexpr size_t kStep = 64;

__mmask64 first_bytes(size_t n) { return n >= kStep ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

size_t find(const uint8_t* bytes, size_t size, uint32_t* offsets, size_t max_markers) {
  const __m512i ff = _mm512_set1_epi8(-1);
  size_t num_found = 0;
  for (size_t at = 0; at + 1 < size && num_found < max_markers; at += kStep) {
    const size_t left = size - at;
    __mmask64 marker;
    if (left > kStep) {
      marker = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(bytes + at), ff);
      if (marker == 0) continue;
      const __m512i next = _mm512_loadu_si512(bytes + at + 1);
      marker = _mm512_mask_test_epi8_mask(marker, next, next);
    } else {
      const __m512i values = _mm512_maskz_loadu_epi8(first_bytes(left), bytes + at);
      const __m512i next = _mm512_maskz_loadu_epi8(first_bytes(left - 1), bytes + at + 1);
      marker = _mm512_mask_test_epi8_mask(_mm512_cmpeq_epi8_mask(values, ff), next, next);
    }
    for (; marker != 0 && num_found < max_markers; marker &= marker - 1) {
      offsets[num_found++] =
          static_cast<uint32_t>(at) + static_cast<uint32_t>(__builtin_ctzll(marker));
    }
  }
  return num_found;
}

size_t unstuff(const uint8_t* bytes, size_t size, uint8_t* out, bool* sound) {
  const __m512i ff = _mm512_set1_epi8(-1);
  uint8_t* const begin = out;
  __mmask64 after_last = 0;  // bit 0: the byte before was 0xFF
  __mmask64 unsound = 0;
  for (size_t at = 0; at < size; at += kStep) {
    const __mmask64 there = first_bytes(size - at);
    const __m512i values = _mm512_maskz_loadu_epi8(there, bytes + at);
    const __mmask64 is_ff = _mm512_cmpeq_epi8_mask(values, ff);
    const __mmask64 stuffed = (is_ff << 1 | after_last) & there;
    after_last = is_ff >> 63;
    const __mmask64 keep = there & ~stuffed;
    if (stuffed == 0) {
      _mm512_storeu_si512(out, values);
    } else {
      unsound |= _mm512_mask_test_epi8_mask(stuffed, values, values);
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(keep, values));
    }
    out += __builtin_popcountll(keep);
  }
  if (unsound != 0 || (size > 0 && bytes[size - 1] == 0xFF)) *sound = false;
  return static_cast<size_t>(out - begin);
}

}  // namespace

const MarkerKernels kMarkersAvx512 = {find, unstuff};

}  // namespace imseq
