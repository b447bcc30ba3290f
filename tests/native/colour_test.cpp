// Every level of chroma upsampling and colour conversion against libjpeg-turbo's formulas written
// down plainly, in memory of exactly the promised size (for sanitizers).
#include "jpeg/colour.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

using imseq::ColourKernels;
using imseq::CpuLevel;
using imseq::kRowSlack;

std::mt19937 generator(1);
int num_failures = 0;

int draw(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<unsigned>(high - low + 1));
}

void expect(bool holds, const char* what, CpuLevel level, int a, int b = 0, int c = 0) {
  if (holds) return;
  ++num_failures;
  std::fprintf(stderr, "failed: %s, %s (%d, %d, %d)\n", what, imseq::cpu_level_name(level), a, b,
               c);
}

// A row and its slack, and not a byte more.
class Row {
 public:
  explicit Row(int size) : bytes_(new uint8_t[static_cast<size_t>(size + kRowSlack)]) {
    std::generate_n(bytes_.get(), size + kRowSlack,
                    [] { return static_cast<uint8_t>(generator()); });
  }
  uint8_t* data() { return bytes_.get(); }
  int operator[](int i) const { return bytes_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
};

uint8_t clamped(int value) { return static_cast<uint8_t>(std::clamp(value, 0, 255)); }

// jdcolor.c, for all values of a pixel but for luma, of which only some, and rows of all lengths.
void test_conversion(const ColourKernels& kernels, CpuLevel level) {
  const auto is_right = [](int y, int cb, int cr, int r, int g, int b) {
    const auto part = [](double factor, int x) {
      return static_cast<int>(factor * 65536 + 0.5) * x;
    };
    const int u = cb - 128, v = cr - 128, half = 1 << 15;
    return r == clamped(y + ((part(1.402, v) + half) >> 16)) &&
           g == clamped(y + ((-part(0.34414, u) - part(0.71414, v) + half) >> 16)) &&
           b == clamped(y + ((part(1.772, u) + half) >> 16));
  };
  for (int cb = 0; cb < 256; ++cb) {
    for (int start = 0; start < 256; start += 64) {
      const int n = draw(1, 64) + 192;
      Row y(n), cbs(n), crs(n), r(n), g(n), b(n);
      for (int i = 0; i < n; ++i) {
        cbs.data()[i] = static_cast<uint8_t>(cb);
        crs.data()[i] = static_cast<uint8_t>(start + i);
      }
      kernels.ycc_to_rgb(y.data(), cbs.data(), crs.data(), n, r.data(), g.data(), b.data());
      for (int i = 0; i < n; ++i) {
        expect(is_right(y[i], cbs[i], crs[i], r[i], g[i], b[i]), "ycc_to_rgb", level, y[i], cb,
               crs[i]);
      }
    }
  }
  for (int n = 1; n < 200; ++n) {
    Row y(n), cb(n), cr(n), r(n), g(n), b(n);
    kernels.ycc_to_rgb(y.data(), cb.data(), cr.data(), n, r.data(), g.data(), b.data());
    for (int i = 0; i < n; ++i) {
      expect(is_right(y[i], cb[i], cr[i], r[i], g[i], b[i]), "ycc_to_rgb", level, n, i);
    }
  }
}

// jdsample.c, for any part of rows of any width.
void test_upsampling(const ColourKernels& kernels, CpuLevel level) {
  for (int i = 0; i < 3000; ++i) {
    const int width = draw(3, i % 4 == 0 ? 300 : 70);
    const int begin = draw(0, 2) == 0 ? 0 : draw(0, width - 1);
    const int end = draw(0, 2) == 0 ? width : draw(begin + 1, width);
    const int n = end - begin;
    Row near(width), far(width), out(2 * n), tall(n);
    std::vector<uint16_t> sums(static_cast<size_t>(n) + 2);

    kernels.upsample_h2v1(near.data(), begin, end, width, out.data());
    for (int x = 2 * begin; x < 2 * end; ++x) {
      const int own = x / 2, other = own + (x % 2 == 0 ? -1 : 1);
      const bool alone = other < 0 || other == width;
      const int pixel = alone ? near[own] : (3 * near[own] + near[other] + 1 + x % 2) >> 2;
      expect(out[x - 2 * begin] == pixel, "upsample_h2v1", level, begin, end, x);
    }

    kernels.upsample_h2v2(near.data(), far.data(), begin, end, width, sums.data(), out.data());
    for (int x = 2 * begin; x < 2 * end; ++x) {
      const int own = x / 2, other = std::clamp(own + (x % 2 == 0 ? -1 : 1), 0, width - 1);
      const int pixel =
          (3 * (3 * near[own] + far[own]) + 3 * near[other] + far[other] + 8 - x % 2) >> 4;
      expect(out[x - 2 * begin] == pixel, "upsample_h2v2", level, begin, end, x);
    }

    const bool below = draw(0, 1) == 1;
    kernels.upsample_h1v2(near.data(), far.data(), below, n, tall.data());
    for (int x = 0; x < n; ++x) {
      const int pixel = (3 * near[x] + far[x] + (below ? 2 : 1)) >> 2;
      expect(tall[x] == pixel, "upsample_h1v2", level, n, x);
    }

    const int factor = draw(1, 4);
    Row repeated(n * factor);
    kernels.replicate(near.data(), n, factor, repeated.data());
    for (int x = 0; x < n * factor; ++x) {
      expect(repeated[x] == near[x / factor], "replicate", level, n, factor, x);
    }
  }
}

}  // namespace

int main() {
  for (const CpuLevel level :
       {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
    if (!imseq::cpu_has(level)) continue;
    test_conversion(imseq::colour_kernels(level), level);
    test_upsampling(imseq::colour_kernels(level), level);
  }
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
