// The kernels of colour.h with AVX2, where they are worth it.
#include <immintrin.h>

#include "jpeg/colour.h"

namespace imseq {

namespace {

using Vector = __m256i;

inline Vector load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const Vector*>(from));
}
inline void store(uint8_t* to, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(to), v); }
inline Vector words(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }

// ---- upsampling ---------------------------------------------------------------------------------

inline Vector load_words(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Vector triple(Vector v) { return _mm256_add_epi16(_mm256_add_epi16(v, v), v); }

// Left and right pixels of 16 samples or sums of two, given these and their neighbours.
template <int kLeftBias, int kRightBias, int kShift>
inline void store_pixels(Vector before, Vector own, Vector behind, uint8_t* out) {
  const Vector own3 = triple(own);
  const Vector left = _mm256_add_epi16(_mm256_add_epi16(own3, words(kLeftBias)), before);
  const Vector right = _mm256_add_epi16(_mm256_add_epi16(own3, words(kRightBias)), behind);
  const Vector right_in_place = _mm256_slli_epi16(_mm256_srli_epi16(right, kShift), 8);
  store(out, _mm256_or_si256(_mm256_srli_epi16(left, kShift), right_in_place));
}

// Steps of 16 samples write 32 pixels: no more than 30 too many.
void upsample_h2v1_avx2(const uint8_t* in, int begin, int end, int width, uint8_t* out) {
  const int first = begin == 0 ? 1 : begin, last = end == width ? width - 1 : end;
  for (int i = first; i < last; i += 16) {
    store_pixels<1, 2, 2>(load_words(in + i - 1), load_words(in + i), load_words(in + i + 1),
                          out + 2 * (i - begin));
  }
  // The outermost pixels of the image are their samples.
  if (begin == 0) {
    out[0] = in[0];
    out[1] = static_cast<uint8_t>((3 * in[0] + in[1] + 2) >> 2);
  }
  if (end == width) {
    uint8_t* pixel = out + 2 * (width - 1 - begin);
    pixel[0] = static_cast<uint8_t>((3 * in[width - 1] + in[width - 2] + 1) >> 2);
    pixel[1] = in[width - 1];
  }
}

void upsample_h2v2_avx2(const uint8_t* near, const uint8_t* far, int begin, int end, int width,
                        uint16_t* /*sums*/, uint8_t* out) {
  const auto sums = [&](int i) {
    return _mm256_add_epi16(triple(load_words(near + i)), load_words(far + i));
  };
  const auto sum = [&](int i) { return 3 * near[i] + far[i]; };
  const int first = begin == 0 ? 1 : begin, last = end == width ? width - 1 : end;
  for (int i = first; i < last; i += 16) {
    store_pixels<8, 7, 4>(sums(i - 1), sums(i), sums(i + 1), out + 2 * (i - begin));
  }
  // An outermost pixel's missing neighbour is the sample itself.
  if (begin == 0) {
    out[0] = static_cast<uint8_t>((4 * sum(0) + 8) >> 4);
    out[1] = static_cast<uint8_t>((3 * sum(0) + sum(1) + 7) >> 4);
  }
  if (end == width) {
    uint8_t* pixel = out + 2 * (width - 1 - begin);
    pixel[0] = static_cast<uint8_t>((3 * sum(width - 1) + sum(width - 2) + 8) >> 4);
    pixel[1] = static_cast<uint8_t>((4 * sum(width - 1) + 7) >> 4);
  }
}

// ---- conversion ---------------------------------------------------------------------------------

// Red and blue need one product only, and 1.402 and 1.772 in 14 bits give the same as
// jdcolor.c's 16 for all 256 values (colour_test.cpp tries them).
inline Vector red_part(Vector v) {
  return _mm256_mulhrs_epi16(_mm256_slli_epi16(v, 1), words(22970));
}
inline Vector blue_part(Vector u) {
  return _mm256_mulhrs_epi16(_mm256_slli_epi16(u, 1), words(29033));
}

// Both factors are even, so that half of each, which fits 16 bits, loses nothing.
inline Vector green_part(Vector u, Vector v) {
  constexpr int kU = -22554 / 2, kV = -46802 / 2, kShift = 15;
  const Vector factors =
      _mm256_set1_epi32((kU & 0xFFFF) | static_cast<int>(static_cast<unsigned>(kV) << 16));
  const auto sums = [&](Vector pairs) {
    const Vector rounding = _mm256_set1_epi32(1 << (kShift - 1));
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_madd_epi16(pairs, factors), rounding), kShift);
  };
  return _mm256_packs_epi32(sums(_mm256_unpacklo_epi16(u, v)), sums(_mm256_unpackhi_epi16(u, v)));
}

struct Rgb {
  Vector red, green, blue;
};
// y, and u = Cb - 128, v = Cr - 128.
inline Rgb converted(Vector y, Vector u, Vector v) {
  return {_mm256_add_epi16(y, red_part(v)), _mm256_add_epi16(y, green_part(u, v)),
          _mm256_add_epi16(y, blue_part(u))};
}

void ycc_to_rgb_avx2(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int n, uint8_t* r,
                     uint8_t* g, uint8_t* b) {
  const Vector zero = _mm256_setzero_si256(), centre = words(128);
  const auto low = [&](Vector v) { return _mm256_unpacklo_epi8(v, zero); };
  const auto high = [&](Vector v) { return _mm256_unpackhi_epi8(v, zero); };
  const auto centred = [&](Vector v) { return _mm256_sub_epi16(v, centre); };
  for (int i = 0; i < n; i += 32) {
    const Vector ys = load(y + i), cbs = load(cb + i), crs = load(cr + i);
    const Rgb first = converted(low(ys), centred(low(cbs)), centred(low(crs)));
    const Rgb second = converted(high(ys), centred(high(cbs)), centred(high(crs)));
    store(r + i, _mm256_packus_epi16(first.red, second.red));
    store(g + i, _mm256_packus_epi16(first.green, second.green));
    store(b + i, _mm256_packus_epi16(first.blue, second.blue));
  }
}

}  // namespace

const ColourKernels kColourAvx2 = {upsample_h2v1_avx2, upsample_h2v2_avx2, upsample_h1v2, replicate,
                                   ycc_to_rgb_avx2};

}  // namespace imseq
