// The resize with AVX-512. Each weight is three signed bytes, for the dot products of VNNI.
#include <immintrin.h>

#include "cpu/memory.h"
#include "resize/kernels.h"

namespace imseq {

namespace {

// A weight w is d2 * 2^16 + d1 * 2^8 + d0 with digits in [-128, 127], as |w| < 2^23. Sums are taken
// digit by digit, the highest first (Horner): ((s2 << 8) + s1 << 8) + s0, exact modulo 2^32. One
// half, which rounds, is 32 * 2^16, so the highest sum starts with 32.
constexpr int kDigits = 3;
constexpr size_t kStepOutputs = 16;  // side by side in a vector
constexpr int kRounding = 32;
// Added to a weight, carries into the higher digits; the lower digits are then 128 too large.
constexpr int kCarries = 0x8080;
constexpr int kFlipSigns = static_cast<int>(0x80808080);

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

struct alignas(64) Bytes {
  uint8_t bytes[64];
};

constexpr Bytes first_bytes() {
  Bytes first{};
  for (int i = 0; i < 64; ++i) first.bytes[i] = static_cast<uint8_t>(i);
  return first;
}
constexpr Bytes kFirstBytes = first_bytes();

// Four taps of 16 outputs, digits[0] the highest of their weights: the four of an output lie side
// by side.
struct Digits {
  __m512i digits[kDigits];
};

// Byte kByte of each of four taps' weights, side by side.
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

// The digits of outputs [i, i + 16) and their taps [tap, tap + 4).
inline Digits digits_of(const AxisWeights& weights, size_t i, int tap) {
  __m512i taps[AxisWeights::kTapGroup];
  for (int j = 0; j < AxisWeights::kTapGroup; ++j) {
    const int32_t* row = weights.weights + static_cast<size_t>(tap + j) * weights.stride;
    taps[j] = _mm512_add_epi32(load(row + i), _mm512_set1_epi32(kCarries));
  }
  const __m512i flip = _mm512_set1_epi32(kFlipSigns);
  return {{gather_bytes<2>(taps), _mm512_xor_si512(gather_bytes<1>(taps), flip),
           _mm512_xor_si512(gather_bytes<0>(taps), flip)}};
}

inline size_t num_quads(const AxisWeights& weights) {
  return divide_up(static_cast<size_t>(weights.max_taps), AxisWeights::kTapGroup);
}

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
  int32_t steps_each;  // of 16 outputs: 1 or 2; 0: Step::is_last tells the end
};

Step* steps_of(void* plan) { return reinterpret_cast<Step*>(static_cast<Plan*>(plan) + 1); }
const Step* steps_of(const void* plan) {
  return reinterpret_cast<const Step*>(static_cast<const Plan*>(plan) + 1);
}

// The more an image shrinks the more taps there are, and the more windows they are spread over.
bool plan_is_small(const AxisWeights& weights) { return weights.max_taps <= 64; }

size_t horizontal_plan_bytes(const AxisWeights& weights) {
  size_t num_steps = 0;
  for (size_t i = 0; i < weights.stride; i += kStepOutputs) {
    const int32_t* first = weights.first_taps + i;
    const auto span = static_cast<size_t>(first[kStepOutputs - 1] - first[0]);
    num_steps += num_quads(weights) * ((span + AxisWeights::kTapGroup - 1) / 64 + 1);
  }
  return sizeof(Plan) + num_steps * sizeof(Step);
}

// Loads limit the speed of this pass. volatile keeps GCC from loading again for every use.
inline __m512i load_once(const int8_t* digits) {
  return *reinterpret_cast<const volatile __m512i*>(digits);
}

// Which of the four bytes from `place` on lie in the window.
inline __mmask64 inside_window(__m512i place) {
  __m512i inside = _mm512_setzero_si512();
  for (int j = 0; j < AxisWeights::kTapGroup; ++j) {
    const __mmask16 mask = _mm512_cmplt_epu32_mask(_mm512_add_epi32(place, _mm512_set1_epi32(j)),
                                                   _mm512_set1_epi32(64));
    inside = _mm512_or_si512(inside, _mm512_maskz_set1_epi32(mask, 0xff << 8 * j));
  }
  return _mm512_movepi8_mask(inside);
}

// Plans 16 outputs from the i-th on; returns the end of the steps. all: also those without weights.
Step* plan_outputs(const AxisWeights& weights, size_t i, bool all, Step* step) {
  const __m512i first = load(weights.first_taps + i);
  const int lowest = weights.first_taps[i];
  const int highest = weights.first_taps[i + kStepOutputs - 1];
  Step* const begin = step;
  for (int tap = 0; tap < weights.max_taps; tap += AxisWeights::kTapGroup) {
    const auto [digits] = digits_of(weights, i, tap);
    const __m512i any = _mm512_or_si512(_mm512_or_si512(digits[0], digits[1]), digits[2]);
    const int end = highest + tap + AxisWeights::kTapGroup;
    for (int window = lowest + tap; window < end; window += 64) {
      const __m512i place = _mm512_add_epi32(first, _mm512_set1_epi32(tap - window));
      const __mmask64 inside = inside_window(place);
      // A window without weights may lie far behind the row. Sixteen outputs without any weight
      // still need a step.
      const bool needed = all || step == begin || _mm512_mask_test_epi8_mask(inside, any, any) != 0;
      if (!needed) continue;
      const __m512i low = _mm512_and_si512(place, _mm512_set1_epi32(63));
      const __m512i twofold = _mm512_or_si512(low, _mm512_slli_epi32(low, 8));
      const __m512i fourfold = _mm512_or_si512(twofold, _mm512_slli_epi32(twofold, 16));
      _mm512_store_si512(step->places, _mm512_add_epi8(fourfold, _mm512_set1_epi32(0x03020100)));
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

void plan_horizontally(const AxisWeights& weights, void* plan) {
  int widest = 0;
  for (size_t i = 0; i < weights.stride; i += kStepOutputs) {
    const int32_t* first = weights.first_taps + i;
    const int span = first[kStepOutputs - 1] - first[0];
    widest = span > widest ? span : widest;
  }
  const bool one_window = widest + AxisWeights::kTapGroup <= 64;
  const bool uniform = one_window && num_quads(weights) <= 2;
  static_cast<Plan*>(plan)->steps_each = uniform ? static_cast<int32_t>(num_quads(weights)) : 0;
  Step* step = steps_of(plan);
  for (size_t i = 0; i < weights.stride; i += kStepOutputs) {
    step = plan_outputs(weights, i, uniform, step);
  }
}

// sums[p]: 16 outputs of plane p, not clamped. Returns the step behind theirs.
template <int kPlanes, int kSteps>
inline const Step* sum_outputs(const Step* step, const uint8_t* const (&planes)[3],
                               __m512i (&sums)[kPlanes]) {
  if constexpr (kSteps != 0) {
    __m512i pixels[kSteps][kPlanes], digits[kSteps][kDigits];
    for (int s = 0; s < kSteps; ++s, ++step) {
      const __m512i places = load(step->places);
      for (int p = 0; p < kPlanes; ++p) {
        pixels[s][p] = _mm512_permutexvar_epi8(places, load(planes[p] + step->window));
      }
      for (int d = 0; d < kDigits; ++d) digits[s][d] = load_once(step->digits[d]);
    }
    for (int p = 0; p < kPlanes; ++p) sums[p] = _mm512_set1_epi32(kRounding);
    for (int d = 0; d < kDigits; ++d) {
      for (int p = 0; p < kPlanes; ++p) {
        if (d > 0) sums[p] = _mm512_slli_epi32(sums[p], 8);
        for (int s = 0; s < kSteps; ++s) {
          sums[p] = _mm512_dpbusd_epi32(sums[p], pixels[s][p], digits[s][d]);
        }
      }
    }
  } else {
    __m512i digit_sums[kPlanes][kDigits];
    for (int p = 0; p < kPlanes; ++p) {
      digit_sums[p][0] = _mm512_set1_epi32(kRounding);
      digit_sums[p][1] = digit_sums[p][2] = _mm512_setzero_si512();
    }
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
      const __m512i high =
          _mm512_add_epi32(_mm512_slli_epi32(digit_sums[p][0], 8), digit_sums[p][1]);
      sums[p] = _mm512_add_epi32(_mm512_slli_epi32(high, 8), digit_sums[p][2]);
    }
  }
  for (int p = 0; p < kPlanes; ++p) sums[p] = _mm512_srai_epi32(sums[p], kWeightBits);
  return step;
}

// Where packing, which works within 128-bit lanes, leaves the first `count` of 64 outputs: four of
// each group of 16 in each lane. flip: the last of them comes first.
inline __m512i packed_places(int count, bool flip) {
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = load(kFirstBytes.bytes);
  const __m512i places = _mm512_permutexvar_epi32(lanes, bytes);
  if (!flip) return places;
  const __m512i last = _mm512_set1_epi8(static_cast<char>(count - 1));
  return _mm512_permutexvar_epi8(_mm512_sub_epi8(last, bytes), places);
}

// Resizes kGroups times 16 outputs, which `places` puts in order; kPartly: writes only those of
// `stored`.
template <int kPlanes, int kSteps, int kGroups, bool kPartly>
inline const Step* resize_outputs(const Step* step, const uint8_t* const (&planes)[3],
                                  __m512i places, __mmask64 stored, uint8_t* out,
                                  size_t out_stride) {
  __m512i sums[4][kPlanes];
  for (int g = 0; g < kGroups; ++g) {
    step = sum_outputs<kPlanes, kSteps>(step, planes, sums[g]);
  }
  for (int g = kGroups; g < 4; ++g) {
    for (int p = 0; p < kPlanes; ++p) sums[g][p] = _mm512_setzero_si512();
  }
  for (size_t p = 0; p < kPlanes; ++p) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sums[0][p], sums[1][p]),
                                              _mm512_packs_epi32(sums[2][p], sums[3][p]));
    uint8_t* to = out + p * out_stride;
    const __m512i ordered = _mm512_permutexvar_epi8(places, bytes);
    if constexpr (kPartly) {
      _mm512_mask_storeu_epi8(to, stored, ordered);
    } else {
      _mm512_storeu_si512(to, ordered);
    }
  }
  return step;
}

template <int kPlanes, int kSteps>
void horizontal_pass(const AxisWeights& weights, const void* plan, const uint8_t* in,
                     size_t in_stride, bool flip, uint8_t* out, size_t out_stride) {
  const uint8_t* const planes[3] = {in, in + in_stride, in + 2 * in_stride};
  const Step* step = steps_of(plan);
  int num_left = weights.num_outputs;
  __m512i places = packed_places(64, flip);
  for (; num_left >= 64; num_left -= 64) {
    uint8_t* const to = out + (flip ? num_left - 64 : weights.num_outputs - num_left);
    step = resize_outputs<kPlanes, kSteps, 4, false>(step, planes, places, 0, to, out_stride);
  }
  if (!flip) out += weights.num_outputs - num_left;
  places = packed_places(num_left, flip);
  const __mmask64 stored = (__mmask64{1} << num_left) - 1;
  if (num_left > 48) {
    resize_outputs<kPlanes, kSteps, 4, true>(step, planes, places, stored, out, out_stride);
  } else if (num_left > 32) {
    resize_outputs<kPlanes, kSteps, 3, true>(step, planes, places, stored, out, out_stride);
  } else if (num_left > 16) {
    resize_outputs<kPlanes, kSteps, 2, true>(step, planes, places, stored, out, out_stride);
  } else if (num_left > 0) {
    resize_outputs<kPlanes, kSteps, 1, true>(step, planes, places, stored, out, out_stride);
  }
}

template <int kPlanes>
void horizontal(const AxisWeights& weights, const void* plan, const uint8_t* in, size_t in_stride,
                bool flip, uint8_t* out, size_t out_stride) {
  const int steps_each = static_cast<const Plan*>(plan)->steps_each;
  const auto pass = steps_each == 1   ? horizontal_pass<kPlanes, 1>
                    : steps_each == 2 ? horizontal_pass<kPlanes, 2>
                                      : horizontal_pass<kPlanes, 0>;
  pass(weights, plan, in, in_stride, flip, out, out_stride);
}

// ---- vertical -----------------------------------------------------------------------------------

// 64 columns of four rows, so that the four bytes of each column lie side by side.
inline void interleave_rows(const uint8_t* const* rows, size_t x, __m512i (&pixels)[4]) {
  const __m512i r0 = load(rows[0] + x), r1 = load(rows[1] + x);
  const __m512i r2 = load(rows[2] + x), r3 = load(rows[3] + x);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
  pixels[0] = _mm512_unpacklo_epi16(low01, low23);
  pixels[1] = _mm512_unpackhi_epi16(low01, low23);
  pixels[2] = _mm512_unpacklo_epi16(high01, high23);
  pixels[3] = _mm512_unpackhi_epi16(high01, high23);
}

inline __m512i to_bytes(const __m512i (&sums)[4]) {
  __m512i shifted[4];
  for (int q = 0; q < 4; ++q) shifted[q] = _mm512_srai_epi32(sums[q], kWeightBits);
  return _mm512_packus_epi16(_mm512_packs_epi32(shifted[0], shifted[1]),
                             _mm512_packs_epi32(shifted[2], shifted[3]));
}

// Stores the 64 bytes that resize(x) returns for columns x and following. Planes follow each other
// without a gap and are no narrower than a vector, so at most one plane ends within a vector.
template <typename Resize>
inline void resize_columns(const Columns& columns, uint8_t* out, size_t out_stride,
                           const Resize& resize) {
  const size_t num_columns = static_cast<size_t>(columns.num_planes) * columns.width;
  size_t end = columns.width;  // of the plane
  for (size_t i = 0; i < num_columns; i += 64) {
    const __m512i bytes = resize(columns.first + i);
    if (i + 64 <= end) {
      _mm512_storeu_si512(out + i, bytes);
      continue;
    }
    const __mmask64 inside = (__mmask64{1} << (end - i)) - 1;
    _mm512_mask_storeu_epi8(out + i, inside, bytes);
    if (end == num_columns) break;
    out += out_stride - columns.width;
    _mm512_mask_storeu_epi8(out + i, ~inside, bytes);
    end += columns.width;
  }
}

// ---- vertical, up to two taps: an image that grows ----------------------------------------------

// Two weights as 16-bit halves, high * 2^8 + low, need fewer multiplications than six digits.
// Element i of the plan has the high halves of output i, element stride + i the low ones.
constexpr int kHighRounding = 1 << (kWeightBits - 1 - 8);

void plan_two_taps(const AxisWeights& weights, int32_t* plan) {
  for (size_t i = 0; i < weights.stride; i += kStepOutputs) {
    const __m512i a = load(weights.weights + i), b = load(weights.weights + weights.stride + i);
    const __m512i low_byte = _mm512_set1_epi32(255);
    const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srai_epi32(a, 8),
                                                 _mm512_slli_epi32(_mm512_srai_epi32(b, 8), 16));
    const __m512i low = _mm512_or_si512(_mm512_and_si512(a, low_byte),
                                        _mm512_slli_epi32(_mm512_and_si512(b, low_byte), 16));
    _mm512_storeu_si512(plan + i, high);
    _mm512_storeu_si512(plan + weights.stride + i, low);
  }
}

void vertical_pass_of_two(const int32_t* plan, size_t stride, const uint8_t* const* rows,
                          const Columns& columns, uint8_t* out, size_t out_stride) {
  const __m512i high = _mm512_set1_epi32(plan[0]), low = _mm512_set1_epi32(plan[stride]);
  const __m512i zero = _mm512_setzero_si512();
  resize_columns(columns, out, out_stride, [&](size_t x) {
    const __m512i r0 = load(rows[0] + x), r1 = load(rows[1] + x);
    const __m512i left = _mm512_unpacklo_epi8(r0, r1), right = _mm512_unpackhi_epi8(r0, r1);
    const __m512i pixels[4] = {_mm512_unpacklo_epi8(left, zero), _mm512_unpackhi_epi8(left, zero),
                               _mm512_unpacklo_epi8(right, zero),
                               _mm512_unpackhi_epi8(right, zero)};
    __m512i sums[4];
    for (int q = 0; q < 4; ++q) {
      sums[q] = _mm512_dpwssd_epi32(_mm512_set1_epi32(kHighRounding), pixels[q], high);
      sums[q] = _mm512_dpwssd_epi32(_mm512_slli_epi32(sums[q], 8), pixels[q], low);
    }
    return to_bytes(sums);
  });
}

// ---- vertical, any number of taps ---------------------------------------------------------------

// Digit d of output i's quad q is element (q * kDigits + d) * stride + i of the plan.
size_t vertical_plan_bytes(const AxisWeights& weights) {
  return num_quads(weights) * kDigits * weights.stride * sizeof(int32_t);
}

void plan_vertically(const AxisWeights& weights, void* plan) {
  auto* to = static_cast<int32_t*>(plan);
  if (weights.max_taps <= 2) return plan_two_taps(weights, to);
  for (int tap = 0; tap < weights.max_taps; tap += AxisWeights::kTapGroup) {
    for (size_t i = 0; i < weights.stride; i += kStepOutputs) {
      const auto [digits] = digits_of(weights, i, tap);
      for (size_t d = 0; d < kDigits; ++d) {
        _mm512_storeu_si512(to + d * weights.stride + i, digits[d]);
      }
    }
    to += kDigits * weights.stride;
  }
}

// For up to 4 * kQuads rows, so few that all their digits stay in registers.
template <int kQuads>
void vertical_pass(const int32_t* plan, size_t stride, const uint8_t* const* rows,
                   const Columns& columns, uint8_t* out, size_t out_stride) {
  __m512i digits[kQuads][kDigits];
  for (int g = 0; g < kQuads; ++g) {
    for (int d = 0; d < kDigits; ++d, plan += stride) digits[g][d] = _mm512_set1_epi32(*plan);
  }
  resize_columns(columns, out, out_stride, [&](size_t x) {
    __m512i pixels[kQuads][4], sums[4];
    for (int g = 0; g < kQuads; ++g) interleave_rows(rows + 4 * g, x, pixels[g]);
    for (int q = 0; q < 4; ++q) {
      sums[q] = _mm512_set1_epi32(kRounding);
      for (int d = 0; d < kDigits; ++d) {
        if (d > 0) sums[q] = _mm512_slli_epi32(sums[q], 8);
        for (int g = 0; g < kQuads; ++g) {
          sums[q] = _mm512_dpbusd_epi32(sums[q], pixels[g][q], digits[g][d]);
        }
      }
    }
    return to_bytes(sums);
  });
}

void vertical_pass_of_many(const int32_t* plan, size_t stride, const uint8_t* const* rows,
                           int num_taps, const Columns& columns, uint8_t* out, size_t out_stride) {
  resize_columns(columns, out, out_stride, [&](size_t x) {
    __m512i sums[kDigits][4];
    for (int q = 0; q < 4; ++q) {
      sums[0][q] = _mm512_set1_epi32(kRounding);
      sums[1][q] = sums[2][q] = _mm512_setzero_si512();
    }
    const int32_t* digits = plan;
    for (int k = 0; k < num_taps; k += AxisWeights::kTapGroup) {
      __m512i pixels[4];
      interleave_rows(rows + k, x, pixels);
      for (int d = 0; d < kDigits; ++d, digits += stride) {
        const __m512i digit = _mm512_set1_epi32(*digits);
        for (int q = 0; q < 4; ++q) {
          sums[d][q] = _mm512_dpbusd_epi32(sums[d][q], pixels[q], digit);
        }
      }
    }
    for (int q = 0; q < 4; ++q) {
      sums[1][q] = _mm512_add_epi32(_mm512_slli_epi32(sums[0][q], 8), sums[1][q]);
      sums[0][q] = _mm512_add_epi32(_mm512_slli_epi32(sums[1][q], 8), sums[2][q]);
    }
    return to_bytes(sums[0]);
  });
}

void vertical(const AxisWeights& weights, const void* plan, int i, const uint8_t* const* rows,
              const Columns& columns, uint8_t* out, size_t out_stride) {
  const int num_taps = weights.num_taps[i];
  const int32_t* digits = static_cast<const int32_t*>(plan) + i;
  if (weights.max_taps <= 2) {
    return vertical_pass_of_two(digits, weights.stride, rows, columns, out, out_stride);
  }
  if (num_taps <= 4)
    return vertical_pass<1>(digits, weights.stride, rows, columns, out, out_stride);
  if (num_taps <= 8)
    return vertical_pass<2>(digits, weights.stride, rows, columns, out, out_stride);
  vertical_pass_of_many(digits, weights.stride, rows, num_taps, columns, out, out_stride);
}

}  // namespace

const ResizeKernels kResizeAvx512 = {
    plan_is_small, horizontal_plan_bytes, plan_horizontally, horizontal<1>,
    horizontal<3>, vertical_plan_bytes,   plan_vertically,   vertical};

}  // namespace imseq
