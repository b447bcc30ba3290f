// The resize with AVX2. Each weight is two 16-bit numbers; pairs of taps are multiplied together.
#include <immintrin.h>

#include <cstring>

#include "cpu/memory.h"
#include "resize/kernels.h"

namespace imseq {

namespace {

// A weight is high * 2^8 + low. One half, which rounds, is kRounding * 2^8.
constexpr int kRounding = 1 << (kWeightBits - 1 - 8);
constexpr int kPairsPerGroup = AxisWeights::kTapGroup / 2;

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline void store(void* to, __m256i values) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), values);
}

inline int num_groups(const AxisWeights& weights) {
  return divide_up(weights.max_taps, AxisWeights::kTapGroup);
}

// The halves of two taps of 8 outputs, the two side by side as 16-bit words.
struct Pair {
  __m256i high, low;
};

// Taps tap and tap + 1 of outputs [i, i + 8).
inline Pair pair_of(const AxisWeights& weights, size_t i, int tap) {
  const int32_t* row = weights.weights + static_cast<size_t>(tap) * weights.stride + i;
  const __m256i a = load(row), b = load(row + weights.stride);
  const __m256i low_byte = _mm256_set1_epi32(255);
  return {_mm256_blend_epi16(_mm256_srai_epi32(a, 8),
                             _mm256_slli_epi32(_mm256_srai_epi32(b, 8), 16), 0xaa),
          _mm256_or_si256(_mm256_and_si256(a, low_byte),
                          _mm256_slli_epi32(_mm256_and_si256(b, low_byte), 16))};
}

// ---- horizontal ---------------------------------------------------------------------------------

// Four taps of 8 outputs. Each four outputs take their pixels from a window of 16 bytes.
struct alignas(32) Step {
  struct {
    uint8_t places[32];
    int16_t high[16], low[16];
  } pairs[kPairsPerGroup];
  int32_t windows[2];
};

constexpr size_t kStepOutputs = 8;

size_t horizontal_plan_bytes(const AxisWeights& weights) {
  return weights.stride / kStepOutputs * static_cast<size_t>(num_groups(weights)) * sizeof(Step);
}

void plan_horizontally(const AxisWeights& weights, void* plan) {
  auto* step = static_cast<Step*>(plan);
  for (size_t i = 0; i < weights.stride; i += kStepOutputs) {
    const __m256i first = load(weights.first_taps + i);
    const __m256i place = _mm256_sub_epi32(first, _mm256_shuffle_epi32(first, 0));
    // A tap's 16 bits: the pixel, then a zero byte.
    __m256i places = _mm256_or_si256(place, _mm256_slli_epi32(place, 16));
    places = _mm256_add_epi8(places, _mm256_set1_epi32(static_cast<int>(0x80018000)));
    for (int tap = 0; tap < weights.max_taps; tap += AxisWeights::kTapGroup, ++step) {
      for (int p = 0; p < kPairsPerGroup; ++p) {
        const Pair pair = pair_of(weights, i, tap + 2 * p);
        const __m256i behind = _mm256_set1_epi32(0x00020002 * p);
        store(step->pairs[p].places, _mm256_add_epi8(places, behind));
        store(step->pairs[p].high, pair.high);
        store(step->pairs[p].low, pair.low);
      }
      step->windows[0] = weights.first_taps[i] + tap;
      step->windows[1] = weights.first_taps[i + kWindowOutputs] + tap;
    }
  }
}

inline __m256i load_windows(const uint8_t* row, const Step& step) {
  const auto* low = reinterpret_cast<const __m128i*>(row + step.windows[0]);
  const auto* high = reinterpret_cast<const __m128i*>(row + step.windows[1]);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                 _mm_loadu_si128(high), 1);
}

// Loads limit the speed of this pass. volatile keeps GCC from loading again for every use.
inline __m256i load_once(const void* from) { return *static_cast<const volatile __m256i*>(from); }

// sums[p]: 8 outputs of plane p, not clamped. kPairs: number of pairs of taps; 0: as many as
// num_steps steps have.
template <int kPlanes, int kPairs>
inline void sum_outputs(const Step* step, int num_steps, const uint8_t* in, size_t in_stride,
                        __m256i (&sums)[kPlanes]) {
  __m256i high[kPlanes], low[kPlanes];
  for (int p = 0; p < kPlanes; ++p) {
    high[p] = _mm256_set1_epi32(kRounding);
    low[p] = _mm256_setzero_si256();
  }
  const int num_pairs = kPairs == 0 ? num_steps * kPairsPerGroup : kPairs;
  for (int first = 0; first < num_pairs; first += kPairsPerGroup, ++step) {
    __m256i windows[kPlanes];
    for (size_t p = 0; p < kPlanes; ++p) windows[p] = load_windows(in + p * in_stride, *step);
    for (int i = 0; i < kPairsPerGroup; ++i) {
      if (kPairs != 0 && first + i >= kPairs) break;
      const __m256i places = load_once(step->pairs[i].places);
      const __m256i high_weights = load_once(step->pairs[i].high);
      const __m256i low_weights = load_once(step->pairs[i].low);
      for (int p = 0; p < kPlanes; ++p) {
        const __m256i pixels = _mm256_shuffle_epi8(windows[p], places);
        high[p] = _mm256_add_epi32(high[p], _mm256_madd_epi16(pixels, high_weights));
        low[p] = _mm256_add_epi32(low[p], _mm256_madd_epi16(pixels, low_weights));
      }
    }
  }
  for (int p = 0; p < kPlanes; ++p) {
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[p], 8), low[p]);
    sums[p] = _mm256_srai_epi32(sum, kWeightBits);
  }
}

// words[p]: 16 outputs of plane p, packed.
template <int kPlanes, int kPairs>
inline void resize_outputs(const Step* step, int num_steps, const uint8_t* in, size_t in_stride,
                           __m256i (&words)[kPlanes]) {
  __m256i low[kPlanes], high[kPlanes];
  sum_outputs<kPlanes, kPairs>(step, num_steps, in, in_stride, low);
  sum_outputs<kPlanes, kPairs>(step + num_steps, num_steps, in, in_stride, high);
  for (int p = 0; p < kPlanes; ++p) words[p] = _mm256_packs_epi32(low[p], high[p]);
}

// Packing works within 128-bit lanes: four outputs of each eight lie in each lane.
inline __m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

inline __m256i last_first(__m256i packed) {
  const __m256i fours_flipped = _mm256_setr_epi32(0x00010203, 0x04050607, 0x08090a0b, 0x0c0d0e0f,
                                                  0x00010203, 0x04050607, 0x08090a0b, 0x0c0d0e0f);
  return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(packed, fours_flipped),
                                     _mm256_setr_epi32(7, 3, 6, 2, 5, 1, 4, 0));
}

template <int kPlanes, int kPairs>
void horizontal_pass(const AxisWeights& weights, const void* plan, const uint8_t* in,
                     size_t in_stride, bool flip, uint8_t* out, size_t out_stride) {
  const int num_steps = num_groups(weights);
  const auto* step = static_cast<const Step*>(plan);
  const auto num_outputs = static_cast<size_t>(weights.num_outputs);
  for (size_t x = 0; x < num_outputs; x += 32, step += 4 * num_steps) {
    const size_t left = num_outputs - x;
    __m256i words[2][kPlanes];
    resize_outputs<kPlanes, kPairs>(step, num_steps, in, in_stride, words[0]);
    resize_outputs<kPlanes, kPairs>(step + 2 * num_steps, num_steps, in, in_stride, words[1]);
    for (size_t p = 0; p < kPlanes; ++p) {
      const __m256i packed = _mm256_packus_epi16(words[0][p], words[1][p]);
      const __m256i bytes = flip ? last_first(packed) : in_order(packed);
      uint8_t* const plane = out + p * out_stride;
      if (left >= 32) {
        store(plane + (flip ? left - 32 : x), bytes);
      } else {  // behind them are the next plane's first outputs
        alignas(32) uint8_t some[32];
        store(some, bytes);
        std::memcpy(plane + (flip ? 0 : x), some + (flip ? 32 - left : 0), left);
      }
    }
  }
}

template <int kPlanes>
void horizontal(const AxisWeights& weights, const void* plan, const uint8_t* in, size_t in_stride,
                bool flip, uint8_t* out, size_t out_stride) {
  const int num_pairs = (weights.max_taps + 1) / 2;
  const auto pass = num_pairs == 1   ? horizontal_pass<kPlanes, 1>
                    : num_pairs == 2 ? horizontal_pass<kPlanes, 2>
                    : num_pairs == 3 ? horizontal_pass<kPlanes, 3>
                    : num_pairs == 4 ? horizontal_pass<kPlanes, 4>
                                     : horizontal_pass<kPlanes, 0>;
  pass(weights, plan, in, in_stride, flip, out, out_stride);
}

// ---- vertical -----------------------------------------------------------------------------------

// Element 2 * p * stride + i of the plan has the high halves of output i's pair p, the element
// `stride` behind it the low halves.
size_t vertical_plan_bytes(const AxisWeights& weights) {
  const auto num_pairs = static_cast<size_t>(num_groups(weights) * kPairsPerGroup);
  return num_pairs * 2 * weights.stride * sizeof(int32_t);
}

void plan_vertically(const AxisWeights& weights, void* plan) {
  auto* to = static_cast<int32_t*>(plan);
  for (int tap = 0; tap < weights.max_taps; tap += 2, to += 2 * weights.stride) {
    for (size_t i = 0; i < weights.stride; i += 8) {
      const Pair pair = pair_of(weights, i, tap);
      store(to + i, pair.high);
      store(to + weights.stride + i, pair.low);
    }
  }
}

// 32 columns of two rows in 16 bits, the two of each column side by side.
inline void interleave_rows(const uint8_t* const* rows, size_t x, __m256i (&columns)[4]) {
  const __m256i r0 = load(rows[0] + x), r1 = load(rows[1] + x), zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi8(r0, r1), high = _mm256_unpackhi_epi8(r0, r1);
  columns[0] = _mm256_unpacklo_epi8(low, zero);
  columns[1] = _mm256_unpackhi_epi8(low, zero);
  columns[2] = _mm256_unpacklo_epi8(high, zero);
  columns[3] = _mm256_unpackhi_epi8(high, zero);
}

// kPairs: number of pairs of taps, so small that their weights stay in registers; 0: num_pairs.
template <int kPairs>
void vertical_pass_of_plane(const int32_t* plan, size_t stride, int num_pairs,
                            const uint8_t* const* rows, size_t first, size_t width, uint8_t* out) {
  const int n = kPairs == 0 ? num_pairs : kPairs;
  for (size_t begin = 0; begin < width; begin += 32) {
    // The last vector may overlap the one before.
    const size_t x = begin + 32 > width ? width - 32 : begin;
    __m256i high[4], low[4];
    for (int q = 0; q < 4; ++q) {
      high[q] = _mm256_set1_epi32(kRounding);
      low[q] = _mm256_setzero_si256();
    }
    const int32_t* pair = plan;
    for (int p = 0; p < n; ++p, pair += 2 * stride) {
      const __m256i high_weights = _mm256_set1_epi32(pair[0]);
      const __m256i low_weights = _mm256_set1_epi32(pair[stride]);
      __m256i columns[4];
      interleave_rows(rows + 2 * p, first + x, columns);
      for (int q = 0; q < 4; ++q) {
        high[q] = _mm256_add_epi32(high[q], _mm256_madd_epi16(columns[q], high_weights));
        low[q] = _mm256_add_epi32(low[q], _mm256_madd_epi16(columns[q], low_weights));
      }
    }
    __m256i sums[4];
    for (int q = 0; q < 4; ++q) {
      sums[q] = _mm256_add_epi32(_mm256_slli_epi32(high[q], 8), low[q]);
      sums[q] = _mm256_srai_epi32(sums[q], kWeightBits);
    }
    store(out + x, _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]),
                                       _mm256_packs_epi32(sums[2], sums[3])));
  }
}

template <int kPairs>
void vertical_pass(const int32_t* plan, size_t stride, int num_pairs, const uint8_t* const* rows,
                   const Columns& columns, uint8_t* out, size_t out_stride) {
  for (size_t p = 0; p < static_cast<size_t>(columns.num_planes); ++p) {
    vertical_pass_of_plane<kPairs>(plan, stride, num_pairs, rows, columns.first + p * columns.width,
                                   columns.width, out + p * out_stride);
  }
}

void vertical(const AxisWeights& weights, const void* plan, int i, const uint8_t* const* rows,
              const Columns& columns, uint8_t* out, size_t out_stride) {
  const int num_pairs = (weights.num_taps[i] + 1) / 2;
  const int32_t* first = static_cast<const int32_t*>(plan) + i;
  const auto pass = num_pairs == 1   ? vertical_pass<1>
                    : num_pairs == 2 ? vertical_pass<2>
                                     : vertical_pass<0>;
  pass(first, weights.stride, num_pairs, rows, columns, out, out_stride);
}

}  // namespace

const ResizeKernels kResizeAvx2 = {
    windows_suffice, horizontal_plan_bytes, plan_horizontally, horizontal<1>,
    horizontal<3>,   vertical_plan_bytes,   plan_vertically,   vertical};

}  // namespace imseq
