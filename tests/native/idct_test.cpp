// Every level of the inverse DCT against libjpeg's C code, to which the reference adds what
// libjpeg-turbo's SIMD code does out of range. Everything there must be defined, and all levels
// agree.
#include "jpeg/idct.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using imseq::CpuLevel;
using imseq::IdctTable;

std::mt19937 generator(1);

int draw(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<unsigned>(high - low + 1));
}

int16_t draw_value(int style) {
  constexpr int16_t kExtremes[] = {-32768, 32767, -32767, 16384, -16384,
                                   8192,   -8192, 8191,   -8193, 1};
  if (style == 0) return static_cast<int16_t>(draw(-40, 40));
  if (style == 1) return kExtremes[draw(0, 9)];
  return static_cast<int16_t>(generator());
}

IdctTable draw_table() {
  imseq::JpegQuantTable quant;
  const int style = draw(0, 3);
  for (uint16_t& value : quant.values) {
    value = static_cast<uint16_t>(style == 0 ? 1 : style == 3 ? generator() : draw(1, 40));
  }
  return IdctTable(quant);
}

// Which coefficients may be other than zero, in zigzag order: a prefix, or a corner in rows and
// columns, so that every short cut of a kernel is met.
std::vector<bool> draw_places() {
  std::vector<bool> places(64);
  const bool corner = draw(0, 1) == 0;
  const int last = draw(0, 2) == 0 ? 0 : draw(0, 63), height = draw(1, 8), width = draw(1, 8);
  for (size_t k = 0; k < 64; ++k) {
    const int natural = imseq::kNaturalOrder[k];
    places[k] = corner ? natural / 8 < height && natural % 8 < width : static_cast<int>(k) <= last;
  }
  return places;
}

constexpr uint8_t kUntouched = 0xA5;

// Blocks as an interval of MCUs has them, and the samples' surroundings.
struct Case {
  Case() : mcu_width(draw(1, 4)), num_blocks(draw(1, 13)), table(draw_table()) {
    mcu_step = 64 * (mcu_width + draw(0, 3));
    stride = 8 * num_blocks + draw(0, 70);
    coefficients.resize(static_cast<size_t>((num_blocks / mcu_width + 1) * mcu_step));
    const int style = draw(0, 2);
    const bool alike = draw(0, 1) == 0;
    std::vector<bool> places = draw_places();
    for (int i = 0; i < num_blocks; ++i) {
      if (!alike) places = draw_places();
      const int density = draw(1, 8);
      for (size_t k = 0; k < 64; ++k) {
        if (places[k] && draw(1, density) == 1) block(i)[k] = draw_value(style);
      }
    }
  }
  int16_t* block(int i) {
    return coefficients.data() + (i / mcu_width) * mcu_step + (i % mcu_width) * 64;
  }

  int mcu_width, num_blocks;
  ptrdiff_t mcu_step, stride;
  IdctTable table;
  std::vector<int16_t> coefficients;
};

long wrapped(long value) { return static_cast<int16_t>(value); }

// jpeg_idct_islow (jidctint.c) for one row or column; `shift` descales. Only the wrapping is not
// libjpeg's.
void libjpeg_pass(const long* in, long* out, int step, int shift) {
  const auto at = [&](int k) { return in[k * step]; };
  const long z1 = (at(2) + at(6)) * 4433;
  const long e2 = z1 - at(6) * 15137, e3 = z1 + at(2) * 6270;
  const long e0 = wrapped(at(0) + at(4)) * 8192, e1 = wrapped(at(0) - at(4)) * 8192;
  const long s[4] = {e0 + e3, e1 + e2, e1 - e2, e0 - e3};
  long t0 = at(7), t1 = at(5), t2 = at(3), t3 = at(1);
  const long y1 = (t0 + t3) * -7373, y2 = (t1 + t2) * -20995;
  const long z3 = wrapped(t0 + t2), z4 = wrapped(t1 + t3);
  const long y5 = (z3 + z4) * 9633;
  const long y3 = z3 * -16069 + y5, y4 = z4 * -3196 + y5;
  t0 = t0 * 2446 + y1 + y3;
  t1 = t1 * 16819 + y2 + y4;
  t2 = t2 * 25172 + y2 + y3;
  t3 = t3 * 12299 + y1 + y4;
  const long odd[4] = {t3, t2, t1, t0};
  for (int k = 0; k < 4; ++k) {
    out[k * step] = (s[k] + odd[k] + (1L << (shift - 1))) >> shift;
    out[(7 - k) * step] = (s[k] - odd[k] + (1L << (shift - 1))) >> shift;
  }
}

void libjpeg_idct(const int16_t* zigzag, const IdctTable& table, uint8_t* out, ptrdiff_t stride) {
  long work[64];
  bool only_first_row = true;
  for (size_t k = 0; k < 64; ++k) {
    const size_t natural = imseq::kNaturalOrder[k];
    work[natural] = wrapped(zigzag[k] * long{table.quant[natural]});
    if (natural >= 8 && zigzag[k] != 0) only_first_row = false;
  }
  for (int x = 0; x < 8; ++x) {
    const long first = work[x];
    libjpeg_pass(work + x, work + x, 8, 11);
    for (int y = 0; y < 8; ++y) {
      long& value = work[8 * y + x];
      // A short cut of the SIMD code wraps where the full transform saturates.
      value = only_first_row ? wrapped(first * 4) : std::clamp(value, -32768L, 32767L);
    }
  }
  for (int y = 0; y < 8; ++y) {
    libjpeg_pass(work + 8 * y, work + 8 * y, 1, 18);
    for (int x = 0; x < 8; ++x) {
      out[y * stride + x] = static_cast<uint8_t>(std::clamp(work[8 * y + x] + 128, 0L, 255L));
    }
  }
}

std::vector<uint8_t> expected_samples(Case& test) {
  std::vector<uint8_t> samples(static_cast<size_t>(8 * test.stride), kUntouched);
  for (int i = 0; i < test.num_blocks; ++i) {
    libjpeg_idct(test.block(i), test.table, samples.data() + 8 * i, test.stride);
  }
  return samples;
}

bool passes(const Case& test, CpuLevel level, const std::vector<uint8_t>& expected) {
  std::vector<int16_t> coefficients = test.coefficients;
  std::vector<uint8_t> samples(expected.size(), kUntouched);
  imseq::idct_kernel(level)(coefficients.data(), test.mcu_width, test.mcu_step, test.num_blocks,
                            test.table, samples.data(), test.stride);
  const bool zeroed = std::count(coefficients.begin(), coefficients.end(), 0) ==
                      static_cast<ptrdiff_t>(coefficients.size());
  return zeroed && samples == expected;
}

}  // namespace

int main() {
  int num_failures = 0;
  for (int i = 0; i < 60000 && num_failures < 20; ++i) {
    Case test;
    const std::vector<uint8_t> expected = expected_samples(test);
    for (const CpuLevel level :
         {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
      if (!imseq::cpu_has(level) || passes(test, level, expected)) continue;
      ++num_failures;
      std::fprintf(stderr,
                   "case %d, %s: %d blocks, %d to an MCU: not as libjpeg's, or not left zero\n", i,
                   imseq::cpu_level_name(level), test.num_blocks, test.mcu_width);
    }
  }
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
