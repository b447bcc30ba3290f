// PixelStore at every level this processor has, against storing value by value; and nothing beside
// the row is written.
#include "sample/store.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using imseq::CpuLevel;
using imseq::PixelStore;

struct Case {
  int width, height, y;
  int32_t dtype, layout;
  bool flip;
};

size_t value_bytes(int32_t dtype) {
  if (dtype == IMSEQ_FLOAT32) return 4;
  return dtype == IMSEQ_UINT8 ? 1 : 2;
}

// The image's bytes behind one pixel row's stores, all others as they were.
void store_plainly(const Case& c, const std::vector<uint8_t>* planes, const uint8_t* table,
                   uint8_t* image) {
  const size_t bytes = value_bytes(c.dtype);
  for (int x = 0; x < c.width; ++x) {
    for (int channel = 0; channel < 3; ++channel) {
      const uint8_t pixel = planes[channel][static_cast<size_t>(c.flip ? c.width - 1 - x : x)];
      const int place = c.layout == IMSEQ_CHW ? (channel * c.height + c.y) * c.width + x
                                              : (c.y * c.width + x) * 3 + channel;
      uint8_t* to = image + static_cast<size_t>(place) * bytes;
      if (c.dtype == IMSEQ_UINT8) {
        *to = pixel;
      } else {
        std::memcpy(to, table + (static_cast<size_t>(channel) * 256 + pixel) * bytes, bytes);
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(2);
  const auto draw = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  std::vector<uint8_t> table(3 * 256 * 4);
  for (uint8_t& byte : table) byte = static_cast<uint8_t>(random());
  int num_failures = 0;
  for (const CpuLevel level :
       {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
    if (!imseq::cpu_has(level)) continue;
    imseq::use_cpu_level(level);
    PixelStore store;  // one for all: what an image leaves behind must not show in the next
    for (int i = 0; i < 4000; ++i) {
      Case c{draw(1, 300), draw(1, 3), 0, draw(0, 3), draw(0, 1), draw(0, 1) == 1};
      c.y = draw(0, c.height - 1);
      std::vector<uint8_t> planes[3];
      for (std::vector<uint8_t>& plane : planes) {
        plane.resize(static_cast<size_t>(c.width) + imseq::kRowSlack);
        for (uint8_t& byte : plane) byte = static_cast<uint8_t>(random());
      }
      // Anywhere a value may lie, as in a batch whose rows are no multiple of a vector.
      const size_t offset = static_cast<size_t>(draw(0, 63)) * value_bytes(c.dtype);
      const size_t num_values = static_cast<size_t>(3 * c.width * c.height);
      std::vector<uint8_t> got(offset + num_values * value_bytes(c.dtype) + 100, 77);
      std::vector<uint8_t> expected = got;
      store_plainly(c, planes, table.data(), expected.data() + offset);
      imseq_recipe recipe = {};
      recipe.out_width = c.width;
      recipe.out_height = c.height;
      recipe.dtype = c.dtype;
      recipe.layout = c.layout;
      recipe.table = c.dtype == IMSEQ_UINT8 ? nullptr : table.data();
      store.begin(recipe);
      store.store_row({planes[0].data(), planes[1].data(), planes[2].data()}, c.y, c.flip,
                      got.data() + offset);
      if (got != expected) {
        ++num_failures;
        std::fprintf(stderr,
                     "%s, case %d: row %d of %d x %d, dtype %d, layout %d, flip %d: not as "
                     "stored plainly\n",
                     imseq::cpu_level_name(level), i, c.y, c.height, c.width, c.dtype, c.layout,
                     c.flip);
      }
    }
  }
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
