// The resize with AVX-512: every weight as three signed bytes, for VNNI's dot products of four.
#include <immintrin.h>

#include "resize.h"

namespace imseq {

namespace {

// A weight w is d2 * 2^16 + d1 * 2^8 + d0 with digits in [-128, 127], as |w| < 2^23. Sums are taken
// digit by digit, the highest first (Horner): ((s2 << 8) + s1 << 8) + s0, exact modulo 2^32.
// Rounding's half is 32 * 2^16, so the highest sum starts with 32.
constexpr int kDigits = 3;
constexpr int kRounding = 32;
// Added to a weight, carries what makes lower digits signed; those digits come out 128 too large.
constexpr int kCarries = 0x8080;
constexpr int kFlipSigns = static_cast<int>(0x80808080);

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// ---- horizontal ---------------------------------------------------------------------------------

// Four taps of 16 outputs: their pixels from a window of 64 bytes, and digits[0] (the highest) to
// digits[2] of their weights.
struct alignas(64) Step {
  uint8_t places[64];
  int8_t digits[kDigits][64];
  int32_t window;
  int32_t is_last;  // of its 16 outputs
};

struct alignas(64) Plan {
  int32_t num_steps;
  int32_t one_step_each;  // 1: no output takes more than one step
};

Step* steps_of(void* plan) { return reinterpret_cast<Step*>(static_cast<Plan*>(plan) + 1); }
const Step* steps_of(const void* plan) {
  return reinterpret_cast<const Step*>(static_cast<const Plan*>(plan) + 1);
}

size_t plan_bytes(const AxisWeights& weights) {
  size_t num_steps = 0;
  const size_t num_quads =
      (static_cast<size_t>(weights.max_taps) + AxisWeights::kTapGroup - 1) / AxisWeights::kTapGroup;
  for (size_t i = 0; i < weights.stride; i += AxisWeights::kOutputGroup) {
    const int32_t* first = weights.first_taps + i;
    const auto span = static_cast<size_t>(first[AxisWeights::kOutputGroup - 1] - first[0]);
    num_steps += num_quads * ((span + AxisWeights::kTapGroup - 1) / 64 + 1);
  }
  return sizeof(Plan) + num_steps * sizeof(Step);
}

// Byte `digit` of each of four taps' weights, side by side.
template <int kByte>
inline __m512i gather_bytes(const __m512i (&taps)[AxisWeights::kTapGroup]) {
  __m512i bytes = _mm512_setzero_si512();
  for (int j = 0; j < AxisWeights::kTapGroup; ++j) {
    const int shift = 8 * (j - kByte);
    const __m512i moved = shift >= 0 ? _mm512_slli_epi32(taps[j], static_cast<unsigned>(shift))
                                     : _mm512_srli_epi32(taps[j], static_cast<unsigned>(-shift));
    bytes = _mm512_mask_mov_epi8(bytes, 0x1111111111111111u << j, moved);
  }
  return bytes;
}

// Which of the four bytes that begin `place` bytes behind the window lie in it.
inline __mmask64 inside_window(__m512i place) {
  __m512i inside = _mm512_setzero_si512();
  for (int j = 0; j < AxisWeights::kTapGroup; ++j) {
    const __mmask16 mask = _mm512_cmplt_epu32_mask(_mm512_add_epi32(place, _mm512_set1_epi32(j)),
                                                   _mm512_set1_epi32(64));
    inside = _mm512_or_si512(inside, _mm512_maskz_set1_epi32(mask, 0xff << 8 * j));
  }
  return _mm512_movepi8_mask(inside);
}

// The steps of 16 outputs from the i-th on; returns their end.
Step* plan_outputs(const AxisWeights& weights, size_t i, Step* step) {
  const __m512i first = load(weights.first_taps + i);
  const int lowest = weights.first_taps[i];
  const int highest = weights.first_taps[i + AxisWeights::kOutputGroup - 1];
  Step* const begin = step;
  for (int tap = 0; tap < weights.max_taps; tap += AxisWeights::kTapGroup) {
    __m512i taps[AxisWeights::kTapGroup];
    for (int j = 0; j < AxisWeights::kTapGroup; ++j) {
      const int32_t* row = weights.weights + static_cast<size_t>(tap + j) * weights.stride;
      taps[j] = _mm512_add_epi32(load(row + i), _mm512_set1_epi32(kCarries));
    }
    const __m512i flip = _mm512_set1_epi32(kFlipSigns);
    const __m512i digits[kDigits] = {gather_bytes<2>(taps),
                                     _mm512_xor_si512(gather_bytes<1>(taps), flip),
                                     _mm512_xor_si512(gather_bytes<0>(taps), flip)};
    const __m512i any = _mm512_or_si512(_mm512_or_si512(digits[0], digits[1]), digits[2]);
    const int end = highest + tap + AxisWeights::kTapGroup;
    for (int window = lowest + tap; window < end; window += 64) {
      const __m512i place = _mm512_add_epi32(first, _mm512_set1_epi32(tap - window));
      const __mmask64 inside = inside_window(place);
      // A window in which no weight lies may lie behind the row. Sixteen outputs without any weight
      // still need a step.
      if (_mm512_mask_test_epi8_mask(inside, any, any) == 0 && (step != begin || tap != 0))
        continue;
      const __m512i low = _mm512_and_si512(place, _mm512_set1_epi32(63));
      const __m512i fourfold = _mm512_or_si512(low, _mm512_slli_epi32(low, 8));
      const __m512i places = _mm512_or_si512(fourfold, _mm512_slli_epi32(fourfold, 16));
      _mm512_store_si512(step->places, _mm512_add_epi8(places, _mm512_set1_epi32(0x03020100)));
      for (int d = 0; d < kDigits; ++d) {
        _mm512_store_si512(step->digits[d], _mm512_maskz_mov_epi8(inside, digits[d]));
      }
      step->window = window;
      step->is_last = 0;
      ++step;
    }
  }
  step[-1].is_last = 1;
  return step;
}

void plan(const AxisWeights& weights, void* memory) {
  Step* const begin = steps_of(memory);
  Step* end = begin;
  int num_groups = 0;
  for (size_t i = 0; i < weights.stride; i += AxisWeights::kOutputGroup) {
    end = plan_outputs(weights, i, end);
    ++num_groups;
  }
  auto* header = static_cast<Plan*>(memory);
  header->num_steps = static_cast<int32_t>(end - begin);
  header->one_step_each = header->num_steps == num_groups;
}

// sums[p]: 16 outputs of plane p, rounded, not yet clamped. Returns the step behind them.
template <int kPlanes, bool kOneStepEach>
inline const Step* sum_outputs(const Step* step, const uint8_t* const (&planes)[3],
                               __m512i (&sums)[kPlanes]) {
  __m512i digit_sums[kPlanes][kDigits];
  for (int p = 0; p < kPlanes; ++p) {
    digit_sums[p][0] = _mm512_set1_epi32(kRounding);
    digit_sums[p][1] = digit_sums[p][2] = _mm512_setzero_si512();
  }
  if constexpr (kOneStepEach) {
    const __m512i places = load(step->places);
    for (int p = 0; p < kPlanes; ++p) {
      const __m512i pixels = _mm512_permutexvar_epi8(places, load(planes[p] + step->window));
      __m512i sum = _mm512_dpbusd_epi32(digit_sums[p][0], pixels, load(step->digits[0]));
      sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), pixels, load(step->digits[1]));
      sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), pixels, load(step->digits[2]));
      sums[p] = _mm512_srai_epi32(sum, kWeightBits);
    }
    return step + 1;
  } else {
    for (bool is_last = false; !is_last; ++step) {
      const __m512i places = load(step->places);
      for (int p = 0; p < kPlanes; ++p) {
        const __m512i pixels = _mm512_permutexvar_epi8(places, load(planes[p] + step->window));
        for (int d = 0; d < kDigits; ++d) {
          digit_sums[p][d] = _mm512_dpbusd_epi32(digit_sums[p][d], pixels, load(step->digits[d]));
        }
      }
      is_last = step->is_last != 0;
    }
    for (int p = 0; p < kPlanes; ++p) {
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(digit_sums[p][0], 8), digit_sums[p][1]);
      sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), digit_sums[p][2]);
      sums[p] = _mm512_srai_epi32(sum, kWeightBits);
    }
    return step;
  }
}

// kGroups times 16 outputs; where kPartly, only those of `stored` are written, because the next
// plane's outputs lie behind them.
template <int kPlanes, bool kOneStepEach, int kGroups, bool kPartly>
inline const Step* resize_outputs(const Step* step, const uint8_t* const (&planes)[3],
                                  __mmask64 stored, uint8_t* out, size_t out_stride) {
  __m512i sums[4][kPlanes];
  for (int g = 0; g < kGroups; ++g) {
    step = sum_outputs<kPlanes, kOneStepEach>(step, planes, sums[g]);
  }
  for (int g = kGroups; g < 4; ++g) {
    for (int p = 0; p < kPlanes; ++p) sums[g][p] = _mm512_setzero_si512();
  }
  // Packing works within 128-bit lanes: four outputs of each group lie in each lane.
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (size_t p = 0; p < kPlanes; ++p) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sums[0][p], sums[1][p]),
                                              _mm512_packs_epi32(sums[2][p], sums[3][p]));
    uint8_t* to = out + p * out_stride;
    const __m512i ordered = _mm512_permutexvar_epi32(in_order, bytes);
    if constexpr (kPartly) {
      _mm512_mask_storeu_epi8(to, stored, ordered);
    } else {
      _mm512_storeu_si512(to, ordered);
    }
  }
  return step;
}

template <int kPlanes, bool kOneStepEach>
void horizontal_pass(const AxisWeights& weights, const void* plan_memory, const uint8_t* in,
                     size_t in_stride, uint8_t* out, size_t out_stride) {
  const uint8_t* const planes[3] = {in, in + in_stride, in + 2 * in_stride};
  const Step* step = steps_of(plan_memory);
  int num_left = weights.num_outputs;
  for (; num_left >= 64; num_left -= 64, out += 64) {
    step = resize_outputs<kPlanes, kOneStepEach, 4, false>(step, planes, 0, out, out_stride);
  }
  const __mmask64 stored = (__mmask64{1} << num_left) - 1;
  if (num_left > 48) {
    resize_outputs<kPlanes, kOneStepEach, 4, true>(step, planes, stored, out, out_stride);
  } else if (num_left > 32) {
    resize_outputs<kPlanes, kOneStepEach, 3, true>(step, planes, stored, out, out_stride);
  } else if (num_left > 16) {
    resize_outputs<kPlanes, kOneStepEach, 2, true>(step, planes, stored, out, out_stride);
  } else if (num_left > 0) {
    resize_outputs<kPlanes, kOneStepEach, 1, true>(step, planes, stored, out, out_stride);
  }
}

void horizontal(const AxisWeights& weights, const void* plan_memory, const uint8_t* in,
                size_t in_stride, int num_planes, uint8_t* out, size_t out_stride) {
  const bool one_step_each = static_cast<const Plan*>(plan_memory)->one_step_each != 0;
  const auto pass = num_planes == 1
                        ? (one_step_each ? horizontal_pass<1, true> : horizontal_pass<1, false>)
                        : (one_step_each ? horizontal_pass<3, true> : horizontal_pass<3, false>);
  pass(weights, plan_memory, in, in_stride, out, out_stride);
}

// ---- vertical -----------------------------------------------------------------------------------

// 64 columns of four rows, so that the four bytes of each column lie side by side.
inline void interleave_rows(const uint8_t* const* rows, size_t x, __m512i (&columns)[4]) {
  const __m512i r0 = load(rows[0] + x), r1 = load(rows[1] + x);
  const __m512i r2 = load(rows[2] + x), r3 = load(rows[3] + x);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
  columns[0] = _mm512_unpacklo_epi16(low01, low23);
  columns[1] = _mm512_unpackhi_epi16(low01, low23);
  columns[2] = _mm512_unpacklo_epi16(high01, high23);
  columns[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Digit `digit` of the weights of four rows, in all columns.
inline __m512i row_digits(const int32_t* weights, int digit) {
  const __m128i carried = _mm_add_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)),
                                        _mm_set1_epi32(kCarries));
  const __m128i bytes = _mm_cvtepi32_epi8(_mm_srl_epi32(carried, _mm_cvtsi32_si128(8 * digit)));
  const __m512i all = _mm512_broadcastd_epi32(bytes);
  return digit == kDigits - 1 ? all : _mm512_xor_si512(all, _mm512_set1_epi32(kFlipSigns));
}

inline void store_columns(const __m512i (&sums)[4], uint8_t* out) {
  __m512i shifted[4];
  for (int q = 0; q < 4; ++q) shifted[q] = _mm512_srai_epi32(sums[q], kWeightBits);
  _mm512_storeu_si512(out, _mm512_packus_epi16(_mm512_packs_epi32(shifted[0], shifted[1]),
                                               _mm512_packs_epi32(shifted[2], shifted[3])));
}

// Up to 4 * kQuads rows, few enough for all their digits to stay in registers.
template <int kQuads>
void vertical_pass(const uint8_t* const* rows, const int32_t* weights, size_t begin, size_t end,
                   uint8_t* out) {
  __m512i digits[kDigits][kQuads];
  for (int d = 0; d < kDigits; ++d) {
    for (int g = 0; g < kQuads; ++g) {
      digits[d][g] = row_digits(weights + 4 * g, kDigits - 1 - d);
    }
  }
  for (size_t x = begin; x < end; x += 64) {
    __m512i columns[kQuads][4], sums[4];
    for (int g = 0; g < kQuads; ++g) interleave_rows(rows + 4 * g, x, columns[g]);
    for (int q = 0; q < 4; ++q) {
      sums[q] = _mm512_set1_epi32(kRounding);
      for (int d = 0; d < kDigits; ++d) {
        if (d > 0) sums[q] = _mm512_slli_epi32(sums[q], 8);
        for (int g = 0; g < kQuads; ++g) {
          sums[q] = _mm512_dpbusd_epi32(sums[q], columns[g][q], digits[d][g]);
        }
      }
    }
    store_columns(sums, out + x);
  }
}

void vertical_pass_of_many(const uint8_t* const* rows, const int32_t* weights, int num_taps,
                           size_t begin, size_t end, uint8_t* out) {
  for (size_t x = begin; x < end; x += 64) {
    __m512i sums[kDigits][4];
    for (int q = 0; q < 4; ++q) {
      sums[0][q] = _mm512_set1_epi32(kRounding);
      sums[1][q] = sums[2][q] = _mm512_setzero_si512();
    }
    for (int k = 0; k < num_taps; k += AxisWeights::kTapGroup) {
      __m512i columns[4];
      interleave_rows(rows + k, x, columns);
      for (int d = 0; d < kDigits; ++d) {
        const __m512i digits = row_digits(weights + k, kDigits - 1 - d);
        for (int q = 0; q < 4; ++q) {
          sums[d][q] = _mm512_dpbusd_epi32(sums[d][q], columns[q], digits);
        }
      }
    }
    for (int q = 0; q < 4; ++q) {
      sums[1][q] = _mm512_add_epi32(_mm512_slli_epi32(sums[0][q], 8), sums[1][q]);
      sums[0][q] = _mm512_add_epi32(_mm512_slli_epi32(sums[1][q], 8), sums[2][q]);
    }
    store_columns(sums[0], out + x);
  }
}

void vertical(const uint8_t** rows, int32_t* weights, int num_taps, size_t begin, size_t end,
              uint8_t* out) {
  for (int k = num_taps; k % AxisWeights::kTapGroup != 0; ++k) {
    rows[k] = rows[num_taps - 1];
    weights[k] = 0;
  }
  if (num_taps <= 4) return vertical_pass<1>(rows, weights, begin, end, out);
  if (num_taps <= 8) return vertical_pass<2>(rows, weights, begin, end, out);
  vertical_pass_of_many(rows, weights, num_taps, begin, end, out);
}

}  // namespace

const ResizeKernels& avx512_resize_kernels() {
  static constexpr ResizeKernels kernels{plan_bytes, plan, horizontal, 64, vertical};
  return kernels;
}

}  // namespace imseq
