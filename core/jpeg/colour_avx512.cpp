// The kernels of colour.h with AVX-512, where they are worth it.
#include <immintrin.h>

#include "jpeg/colour.h"

namespace imseq {

namespace {

using Vector = __m512i;

inline Vector load(const void* from) { return _mm512_loadu_si512(from); }
inline Vector words(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }

// ---- upsampling ---------------------------------------------------------------------------------

inline Vector load_words(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vector triple(Vector v) { return _mm512_add_epi16(_mm512_add_epi16(v, v), v); }

// Left and right pixels of 32 samples or sums of two, given these and their neighbours.
template <int kLeftBias, int kRightBias, int kShift>
inline void store_pixels(Vector before, Vector own, Vector behind, uint8_t* out) {
  const Vector own3 = triple(own);
  const Vector left = _mm512_add_epi16(_mm512_add_epi16(own3, words(kLeftBias)), before);
  const Vector right = _mm512_add_epi16(_mm512_add_epi16(own3, words(kRightBias)), behind);
  const Vector right_in_place = _mm512_slli_epi16(_mm512_srli_epi16(right, kShift), 8);
  _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi16(left, kShift), right_in_place));
}

// Steps of 32 samples write 64 pixels: no more than 62 too many.
void upsample_h2v1_avx512(const uint8_t* in, int begin, int end, int width, uint8_t* out) {
  const int first = begin == 0 ? 1 : begin, last = end == width ? width - 1 : end;
  for (int i = first; i < last; i += 32) {
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

void upsample_h2v2_avx512(const uint8_t* near, const uint8_t* far, int begin, int end, int width,
                          uint16_t* /*sums*/, uint8_t* out) {
  const auto sums = [&](int i) {
    return _mm512_add_epi16(triple(load_words(near + i)), load_words(far + i));
  };
  const auto sum = [&](int i) { return 3 * near[i] + far[i]; };
  const int first = begin == 0 ? 1 : begin, last = end == width ? width - 1 : end;
  for (int i = first; i < last; i += 32) {
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

// Where pairs of Cb and Cr come from: every other pixel of one half of each 128-bit lane, the first
// of them `offset`; the mask that goes with it makes words of the bytes.
struct Pairs {
  alignas(64) uint8_t index[64];
};
constexpr Pairs pairs_from(int offset) {
  Pairs pairs{};
  for (int i = 0; i < 64; i += 2) {
    const int pixel = i / 16 * 16 + offset + i % 16 / 4 * 2;
    pairs.index[i] = static_cast<uint8_t>(pixel + i % 4 / 2 * 64);
  }
  return pairs;
}
constexpr Pairs kPairs[2][2] = {{pairs_from(0), pairs_from(1)}, {pairs_from(8), pairs_from(9)}};

// (-22554 u - 46802 v + half) >> 16, u = Cb - 128 and v = Cr - 128, for one half of each lane. The
// factor of v does not fit 16 bits: its whole part is left out of the product.
inline Vector green_part(Vector cb, Vector cr, Vector v, const Pairs (&pairs)[2]) {
  constexpr int kCb = -22554, kCr = 65536 - 46802, kHalf = 1 << 15;
  const Vector factors = _mm512_set1_epi32((kCb & 0xFFFF) | kCr << 16);
  const Vector rounding = _mm512_set1_epi32(kHalf - 128 * (kCb + kCr));
  const auto sums = [&](const Pairs& from) {
    const Vector pair =
        _mm512_maskz_permutex2var_epi8(0x5555555555555555, cb, load(from.index), cr);
    return _mm512_dpwssd_epi32(rounding, pair, factors);
  };
  // The upper words of both, one behind the other.
  const Vector upper_to_lower = _mm512_set4_epi32(0x0F0E, 0x0B0A, 0x0706, 0x0302);
  const Vector shifted =
      _mm512_mask_shuffle_epi8(sums(pairs[1]), 0x3333333333333333, sums(pairs[0]), upper_to_lower);
  return _mm512_sub_epi16(shifted, v);
}

// Red and blue need one product only, and 1.402 and 1.772 in 14 bits give the same as
// jdcolor.c's 16 for all 256 values (colour_test.cpp tries them).
inline Vector red_part(Vector v) {
  return _mm512_mulhrs_epi16(_mm512_slli_epi16(v, 1), words(22970));
}
inline Vector blue_part(Vector u) {
  return _mm512_mulhrs_epi16(_mm512_slli_epi16(u, 1), words(29033));
}

void ycc_to_rgb_avx512(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int n, uint8_t* r,
                       uint8_t* g, uint8_t* b) {
  const Vector zero = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 64) {
    const Vector ys = load(y + i), cbs = load(cb + i), crs = load(cr + i);
    Vector red[2], green[2], blue[2];
    const auto convert = [&](int half, Vector luma, Vector u, Vector v) {
      red[half] = _mm512_add_epi16(luma, red_part(v));
      green[half] = _mm512_add_epi16(luma, green_part(cbs, crs, v, kPairs[half]));
      blue[half] = _mm512_add_epi16(luma, blue_part(u));
    };
    convert(0, _mm512_unpacklo_epi8(ys, zero),
            _mm512_sub_epi16(_mm512_unpacklo_epi8(cbs, zero), words(128)),
            _mm512_sub_epi16(_mm512_unpacklo_epi8(crs, zero), words(128)));
    convert(1, _mm512_unpackhi_epi8(ys, zero),
            _mm512_sub_epi16(_mm512_unpackhi_epi8(cbs, zero), words(128)),
            _mm512_sub_epi16(_mm512_unpackhi_epi8(crs, zero), words(128)));
    _mm512_storeu_si512(r + i, _mm512_packus_epi16(red[0], red[1]));
    _mm512_storeu_si512(g + i, _mm512_packus_epi16(green[0], green[1]));
    _mm512_storeu_si512(b + i, _mm512_packus_epi16(blue[0], blue[1]));
  }
}

}  // namespace

const ColourKernels kColourAvx512 = {upsample_h2v1_avx512, upsample_h2v2_avx512, upsample_h1v2,
                                     replicate, ycc_to_rgb_avx512};

}  // namespace imseq
