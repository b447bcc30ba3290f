// The inverse DCT of idct.h with AVX2: two blocks at a time, one in each 128-bit lane.
//
// As in idct_avx512.cpp, values that are multiplied together lie in pairs ("04": of rows 0 and 4)
// after the de-zigzag, and the first pass leaves pairs of columns for the second.
#include <immintrin.h>

#include "jpeg/idct.h"

namespace imseq {

namespace {

using Vector = __m256i;

// ---- de-zigzag ----------------------------------------------------------------------------------

// The columns that half a pair of rows holds: four, which are two pairs of columns.
struct Columns {
  int column[4];
};
// Of the three ways to distribute the four pairs of columns, this one needs the fewest shuffles.
constexpr Columns kLeftHalf = {{0, 4, 3, 5}}, kRightHalf = {{2, 6, 7, 1}};
// The columns of the upper left quarter of a block, as pairs 02 and 13.
constexpr Columns kQuarter = {{0, 2, 1, 3}};

// A pshufb index that moves the words of half of rows `a` and `b` that lie among the eight from
// zigzag index 8 * source on to their places, and makes the others zero.
struct Shuffle {
  alignas(32) uint8_t index[32];
  bool needed;
};
constexpr Shuffle shuffle_from(int source, int a, int b, const Columns& columns) {
  Shuffle shuffle{};
  for (int i = 0; i < 16; ++i) {
    const int row = i / 2 % 2 == 0 ? a : b;
    const int k = kZigzagOfNatural[8 * row + columns.column[i / 4]];
    const bool here = k / 8 == source;
    shuffle.index[i] = static_cast<uint8_t>(here ? k % 8 * 2 + i % 2 : 0x80);
    shuffle.index[i + 16] = shuffle.index[i];
    if (here) shuffle.needed = true;
  }
  return shuffle;
}

inline Vector load(const void* from) { return _mm256_load_si256(static_cast<const Vector*>(from)); }

// Gathers half of rows kA and kB from the coefficients in zigzag order.
template <int kA, int kB, const Columns& kColumns, int kSource = 0>
inline Vector pair_of_rows(const Vector (&zigzag)[8]) {
  if constexpr (kSource == 8) {
    return _mm256_setzero_si256();
  } else {
    static constexpr Shuffle kShuffle = shuffle_from(kSource, kA, kB, kColumns);
    const Vector others = pair_of_rows<kA, kB, kColumns, kSource + 1>(zigzag);
    if constexpr (!kShuffle.needed) return others;
    return _mm256_or_si256(_mm256_shuffle_epi8(zigzag[kSource], load(kShuffle.index)), others);
  }
}

// Ones for the coefficients that must be zero in a class of blocks.
struct Mask {
  alignas(32) uint16_t word[4][16];
};
constexpr Mask outside_quarter() {
  Mask mask{};
  for (int k = 0; k < 32; ++k) {
    mask.word[k / 8][k % 8] = mask.word[k / 8][k % 8 + 8] = 0xFFFF;
  }
  for (int y = 0; y < 4; ++y) {
    for (int x = 0; x < 4; ++x) {
      const int k = kZigzagOfNatural[8 * y + x];
      mask.word[k / 8][k % 8] = mask.word[k / 8][k % 8 + 8] = 0;
    }
  }
  return mask;
}
constexpr Mask kOutsideQuarter = outside_quarter();

// ---- arithmetic ---------------------------------------------------------------------------------

// Factors of a pair.
inline Vector factors(int first, int second) {
  return _mm256_set1_epi32((first & 0xFFFF) |
                           static_cast<int>(static_cast<unsigned>(second) << 16));
}
inline Vector product(Vector pair, int first, int second) {
  return _mm256_madd_epi16(pair, factors(first, second));
}

struct Pairs {
  Vector p04, p26, p71, p35;
};

inline void butterfly(const Vector (&even)[4], const Vector (&odd)[4], Vector (&out)[8]) {
  for (int k = 0; k < 4; ++k) {
    out[k] = _mm256_add_epi32(even[k], odd[k]);
    out[7 - k] = _mm256_sub_epi32(even[k], odd[k]);
  }
}

// transform() of idct.cpp with `rounding` added. Requires the sum and the difference of 04 to fit
// 16 bits.
inline void transform(const Pairs& in, Vector rounding, Vector (&out)[8]) {
  const Vector sum = _mm256_add_epi32(product(in.p04, 8192, 8192), rounding);
  const Vector difference = _mm256_add_epi32(product(in.p04, 8192, -8192), rounding);
  const Vector even2 = product(in.p26, 4433, -10704), even3 = product(in.p26, 10703, 4433);
  const Vector even[4] = {_mm256_add_epi32(sum, even3), _mm256_add_epi32(difference, even2),
                          _mm256_sub_epi32(difference, even2), _mm256_sub_epi32(sum, even3)};
  const Vector z = _mm256_add_epi16(in.p71, in.p35);
  const Vector z3 = product(z, -6436, 9633), z4 = product(z, 9633, 6437);
  const Vector odd[4] = {_mm256_add_epi32(product(in.p71, -7373, 4926), z4),
                         _mm256_add_epi32(product(in.p35, 4177, -20995), z3),
                         _mm256_add_epi32(product(in.p35, -20995, -4176), z4),
                         _mm256_add_epi32(product(in.p71, -4927, -7373), z3)};
  butterfly(even, odd, out);
}

// The same for values 4 to 7 zero.
inline void transform_quarter(Vector p02, Vector p13, Vector rounding, Vector (&out)[8]) {
  const Vector even[4] = {_mm256_add_epi32(product(p02, 8192, 10703), rounding),
                          _mm256_add_epi32(product(p02, 8192, 4433), rounding),
                          _mm256_add_epi32(product(p02, 8192, -4433), rounding),
                          _mm256_add_epi32(product(p02, 8192, -10703), rounding)};
  const Vector odd[4] = {product(p13, 11363, 9633), product(p13, 9633, -2259),
                         product(p13, 6437, -11362), product(p13, 2260, -6436)};
  butterfly(even, odd, out);
}

constexpr int kFirstShift = 11, kSecondShift = 18;
inline Vector first_rounding() { return _mm256_set1_epi32(1 << (kFirstShift - 1)); }
// Also centres the samples on 128.
inline Vector second_rounding() {
  return _mm256_set1_epi32((1 << (kSecondShift - 1)) + (128 << kSecondShift));
}

inline Vector pack_first(Vector a, Vector b) {
  return _mm256_packs_epi32(_mm256_srai_epi32(a, kFirstShift), _mm256_srai_epi32(b, kFirstShift));
}

// Two columns of samples as pairs; taking the upper halves does 16 of the shift by 18.
inline Vector pack_second(Vector a, Vector b) {
  const Vector both = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA);
  return _mm256_srai_epi16(both, kSecondShift - 16);
}

// The upper two bits of the result tell whether a value is within [-8192, 8192).
inline Vector large(Vector values) { return _mm256_add_epi16(values, _mm256_set1_epi16(8192)); }
inline bool any_large(Vector values) {
  return !_mm256_testz_si256(values, _mm256_set1_epi16(static_cast<int16_t>(0xC000)));
}

// Four words of 32 bits from each half of a lane's rows: those at even, or at odd places.
inline Vector even_pairs(Vector a, Vector b) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}
inline Vector odd_pairs(Vector a, Vector b) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xDD));
}

// ---- two blocks ---------------------------------------------------------------------------------

// Where the samples of one block, or two, go.
struct Output {
  uint8_t* out;
  ptrdiff_t stride;
  bool both;

  void store(int row, __m128i samples) const {
    auto* to = reinterpret_cast<__m128i*>(out + row * stride);
    if (both) {
      _mm_storeu_si128(to, samples);
    } else {
      _mm_storel_epi64(to, samples);
    }
  }
  // sums: the eight columns of four rows.
  void store_rows(int row, const Vector (&sums)[8]) const {
    const Vector c01 = pack_second(sums[0], sums[1]), c23 = pack_second(sums[2], sums[3]);
    const Vector c45 = pack_second(sums[4], sums[5]), c67 = pack_second(sums[6], sums[7]);
    const Vector c0145 = _mm256_packus_epi16(c01, c45), c2367 = _mm256_packus_epi16(c23, c67);
    const Vector left = _mm256_unpacklo_epi16(c0145, c2367);
    const Vector right = _mm256_unpackhi_epi16(c0145, c2367);
    store_two(row, _mm256_unpacklo_epi32(left, right));
    store_two(row + 2, _mm256_unpackhi_epi32(left, right));
  }
  void store_two(int row, Vector rows) const {
    const Vector by_row = _mm256_permute4x64_epi64(rows, 0xD8);
    store(row, _mm256_castsi256_si128(by_row));
    store(row + 1, _mm256_extracti128_si256(by_row, 1));
  }
};

// For blocks whose coefficients are zero but for the first.
inline void transform_dc(Vector first, const Output& output) {
  const Vector rounded = _mm256_adds_epi16(_mm256_slli_epi16(first, 2), _mm256_set1_epi16(16));
  const Vector sample = _mm256_add_epi16(_mm256_srai_epi16(rounded, 5), _mm256_set1_epi16(128));
  const Vector each =
      _mm256_shuffle_epi8(_mm256_packus_epi16(sample, sample), _mm256_setzero_si256());
  const __m128i row = _mm256_castsi256_si128(_mm256_permute4x64_epi64(each, 0x08));
  for (int y = 0; y < 8; ++y) output.store(y, row);
}

// For blocks whose rows 4 to 7 and columns 4 to 7 are zero. False, and no output: a value is large.
inline bool transform_quarters(const Vector (&zigzag)[8], const Output& output) {
  const Vector p02 = pair_of_rows<0, 2, kQuarter>(zigzag);
  const Vector p13 = pair_of_rows<1, 3, kQuarter>(zigzag);
  if (any_large(large(p02))) [[unlikely]]
    return false;
  Vector sums[8], rows[4];
  transform_quarter(p02, p13, first_rounding(), sums);
  for (int k = 0; k < 4; ++k) rows[k] = pack_first(sums[2 * k], sums[2 * k + 1]);
  for (int k = 0; k < 2; ++k) {
    transform_quarter(even_pairs(rows[2 * k], rows[2 * k + 1]),
                      odd_pairs(rows[2 * k], rows[2 * k + 1]), second_rounding(), sums);
    output.store_rows(4 * k, sums);
  }
  return true;
}

template <const Columns& kColumns>
inline Pairs pairs_of_rows(const Vector (&zigzag)[8]) {
  return {pair_of_rows<0, 4, kColumns>(zigzag), pair_of_rows<2, 6, kColumns>(zigzag),
          pair_of_rows<7, 1, kColumns>(zigzag), pair_of_rows<3, 5, kColumns>(zigzag)};
}

// False: a value is large, and the output is useless.
inline bool transform_whole(const Vector (&zigzag)[8], const Output& output) {
  Vector sums[8], half[8], rows[8];
  const Pairs first = pairs_of_rows<kLeftHalf>(zigzag);
  transform(first, first_rounding(), sums);
  for (int k = 0; k < 8; ++k) half[k] = _mm256_srai_epi32(sums[k], kFirstShift);
  const Pairs second = pairs_of_rows<kRightHalf>(zigzag);
  transform(second, first_rounding(), sums);
  for (int k = 0; k < 8; ++k) {
    rows[k] = _mm256_packs_epi32(half[k], _mm256_srai_epi32(sums[k], kFirstShift));
  }
  const Vector first_large = _mm256_or_si256(large(first.p04), large(second.p04));
  // Every row now holds pairs of columns 04, 35, 26, 71.
  for (int k = 0; k < 2; ++k) {
    const Vector* r = rows + 4 * k;
    const Vector left01 = _mm256_unpacklo_epi32(r[0], r[1]);
    const Vector left23 = _mm256_unpacklo_epi32(r[2], r[3]);
    const Vector right01 = _mm256_unpackhi_epi32(r[0], r[1]);
    const Vector right23 = _mm256_unpackhi_epi32(r[2], r[3]);
    const Pairs columns = {
        _mm256_unpacklo_epi64(left01, left23), _mm256_unpacklo_epi64(right01, right23),
        _mm256_unpackhi_epi64(right01, right23), _mm256_unpackhi_epi64(left01, left23)};
    if (any_large(_mm256_or_si256(first_large, large(columns.p04)))) [[unlikely]]
      return false;
    transform(columns, second_rounding(), sums);
    output.store_rows(4 * k, sums);
  }
  return true;
}

inline bool is_zero(Vector values) { return _mm256_testz_si256(values, values); }

// False: the portable code must do it.
inline bool transform_two(int16_t* const (&blocks)[2], const IdctTable& table,
                          const Output& output) {
  Vector zigzag[8];
  for (int i = 0; i < 8; ++i) {
    const auto eight = [&](int block) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks[block] + 8 * i));
    };
    zigzag[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(0)), eight(1), 1);
  }
  Vector outside = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    const Vector masked = _mm256_and_si256(zigzag[i], load(kOutsideQuarter.word[i]));
    outside = _mm256_or_si256(outside, _mm256_or_si256(masked, zigzag[i + 4]));
  }
  const Vector not_first = _mm256_setr_epi32(-65536, -1, -1, -1, -65536, -1, -1, -1);
  const Vector inside =
      _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(zigzag[0], not_first), zigzag[1]),
                      _mm256_or_si256(zigzag[2], zigzag[3]));
  const int16_t* quant = table.quant_zigzag.data();
  for (int i = 0; i < 8; ++i) {
    const auto* eight = reinterpret_cast<const __m128i*>(quant + 8 * i);
    zigzag[i] = _mm256_mullo_epi16(zigzag[i], _mm256_broadcastsi128_si256(_mm_load_si128(eight)));
  }
  int num_used = 128;  // bytes of a block that may be nonzero
  if (!is_zero(outside)) {
    if (!transform_whole(zigzag, output)) return false;
  } else {
    num_used = 64;
    if (is_zero(inside)) {
      transform_dc(zigzag[0], output);
    } else if (!transform_quarters(zigzag, output)) {
      return false;
    }
  }
  for (int16_t* block : blocks) {
    for (int i = 0; i < num_used / 2; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<Vector*>(block + i), _mm256_setzero_si256());
    }
  }
  return true;
}

}  // namespace

void idct_avx2(int16_t* coefficients, int mcu_width, ptrdiff_t mcu_step, int num_blocks,
               const IdctTable& table, uint8_t* out, ptrdiff_t stride) {
  BlockWalk walk(coefficients, mcu_width, mcu_step);
  for (int i = 0; i < num_blocks; i += 2) {
    const bool both = i + 1 < num_blocks;
    int16_t* const first = walk.next();
    int16_t* const blocks[2] = {first, both ? walk.next() : first};
    const Output output = {out + 8 * i, stride, both};
    if (transform_two(blocks, table, output)) continue;
    for (int k = 0; k < (both ? 2 : 1); ++k) {
      idct_portable(blocks[k], 1, 64, 1, table, output.out + 8 * k, stride);
    }
  }
}

}  // namespace imseq
