// Stores with AVX-512. Look-up tables stay in registers, one table for each byte of a value.
#include <immintrin.h>

#include "sample/store.h"

namespace imseq {

namespace {

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

constexpr __mmask64 first_bits(size_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

struct alignas(64) Places {
  uint8_t bytes[64];
};

// The order of 64 pixels after which unpacking, which works within 128-bit lanes, leaves values of
// kBytes bytes in order.
template <int kBytes>
constexpr Places places_before_unpacking() {
  Places places{};
  constexpr int kRun = 16 / kBytes;  // values of a lane of one vector
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 16, vector = i % 16 / kRun, place = i % kRun;
    places.bytes[i] = static_cast<uint8_t>(64 / kBytes * vector + kRun * lane + place);
  }
  return places;
}

// The same for m pixels whose last comes first.
inline __m512i flipped(__m512i places, size_t m) {
  return _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(m - 1)), places);
}

inline void store_values(uint8_t* out, __m512i values, size_t num_bytes) {
  if (num_bytes >= 64) {
    _mm512_storeu_si512(out, values);
  } else {
    _mm512_mask_storeu_epi8(out, first_bits(num_bytes), values);
  }
}

// ---- tables -------------------------------------------------------------------------------------

// Byte b of value v at prepared[256 * b + v].
void split_words(const void* table, uint8_t* prepared) {
  for (size_t v = 0; v < 256; v += 32) {
    const __m512i values = load(static_cast<const uint8_t*>(table) + 2 * v);
    const __m512i high = _mm512_srli_epi16(values, 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + v), _mm512_cvtepi16_epi8(values));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + 256 + v), _mm512_cvtepi16_epi8(high));
  }
}

void split_doublewords(const void* table, uint8_t* prepared) {
  for (size_t v = 0; v < 256; v += 16) {
    __m512i values = load(static_cast<const uint8_t*>(table) + 4 * v);
    for (size_t b = 0; b < 4; ++b, values = _mm512_srli_epi32(values, 8)) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(prepared + 256 * b + v),
                       _mm512_cvtepi32_epi8(values));
    }
  }
}

// One byte of each of 256 values, in four registers.
struct ByteTable {
  __m512i quarters[4];
};

inline __m512i look_up(const ByteTable& table, __m512i pixels, __mmask64 upper_half) {
  const __m512i low = _mm512_permutex2var_epi8(table.quarters[0], pixels, table.quarters[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.quarters[2], pixels, table.quarters[3]);
  return _mm512_mask_mov_epi8(low, upper_half, high);
}

// Looks up 64 pixels: kBytes vectors of values.
template <int kBytes>
inline void look_up_values(const ByteTable (&tables)[kBytes], __m512i pixels,
                           __m512i (&values)[kBytes]) {
  const __mmask64 upper_half = _mm512_movepi8_mask(pixels);
  __m512i bytes[kBytes];
  for (int b = 0; b < kBytes; ++b) bytes[b] = look_up(tables[b], pixels, upper_half);
  const __m512i low = _mm512_unpacklo_epi8(bytes[0], bytes[1]);
  const __m512i high = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
  if constexpr (kBytes == 2) {
    values[0] = low;
    values[1] = high;
  } else {
    const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]);
    const __m512i high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    values[0] = _mm512_unpacklo_epi16(low, low23);
    values[1] = _mm512_unpackhi_epi16(low, low23);
    values[2] = _mm512_unpacklo_epi16(high, high23);
    values[3] = _mm512_unpackhi_epi16(high, high23);
  }
}

// Only whole cache lines bypass the caches: each part of a line would be a memory access of its
// own.
inline void store_past_caches(uint8_t* out, __m512i values, size_t num_bytes) {
  if (num_bytes >= 64 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), values);
  } else {
    store_values(out, values, num_bytes);
  }
}

template <int kBytes, bool kPastCaches>
void convert(const uint8_t* pixels, size_t n, bool flip, const uint8_t* prepared, void* out) {
  static constexpr Places kPlaces = places_before_unpacking<kBytes>();
  ByteTable tables[kBytes];
  for (int b = 0; b < kBytes; ++b) {
    for (int q = 0; q < 4; ++q) tables[b].quarters[q] = load(prepared + 256 * b + 64 * q);
  }
  const __m512i places = load(kPlaces.bytes);
  auto* to = static_cast<uint8_t*>(out);
  for (size_t left = n; left > 0;) {
    const size_t m = left < 64 ? left : 64;
    const uint8_t* from = flip ? pixels + left - m : pixels + n - left;
    const __m512i order = flip ? flipped(places, m) : places;
    __m512i values[kBytes];
    look_up_values<kBytes>(tables, _mm512_permutexvar_epi8(order, load(from)), values);
    const size_t num_bytes = m * kBytes;
    for (size_t v = 0; v < kBytes && 64 * v < num_bytes; ++v) {
      if constexpr (kPastCaches) {
        store_past_caches(to + 64 * v, values[v], num_bytes - 64 * v);
      } else {
        store_values(to + 64 * v, values[v], num_bytes - 64 * v);
      }
    }
    to += num_bytes;
    left -= m;
  }
}

void no_table(const void*, uint8_t*) {}

void copy(const uint8_t* pixels, size_t n, bool flip, const uint8_t*, void* out) {
  static constexpr Places kPlaces = places_before_unpacking<1>();
  const __m512i places = load(kPlaces.bytes);
  auto* to = static_cast<uint8_t*>(out);
  for (size_t left = n; left > 0;) {
    const size_t m = left < 64 ? left : 64;
    __m512i values = load(flip ? pixels + left - m : pixels + n - left);
    if (flip) values = _mm512_permutexvar_epi8(flipped(places, m), values);
    store_values(to, values, m);
    to += m;
    left -= m;
  }
}

// ---- interleaving -------------------------------------------------------------------------------

template <typename Value>
struct InterleavePlaces {
  static constexpr int kLanes = 64 / sizeof(Value);
  // For output vector v: red_green takes values of red and green, blue then adds those of blue.
  alignas(64) Value red_green[3][kLanes];
  alignas(64) Value blue[3][kLanes];
};

template <typename Value>
constexpr InterleavePlaces<Value> interleave_places() {
  InterleavePlaces<Value> places{};
  constexpr int kLanes = InterleavePlaces<Value>::kLanes;
  for (int v = 0; v < 3; ++v) {
    for (int i = 0; i < kLanes; ++i) {
      const int channel = (kLanes * v + i) % 3, pixel = (kLanes * v + i) / 3;
      places.red_green[v][i] = static_cast<Value>(channel == 1 ? kLanes + pixel : pixel);
      places.blue[v][i] = static_cast<Value>(channel == 2 ? kLanes + pixel : i);
    }
  }
  return places;
}

template <typename Value>
inline __m512i permute(__m512i a, __m512i places, __m512i b) {
  if constexpr (sizeof(Value) == 1) return _mm512_permutex2var_epi8(a, places, b);
  if constexpr (sizeof(Value) == 2) return _mm512_permutex2var_epi16(a, places, b);
  if constexpr (sizeof(Value) == 4) return _mm512_permutex2var_epi32(a, places, b);
}

template <typename Value>
void interleave(const void* const* channels, size_t n, void* out) {
  static constexpr InterleavePlaces<Value> kPlaces = interleave_places<Value>();
  const auto* red = static_cast<const uint8_t*>(channels[0]);
  const auto* green = static_cast<const uint8_t*>(channels[1]);
  const auto* blue = static_cast<const uint8_t*>(channels[2]);
  auto* to = static_cast<uint8_t*>(out);
  const size_t num_bytes = n * sizeof(Value);
  for (size_t i = 0; i < num_bytes; i += 64, to += 192) {
    const __m512i r = load(red + i), g = load(green + i), b = load(blue + i);
    const size_t left = 3 * (num_bytes - i);
    for (size_t v = 0; v < 3 && 64 * v < left; ++v) {
      const __m512i two = permute<Value>(r, load(kPlaces.red_green[v]), g);
      store_values(to + 64 * v, permute<Value>(two, load(kPlaces.blue[v]), b), left - 64 * v);
    }
  }
}

}  // namespace

const StoreKernels kStoreAvx512 = {
    {no_table, split_words, split_doublewords},
    {copy, convert<2, false>, convert<4, false>},
    {copy, convert<2, true>, convert<4, true>},
    [] { _mm_sfence(); },
    {interleave<uint8_t>, interleave<uint16_t>, interleave<uint32_t>}};

}  // namespace imseq
