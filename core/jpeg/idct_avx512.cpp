// The inverse DCT of idct.h with AVX-512: four blocks at a time.
//
// Values that are multiplied together lie in pairs of 16-bit words ("04": of rows 0 and 4), ready
// for vpdpwssd. The permutation that undoes the zigzag order pairs the rows, and orders the columns
// so that the first pass leaves pairs of columns side by side for the second.
#include <immintrin.h>

#include "jpeg/idct.h"

namespace imseq {

namespace {

// ---- permutations -------------------------------------------------------------------------------

struct Words {
  alignas(64) uint16_t index[32];
};
struct Bytes {
  alignas(64) uint8_t index[64];
};

constexpr int kPairs[4][2] = {{0, 4}, {2, 6}, {7, 1}, {3, 5}};  // of rows, and of columns

// Index in a block of word i of a register of pairs of rows: columns 0 4 2 6 7 1 3 5.
constexpr int zigzag_of_pair(int pair, int i) {
  const int row = kPairs[pair][i % 2], column = kPairs[i / 4 % 4][i / 2 % 2];
  return kZigzagOfNatural[8 * row + column];
}

// Two of a block's four pairs of rows, from both of its registers.
constexpr Words two_pairs(int first_pair) {
  Words words{};
  for (int i = 0; i < 32; ++i) {
    words.index[i] = static_cast<uint16_t>(zigzag_of_pair(first_pair + i / 16, i % 16));
  }
  return words;
}
constexpr Words kPairs04And26 = two_pairs(0), kPairs71And35 = two_pairs(2);

// One pair of rows of two blocks whose second registers are zero, and which words are not.
constexpr Words pair_of_two_blocks(int pair) {
  Words words{};
  for (int i = 0; i < 32; ++i) {
    words.index[i] = static_cast<uint16_t>(zigzag_of_pair(pair, i % 16) % 32 + i / 16 * 32);
  }
  return words;
}
constexpr __mmask32 present_in_first_half(int pair) {
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) {
    if (zigzag_of_pair(pair, i % 16) < 32) mask |= __mmask32{1} << i;
  }
  return mask;
}
constexpr Words kHalf[4] = {pair_of_two_blocks(0), pair_of_two_blocks(1), pair_of_two_blocks(2),
                            pair_of_two_blocks(3)};
constexpr __mmask32 kHalfPresent[4] = {present_in_first_half(0), present_in_first_half(1),
                                       present_in_first_half(2), present_in_first_half(3)};

// The upper left quarter of two blocks: pairs of rows 02, then 13; columns 0 2 1 3.
constexpr int kQuarterOrder[4] = {0, 2, 1, 3};
constexpr Words two_quarters() {
  Words words{};
  for (int i = 0; i < 32; ++i) {
    const int row = i / 16 + 2 * (i % 2), column = kQuarterOrder[i / 2 % 4];
    words.index[i] = static_cast<uint16_t>(kZigzagOfNatural[8 * row + column] + i / 8 % 2 * 32);
  }
  return words;
}
constexpr Words kQuarters = two_quarters();
constexpr __mmask32 outside_quarter() {
  __mmask32 mask = ~__mmask32{0};
  for (int y = 0; y < 4; ++y) {
    for (int x = 0; x < 4; ++x) mask &= ~(__mmask32{1} << kZigzagOfNatural[8 * y + x]);
  }
  return mask;
}
constexpr __mmask32 kOutsideQuarter = outside_quarter();

// Indices of the samples of rows `row` and `row` + 1 of four blocks in two registers of four
// columns each. Every 128-bit lane holds 4 x (columns 0 and 1), then 4 x (columns 2 and 3);
// `quarter` decides to which blocks and rows they belong.
constexpr Bytes two_rows(int row, bool quarter) {
  Bytes bytes{};
  for (int i = 0; i < 64; ++i) {
    const int y = row + i / 32, block = i / 8 % 4, x = i % 8;
    const int lane = quarter ? block : block % 2 + y % 2 * 2;
    const int place = quarter ? y : block / 2 + y / 2 * 2;
    bytes.index[i] =
        static_cast<uint8_t>(x / 4 * 64 + lane * 16 + x / 2 % 2 * 8 + place * 2 + x % 2);
  }
  return bytes;
}
constexpr Bytes kRows[2] = {two_rows(0, false), two_rows(2, false)};
constexpr Bytes kQuarterRows[2] = {two_rows(0, true), two_rows(2, true)};

// ---- arithmetic ---------------------------------------------------------------------------------

using Vector = __m512i;

template <typename T>
inline Vector load(const T* from) {
  return _mm512_loadu_si512(from);
}

// Factors of a pair.
inline Vector factors(int first, int second) {
  return _mm512_set1_epi32((first & 0xFFFF) |
                           static_cast<int>(static_cast<unsigned>(second) << 16));
}

struct Pairs {
  Vector p04, p26, p71, p35;
};

inline void butterfly(const Vector (&even)[4], const Vector (&odd)[4], Vector (&out)[8]) {
  for (int k = 0; k < 4; ++k) {
    out[k] = _mm512_add_epi32(even[k], odd[k]);
    out[7 - k] = _mm512_sub_epi32(even[k], odd[k]);
  }
}

// transform() of idct.cpp with `rounding` added. Requires the sum and the difference of 04 to fit
// 16 bits.
inline void transform(const Pairs& in, Vector rounding, Vector (&out)[8]) {
  const Vector sum = _mm512_dpwssd_epi32(rounding, in.p04, factors(8192, 8192));
  const Vector difference = _mm512_dpwssd_epi32(rounding, in.p04, factors(8192, -8192));
  const Vector even[4] = {_mm512_dpwssd_epi32(sum, in.p26, factors(10703, 4433)),
                          _mm512_dpwssd_epi32(difference, in.p26, factors(4433, -10704)),
                          _mm512_dpwssd_epi32(difference, in.p26, factors(-4433, 10704)),
                          _mm512_dpwssd_epi32(sum, in.p26, factors(-10703, -4433))};
  const Vector z = _mm512_add_epi16(in.p71, in.p35);
  const Vector z3 = _mm512_madd_epi16(z, factors(-6436, 9633));
  const Vector z4 = _mm512_madd_epi16(z, factors(9633, 6437));
  const Vector odd[4] = {_mm512_dpwssd_epi32(z4, in.p71, factors(-7373, 4926)),
                         _mm512_dpwssd_epi32(z3, in.p35, factors(4177, -20995)),
                         _mm512_dpwssd_epi32(z4, in.p35, factors(-20995, -4176)),
                         _mm512_dpwssd_epi32(z3, in.p71, factors(-4927, -7373))};
  butterfly(even, odd, out);
}

// The same for values 4 to 7 zero.
inline void transform_quarter(Vector p02, Vector p13, Vector rounding, Vector (&out)[8]) {
  const Vector even[4] = {_mm512_dpwssd_epi32(rounding, p02, factors(8192, 10703)),
                          _mm512_dpwssd_epi32(rounding, p02, factors(8192, 4433)),
                          _mm512_dpwssd_epi32(rounding, p02, factors(8192, -4433)),
                          _mm512_dpwssd_epi32(rounding, p02, factors(8192, -10703))};
  const Vector odd[4] = {
      _mm512_madd_epi16(p13, factors(11363, 9633)), _mm512_madd_epi16(p13, factors(9633, -2259)),
      _mm512_madd_epi16(p13, factors(6437, -11362)), _mm512_madd_epi16(p13, factors(2260, -6436))};
  butterfly(even, odd, out);
}

constexpr int kFirstShift = 11, kSecondShift = 18;
inline Vector first_rounding() { return _mm512_set1_epi32(1 << (kFirstShift - 1)); }
// Also centres the samples on 128.
inline Vector second_rounding() {
  return _mm512_set1_epi32((1 << (kSecondShift - 1)) + (128 << kSecondShift));
}

inline Vector pack_first(Vector a, Vector b) {
  return _mm512_packs_epi32(_mm512_srai_epi32(a, kFirstShift), _mm512_srai_epi32(b, kFirstShift));
}

// Two columns of samples as pairs; taking the upper halves does 16 of the shift by 18.
inline Vector pack_second(Vector a, Vector b) {
  const Vector upper_to_lower = _mm512_set4_epi32(0x0F0E, 0x0B0A, 0x0706, 0x0302);
  const Vector both = _mm512_mask_shuffle_epi8(b, 0x3333333333333333, a, upper_to_lower);
  return _mm512_srai_epi16(both, kSecondShift - 16);
}

// The result is negative or large if a value is not within [-8192, 8192).
inline Vector large(Vector values) { return _mm512_add_epi16(values, _mm512_set1_epi16(8192)); }
inline bool any_large(Vector values) {
  return _mm512_test_epi16_mask(values, _mm512_set1_epi16(static_cast<int16_t>(0xC000))) != 0;
}

// ---- four blocks --------------------------------------------------------------------------------

// Stores four blocks. In: columns of four rows each, as pack_second pairs them; out: rows.
struct Output {
  uint8_t* out;
  ptrdiff_t stride;
  __mmask32 columns;

  void store(int row, __m256i samples) const {
    _mm256_mask_storeu_epi8(out + row * stride, columns, samples);
  }
  void store_rows(int row, const Vector (&sums)[8], const Bytes (&order)[2]) const {
    const Vector left =
        _mm512_packus_epi16(pack_second(sums[0], sums[1]), pack_second(sums[2], sums[3]));
    const Vector right =
        _mm512_packus_epi16(pack_second(sums[4], sums[5]), pack_second(sums[6], sums[7]));
    for (int i = 0; i < 2; ++i) {
      const Vector rows = _mm512_permutex2var_epi8(left, load(order[i].index), right);
      store(row + 2 * i, _mm512_castsi512_si256(rows));
      store(row + 2 * i + 1, _mm512_extracti64x4_epi64(rows, 1));
    }
  }
};

// For blocks whose coefficients are zero but for the first.
inline void transform_dc(const Vector (&low)[4], const Output& output) {
  // Moves the four DCs into the lowest word of each lane, then computes as idct.cpp does.
  const Vector dc01 = _mm512_shuffle_i64x2(low[0], low[1], 0x00);
  const Vector dc23 = _mm512_shuffle_i64x2(low[2], low[3], 0x00);
  const Vector dc = _mm512_shuffle_i64x2(dc01, dc23, 0x88);
  const Vector rounded = _mm512_adds_epi16(_mm512_slli_epi16(dc, 2), _mm512_set1_epi16(16));
  const Vector sample = _mm512_add_epi16(_mm512_srai_epi16(rounded, 5), _mm512_set1_epi16(128));
  const Vector each = _mm512_packus_epi16(sample, sample);
  const Vector to_blocks =
      _mm512_set_epi64(0, 0, 0, 0, 0x3030303030303030, 0x2020202020202020, 0x1010101010101010, 0);
  const __m256i row = _mm512_castsi512_si256(_mm512_permutexvar_epi8(to_blocks, each));
  for (int y = 0; y < 8; ++y) output.store(y, row);
}

// For blocks whose rows 4 to 7 and columns 4 to 7 are zero. False, and no output: a value is large.
inline bool transform_quarters(const Vector (&low)[4], const Output& output) {
  const Vector order = load(kQuarters.index);
  const Vector first = _mm512_permutex2var_epi16(low[0], order, low[1]);
  const Vector second = _mm512_permutex2var_epi16(low[2], order, low[3]);
  const Vector p02 = _mm512_shuffle_i64x2(first, second, 0x44);
  const Vector p13 = _mm512_shuffle_i64x2(first, second, 0xEE);
  if (any_large(large(p02))) [[unlikely]]
    return false;
  Vector sums[8], rows[4];
  transform_quarter(p02, p13, first_rounding(), sums);
  for (int k = 0; k < 4; ++k) rows[k] = pack_first(sums[2 * k], sums[2 * k + 1]);
  for (int k = 0; k < 2; ++k) {
    const __m512 a = _mm512_castsi512_ps(rows[2 * k]), b = _mm512_castsi512_ps(rows[2 * k + 1]);
    transform_quarter(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                      _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)), second_rounding(), sums);
    output.store_rows(4 * k, sums, kQuarterRows);
  }
  return true;
}

// in: pairs of rows of blocks 0 and 1, and of blocks 2 and 3. False: a value is large, and the
// output is useless.
inline bool transform_whole(const Pairs (&in)[2], const Output& output) {
  Vector sums[2][8], rows[8];
  transform(in[0], first_rounding(), sums[0]);
  transform(in[1], first_rounding(), sums[1]);
  for (int k = 0; k < 8; ++k) rows[k] = pack_first(sums[0][k], sums[1][k]);
  // Even lanes hold pairs of columns 04 and 26, odd ones 71 and 35.
  Pairs columns[2];
  const auto split = [](Vector a, Vector b, Vector* even, Vector* odd) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    *even = _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88));
    *odd = _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xDD));
  };
  for (int k = 0; k < 2; ++k) {
    const Vector* r = rows + 4 * k;
    split(_mm512_shuffle_i64x2(r[0], r[1], 0x88), _mm512_shuffle_i64x2(r[2], r[3], 0x88),
          &columns[k].p04, &columns[k].p26);
    split(_mm512_shuffle_i64x2(r[0], r[1], 0xDD), _mm512_shuffle_i64x2(r[2], r[3], 0xDD),
          &columns[k].p71, &columns[k].p35);
  }
  const Vector first = _mm512_or_si512(large(in[0].p04), large(in[1].p04));
  const Vector second = _mm512_or_si512(large(columns[0].p04), large(columns[1].p04));
  if (any_large(_mm512_or_si512(first, second))) [[unlikely]]
    return false;
  for (int k = 0; k < 2; ++k) {
    transform(columns[k], second_rounding(), sums[k]);
    output.store_rows(4 * k, sums[k], kRows);
  }
  return true;
}

inline bool any(Vector values, __mmask32 which = ~__mmask32{0}) {
  return (_mm512_test_epi16_mask(values, values) & which) != 0;
}

inline Vector any_of(const Vector (&v)[4]) {
  return _mm512_or_si512(_mm512_or_si512(v[0], v[1]), _mm512_or_si512(v[2], v[3]));
}

// False: the portable code must do it.
inline bool transform_four(int16_t* const (&blocks)[4], const IdctTable& table,
                           const Output& output) {
  Vector low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    low[i] = load(blocks[i]);
    high[i] = load(blocks[i] + 32);
  }
  const Vector any_low = any_of(low), any_high = any_of(high);
  const Vector quant_low = load(table.quant_zigzag.data());
  for (Vector& v : low) v = _mm512_mullo_epi16(v, quant_low);
  Pairs pairs[2];
  if (any(any_high)) {
    const Vector quant_high = load(table.quant_zigzag.data() + 32);
    const Vector order0426 = load(kPairs04And26.index), order7135 = load(kPairs71And35.index);
    for (int i = 0; i < 2; ++i) {
      const Vector high0 = _mm512_mullo_epi16(high[2 * i], quant_high);
      const Vector high1 = _mm512_mullo_epi16(high[2 * i + 1], quant_high);
      const Vector even0 = _mm512_permutex2var_epi16(low[2 * i], order0426, high0);
      const Vector even1 = _mm512_permutex2var_epi16(low[2 * i + 1], order0426, high1);
      const Vector odd0 = _mm512_permutex2var_epi16(low[2 * i], order7135, high0);
      const Vector odd1 = _mm512_permutex2var_epi16(low[2 * i + 1], order7135, high1);
      pairs[i] = {_mm512_shuffle_i64x2(even0, even1, 0x44),
                  _mm512_shuffle_i64x2(even0, even1, 0xEE), _mm512_shuffle_i64x2(odd0, odd1, 0x44),
                  _mm512_shuffle_i64x2(odd0, odd1, 0xEE)};
    }
    if (!transform_whole(pairs, output)) return false;
    for (int16_t* block : blocks) _mm512_storeu_si512(block + 32, _mm512_setzero_si512());
  } else if (any(any_low, kOutsideQuarter)) {
    const auto pair = [&](int p, int i) {
      return _mm512_maskz_permutex2var_epi16(kHalfPresent[p], low[2 * i], load(kHalf[p].index),
                                             low[2 * i + 1]);
    };
    for (int i = 0; i < 2; ++i) pairs[i] = {pair(0, i), pair(1, i), pair(2, i), pair(3, i)};
    if (!transform_whole(pairs, output)) return false;
  } else if (any(any_low, ~__mmask32{1})) {
    if (!transform_quarters(low, output)) return false;
  } else {
    transform_dc(low, output);
  }
  for (int16_t* block : blocks) _mm512_storeu_si512(block, _mm512_setzero_si512());
  return true;
}

}  // namespace

void idct_avx512(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
                 const IdctTable& table, uint8_t* out, ptrdiff_t stride) {
  BlockWalk walk(coefficients, mcu_width, mcu_step);
  for (int i = 0; i < num_blocks; i += 4) {
    const int n = num_blocks - i < 4 ? num_blocks - i : 4;
    int16_t* const first = walk.next();
    int16_t* blocks[4] = {first, first, first, first};  // repeated in place of missing ones
    for (int k = 1; k < n; ++k) blocks[k] = walk.next();
    const Output output = {out + 8 * i, stride,
                           static_cast<__mmask32>((uint64_t{1} << (8 * n)) - 1)};
    if (transform_four(blocks, table, output)) continue;
    for (int k = 0; k < n; ++k) {
      idct_portable(blocks[k], 1, 64, 1, table, output.out + 8 * k, stride);
    }
  }
}

}  // namespace imseq
