// Stores with AVX2. The last vector of a row begins earlier if it would not be whole, and stores
// some values a second time.
#include <immintrin.h>

#include <cstring>

#include "sample/store.h"

namespace imseq {

namespace {

// Calls at(x) for x = 0, kStep, ... so that [x, x + kStep) covers [0, n); n >= kStep.
template <size_t kStep, typename At>
inline void for_vectors(size_t n, const At& at) {
  size_t x = 0;
  for (; x + kStep <= n; x += kStep) at(x);
  if (x < n) at(n - kStep);
}

inline __m128i load_128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// Pixels [x, x + 16) of n that may be flipped.
inline __m128i load_pixels(const uint8_t* pixels, size_t x, size_t n, bool flip) {
  if (!flip) return load_128(pixels + x);
  const __m128i reversed = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm_shuffle_epi8(load_128(pixels + n - 16 - x), reversed);
}

constexpr size_t kPixels = 16;

// The table entries of eight pixels, kStep bytes apart. Single loads are faster than gathers.
template <int kStep>
inline __m128i look_up_words(const uint8_t* table, const uint8_t* pixels) {
  const auto entry = [&](int i) {
    int16_t value;
    std::memcpy(&value, table + 2 * pixels[i * kStep], sizeof value);
    return value;
  };
  return _mm_setr_epi16(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6),
                        entry(7));
}

template <int kStep>
inline __m128i look_up_dwords(const uint8_t* table, const uint8_t* pixels) {
  const auto entry = [&](int i) {
    int32_t value;
    std::memcpy(&value, table + 4 * pixels[i * kStep], sizeof value);
    return value;
  };
  return _mm_setr_epi32(entry(0), entry(1), entry(2), entry(3));
}

// Stores the values of 16 pixels, kStep bytes apart.
template <int kBytes, int kStep>
inline void look_up_16(const uint8_t* pixels, const uint8_t* table, uint8_t* out) {
  constexpr int kValues = 16 / kBytes;
  for (int v = 0; v < kBytes; ++v) {
    const uint8_t* from = pixels + v * kValues * kStep;
    const __m128i values =
        kBytes == 2 ? look_up_words<kStep>(table, from) : look_up_dwords<kStep>(table, from);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out) + v, values);
  }
}

template <int kBytes>
void prepare_table(const void* table, uint8_t* prepared) {
  std::memcpy(prepared, table, 256 * kBytes);
}

template <int kBytes>
void convert(const uint8_t* pixels, size_t n, bool flip, const uint8_t* prepared, void* out) {
  auto* to = static_cast<uint8_t*>(out);
  if (n < kPixels) {
    for (size_t x = 0; x < n; ++x) {
      const uint8_t* pixel = pixels + (flip ? n - 1 - x : x);
      std::memcpy(to + kBytes * x, kBytes == 1 ? pixel : prepared + kBytes * *pixel, kBytes);
    }
    return;
  }
  for_vectors<kPixels>(n, [&](size_t x) {
    if constexpr (kBytes == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + x), load_pixels(pixels, x, n, flip));
    } else if (flip) {
      look_up_16<kBytes, -1>(pixels + n - 1 - x, prepared, to + kBytes * x);
    } else {
      look_up_16<kBytes, 1>(pixels + x, prepared, to + kBytes * x);
    }
  });
}

// Three output vectors hold a vector of each channel. bytes[v][c]: which byte of channel c goes to
// each byte of output vector v; 0x80: none.
struct InterleavePlaces {
  alignas(16) uint8_t bytes[3][3][16];
};

constexpr InterleavePlaces interleave_places(int value_bytes) {
  InterleavePlaces places{};
  for (int i = 0; i < 48; ++i) {
    const int value = i / value_bytes, place = value / 3 * value_bytes + i % value_bytes;
    for (int c = 0; c < 3; ++c) {
      places.bytes[i / 16][c][i % 16] = static_cast<uint8_t>(value % 3 == c ? place : 0x80);
    }
  }
  return places;
}

template <int kBytes>
void interleave(const void* const* channels, size_t n, void* out) {
  static constexpr InterleavePlaces kPlaces = interleave_places(kBytes);
  constexpr size_t kValues = 16 / kBytes;
  const auto* red = static_cast<const uint8_t*>(channels[0]);
  const auto* green = static_cast<const uint8_t*>(channels[1]);
  const auto* blue = static_cast<const uint8_t*>(channels[2]);
  auto* to = static_cast<uint8_t*>(out);
  if (n < kValues) {
    for (size_t x = 0; x < kBytes * n; x += kBytes, to += 3 * kBytes) {
      std::memcpy(to, red + x, kBytes);
      std::memcpy(to + kBytes, green + x, kBytes);
      std::memcpy(to + 2 * kBytes, blue + x, kBytes);
    }
    return;
  }
  for_vectors<kValues>(n, [&](size_t x) {
    const __m128i r = load_128(red + kBytes * x), g = load_128(green + kBytes * x);
    const __m128i b = load_128(blue + kBytes * x);
    for (size_t v = 0; v < 3; ++v) {
      const __m128i two = _mm_or_si128(_mm_shuffle_epi8(r, load_128(kPlaces.bytes[v][0])),
                                       _mm_shuffle_epi8(g, load_128(kPlaces.bytes[v][1])));
      const __m128i values = _mm_or_si128(two, _mm_shuffle_epi8(b, load_128(kPlaces.bytes[v][2])));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * kBytes * x + 16 * v), values);
    }
  });
}

}  // namespace

const StoreKernels kStoreAvx2 = {{prepare_table<1>, prepare_table<2>, prepare_table<4>},
                                 {convert<1>, convert<2>, convert<4>},
                                 {convert<1>, convert<2>, convert<4>},
                                 [] {},
                                 {interleave<1>, interleave<2>, interleave<4>}};

}  // namespace imseq
