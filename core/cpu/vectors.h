// Vectors of bytes and of 16-bit words, of the widest kind that the including file is compiled for:
// what kernels (*_loop.h) are written with that are one algorithm at every width.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace imseq {

namespace {

#if defined(__AVX512BW__)

using Bytes = __m512i;
using Words = __m512i;
constexpr int kWords = 32;

inline Bytes load(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v); }
inline Words load_words(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Words words(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
inline Words add(Words a, Words b) { return _mm512_add_epi16(a, b); }
inline Words subtract(Words a, Words b) { return _mm512_sub_epi16(a, b); }
// Words below 256, one from each, as alternating bytes.
template <int kShift>
inline Bytes interleave_shifted(Words even, Words odd) {
  const Words odd_in_place = _mm512_slli_epi16(_mm512_srli_epi16(odd, kShift), 8);
  return _mm512_or_si512(_mm512_srli_epi16(even, kShift), odd_in_place);
}
// The words of half of the bytes each, in an order that pack() undoes.
inline Words first_half(Bytes v) { return _mm512_unpacklo_epi8(v, _mm512_setzero_si512()); }
inline Words second_half(Bytes v) { return _mm512_unpackhi_epi8(v, _mm512_setzero_si512()); }
// Signed words, clamped to bytes.
inline Bytes pack(Words first, Words second) { return _mm512_packus_epi16(first, second); }
// (v * factor + 2^14) >> 15.
inline Words scaled(Words v, int factor) { return _mm512_mulhrs_epi16(v, words(factor)); }
// (a * kA + b * kB + 2^14) >> 15, the sum without overflow.
template <int kA, int kB>
inline Words scaled_sum(Words a, Words b) {
  const __m512i factors = _mm512_set1_epi32((kA & 0xFFFF) | static_cast<int>(kB * 0x10000u));
  const auto sums = [&](__m512i pairs) {
    return _mm512_srai_epi32(_mm512_dpwssd_epi32(_mm512_set1_epi32(1 << 14), pairs, factors), 15);
  };
  return _mm512_packs_epi32(sums(_mm512_unpacklo_epi16(a, b)), sums(_mm512_unpackhi_epi16(a, b)));
}

#elif defined(__AVX2__)

using Bytes = __m256i;
using Words = __m256i;
constexpr int kWords = 16;

inline Bytes load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline void store(uint8_t* to, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
inline Words load_words(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Words words(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
inline Words add(Words a, Words b) { return _mm256_add_epi16(a, b); }
inline Words subtract(Words a, Words b) { return _mm256_sub_epi16(a, b); }
template <int kShift>
inline Bytes interleave_shifted(Words even, Words odd) {
  const Words odd_in_place = _mm256_slli_epi16(_mm256_srli_epi16(odd, kShift), 8);
  return _mm256_or_si256(_mm256_srli_epi16(even, kShift), odd_in_place);
}
inline Words first_half(Bytes v) { return _mm256_unpacklo_epi8(v, _mm256_setzero_si256()); }
inline Words second_half(Bytes v) { return _mm256_unpackhi_epi8(v, _mm256_setzero_si256()); }
inline Bytes pack(Words first, Words second) { return _mm256_packus_epi16(first, second); }
inline Words scaled(Words v, int factor) { return _mm256_mulhrs_epi16(v, words(factor)); }
template <int kA, int kB>
inline Words scaled_sum(Words a, Words b) {
  const __m256i factors = _mm256_set1_epi32((kA & 0xFFFF) | static_cast<int>(kB * 0x10000u));
  const auto sums = [&](__m256i pairs) {
    const __m256i products = _mm256_madd_epi16(pairs, factors);
    return _mm256_srai_epi32(_mm256_add_epi32(products, _mm256_set1_epi32(1 << 14)), 15);
  };
  return _mm256_packs_epi32(sums(_mm256_unpacklo_epi16(a, b)), sums(_mm256_unpackhi_epi16(a, b)));
}

#else

using Bytes = uint8x16_t;
using Words = int16x8_t;
constexpr int kWords = 8;

inline Bytes load(const uint8_t* from) { return vld1q_u8(from); }
inline void store(uint8_t* to, Bytes v) { vst1q_u8(to, v); }
inline Words load_words(const uint8_t* from) {
  return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(from)));
}
inline Words words(int value) { return vdupq_n_s16(static_cast<int16_t>(value)); }
inline Words add(Words a, Words b) { return vaddq_s16(a, b); }
inline Words subtract(Words a, Words b) { return vsubq_s16(a, b); }
template <int kShift>
inline Bytes interleave_shifted(Words even, Words odd) {
  const uint8x16_t even_bytes =
      vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_s16(even), kShift));
  const uint8x16_t odd_bytes =
      vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_s16(odd), kShift));
  return vtrn1q_u8(even_bytes, odd_bytes);
}
inline Words first_half(Bytes v) { return vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v))); }
inline Words second_half(Bytes v) { return vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(v))); }
inline Bytes pack(Words first, Words second) {
  return vcombine_u8(vqmovun_s16(first), vqmovun_s16(second));
}
inline Words scaled(Words v, int factor) {
  return vqrdmulhq_n_s16(v, static_cast<int16_t>(factor));
}
template <int kA, int kB>
inline Words scaled_sum(Words a, Words b) {
  const auto sums = [](int16x4_t a4, int16x4_t b4) {
    return vrshrn_n_s32(vmlal_n_s16(vmull_n_s16(a4, kA), b4, kB), 15);
  };
  return vcombine_s16(sums(vget_low_s16(a), vget_low_s16(b)),
                      sums(vget_high_s16(a), vget_high_s16(b)));
}

#endif

}  // namespace

}  // namespace imseq
