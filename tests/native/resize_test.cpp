// Resizer at every level this processor has, against the algorithm written down plainly: all
// weights, both passes over the whole image, then the window cut out. Equality with Pillow itself
// is what tests/test_decode.py checks.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "resize/resizer.h"

namespace {

using imseq::CpuLevel;
using imseq::Region;
using imseq::Resizer;

double filter_value(int filter, double x) {
  if (filter == IMSEQ_FILTER_BOX) return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  x = std::fabs(x);
  if (filter == IMSEQ_FILTER_BILINEAR) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

// One channel, row by row.
struct Plane {
  int height, width;
  std::vector<uint8_t> values;
  Plane(int h, int w) : height(h), width(w), values(static_cast<size_t>(h) * w) {}
  uint8_t& at(int y, int x) { return values[static_cast<size_t>(y) * width + x]; }
};

Plane transposed(Plane& in) {
  Plane out(in.width, in.height);
  for (int y = 0; y < in.height; ++y) {
    for (int x = 0; x < in.width; ++x) out.at(x, y) = in.at(y, x);
  }
  return out;
}

Plane resized_horizontally(Plane& in, int out_width, int filter) {
  if (out_width == in.width) return in;
  Plane out(in.height, out_width);
  const double scale = static_cast<double>(in.width) / out_width, stretch = std::max(scale, 1.0);
  const double half_widths[] = {0.5, 1.0, 2.0};
  const double support = half_widths[filter] * stretch;
  for (int x = 0; x < out_width; ++x) {
    const double center = (x + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(center - support + 0.5));
    const int last = std::min(in.width, static_cast<int>(center + support + 0.5));
    std::vector<double> weights;
    double total = 0;
    for (int i = first; i < last; ++i) {
      weights.push_back(filter_value(filter, (i - first + first - center + 0.5) * (1.0 / stretch)));
      total += weights.back();
    }
    for (int y = 0; y < in.height; ++y) {
      int64_t sum = 1 << 21;
      for (int i = first; i < last; ++i) {
        const double weight = weights[static_cast<size_t>(i - first)] / total * (1 << 22);
        sum += static_cast<int64_t>(weight < 0 ? weight - 0.5 : weight + 0.5) * in.at(y, i);
      }
      out.at(y, x) = static_cast<uint8_t>(std::clamp<int64_t>(sum >> 22, 0, 255));
    }
  }
  return out;
}

Plane resized_vertically(Plane& in, int out_height, int filter) {
  Plane turned = transposed(in);
  Plane resized = resized_horizontally(turned, out_height, filter);
  return transposed(resized);
}

Plane reference(Plane& image, const imseq_view& view, int out_height, int out_width, int filter,
                bool vertical_first) {
  Plane box(view.height, view.width);
  for (int y = 0; y < view.height; ++y) {
    for (int x = 0; x < view.width; ++x) box.at(y, x) = image.at(view.top + y, view.left + x);
  }
  const auto vertically = [&](Plane p) {
    return resized_vertically(p, view.resized_height, filter);
  };
  const auto horizontally = [&](Plane p) {
    return resized_horizontally(p, view.resized_width, filter);
  };
  Plane resized = vertical_first ? horizontally(vertically(box)) : vertically(horizontally(box));
  Plane out(out_height, out_width);
  for (int y = 0; y < out_height; ++y) {
    for (int x = 0; x < out_width; ++x) {
      const int from_y = y + view.window_top, from_x = x + view.window_left;
      if (from_y < 0 || from_y >= resized.height || from_x < 0 || from_x >= resized.width) continue;
      out.at(y, x) = resized.at(from_y, from_x);
    }
  }
  return out;
}

// Row y of a plane as the resizer hands it over.
std::vector<uint8_t> expected_row(Plane& plane, int y, bool flip) {
  const uint8_t* row = &plane.at(y, 0);
  std::vector<uint8_t> expected(row, row + plane.width);
  if (flip) std::reverse(expected.begin(), expected.end());
  return expected;
}

// Writes row y where it is to lie, and nothing beside it.
bool writes_alike(Resizer& resizer, std::vector<Plane>& expected, int y) {
  const auto width = static_cast<size_t>(expected[0].width);
  const size_t stride = width + static_cast<size_t>(y) % 70, offset = static_cast<size_t>(y) % 64;
  std::vector<uint8_t> alike(offset + expected.size() * stride + 64, 77);
  std::vector<uint8_t> got = alike;
  for (size_t p = 0; p < expected.size(); ++p) {
    const std::vector<uint8_t> row = expected_row(expected[p], y, resizer.flips());
    std::copy(row.begin(), row.end(), alike.begin() + static_cast<ptrdiff_t>(offset + p * stride));
  }
  resizer.write_row(y, got.data() + offset, stride);
  return got == alike;
}

// True where all planes come out as the reference has them.
bool resizes_alike(Resizer& resizer, std::vector<Plane>& image, const imseq_view& view,
                   int out_height, int out_width, int filter, int passes) {
  const int num_planes = static_cast<int>(image.size());
  const bool vertical_first =
      passes == IMSEQ_PASSES_PILLOW_13 && view.height > view.resized_height &&
      view.height - view.resized_height > 2 * (view.width - view.resized_width);
  std::vector<Plane> expected;
  for (Plane& plane : image) {
    expected.push_back(reference(plane, view, out_height, out_width, filter, vertical_first));
  }
  int num_checked = 0;
  const auto ready_rows_are_alike = [&] {
    for (; num_checked < resizer.num_ready(); ++num_checked) {
      const auto planes = resizer.output_row(num_checked);
      for (size_t p = 0; p < image.size(); ++p) {
        const auto row = expected_row(expected[p], num_checked, resizer.flips());
        if (!std::equal(row.begin(), row.end(), planes[p])) return false;
      }
      if (resizer.can_write_rows() && !writes_alike(resizer, expected, num_checked)) return false;
    }
    return true;
  };
  resizer.begin(view, out_height, out_width, num_planes, filter, passes);
  // Where it doesn't flip, whoever stores the rows does.
  if (resizer.flips() && (view.flip == 0 || view.width == view.resized_width)) return false;
  const Region source = resizer.source();
  for (int y = source.top; y < source.top + source.height; ++y) {
    const auto planes = resizer.source_planes();
    for (size_t p = 0; p < image.size(); ++p) {
      for (int x = 0; x < source.width; ++x) planes[p][x] = image[p].at(y, source.left + x);
      // Kernels that fill the rows may write so far.
      std::fill_n(planes[p] + source.width, imseq::kRowSlack, static_cast<uint8_t>(y));
    }
    resizer.add_row();
    if (!ready_rows_are_alike()) return false;
  }
  return ready_rows_are_alike() && num_checked == out_height;
}

// Random images, views and outputs, the same for every level; returns how many come out wrong.
int num_failures_at(CpuLevel level) {
  imseq::use_cpu_level(level);
  std::mt19937 random(1);
  const auto draw = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  Resizer resizer;  // one for all: what an image leaves behind must not show in the next
  int num_failures = 0;
  for (int i = 0; i < 4000; ++i) {
    // Now and then strongly reduced: many taps, fewer at the edges; or large enough for whole
    // vectors.
    const bool large = i % 20 == 1;
    const int most = large ? 300 : 60;
    int height = draw(1, most), width = draw(1, most);
    if (i % 50 == 0) width = draw(500, i % 1000 == 0 ? 10000 : 1500);
    if (i % 50 == 25) height = draw(200, 600);
    std::vector<Plane> image(i % 4 == 0 ? 1 : 3, Plane(height, width));
    for (Plane& plane : image) {
      for (uint8_t& value : plane.values) value = static_cast<uint8_t>(random());
    }
    imseq_view view = {};
    view.top = draw(0, height - 1);
    view.left = draw(0, width - 1);
    view.height = draw(1, height - view.top);
    view.width = draw(1, width - view.left);
    view.resized_height = i % 5 == 0 ? view.height : draw(1, large ? 240 : 70);
    view.resized_width = i % 7 == 0 ? view.width : draw(1, large ? 240 : 70);
    view.flip = draw(0, 1);
    const int out_height = draw(1, large ? 224 : 40), out_width = draw(1, large ? 224 : 40);
    view.window_top = draw(-out_height - 2, view.resized_height + 2);
    view.window_left = draw(-out_width - 2, view.resized_width + 2);
    if (i % 10 == 1) {  // no padding: rows can be written where they are to lie
      view.window_top = draw(0, std::max(0, view.resized_height - out_height));
      view.window_left = draw(0, std::max(0, view.resized_width - out_width));
    }
    const int filter = draw(0, 2), passes = draw(0, 1);
    if (!resizes_alike(resizer, image, view, out_height, out_width, filter, passes)) {
      ++num_failures;
      std::fprintf(stderr,
                   "%s, case %d: %d x %d of %d x %d to %d x %d, window (%d, %d) %d x %d, flip "
                   "%d, filter %d, passes %d: not as the reference\n",
                   imseq::cpu_level_name(level), i, view.height, view.width, height, width,
                   view.resized_height, view.resized_width, view.window_top, view.window_left,
                   out_height, out_width, view.flip, filter, passes);
    }
  }
  return num_failures;
}

}  // namespace

int main() {
  int num_failures = 0;
  for (const CpuLevel level :
       {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
    if (imseq::cpu_has(level)) num_failures += num_failures_at(level);
  }
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
