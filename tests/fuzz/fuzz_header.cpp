// Any bytes as a header, any numbers as a recipe: what is accepted must be consistent.
#include <utility>

#include "fuzz.h"

namespace {

using namespace imseq::fuzz;

void check_header(const Bytes& stream, const imseq_header& header) {
  const auto end = static_cast<size_t>(header.entropy_offset);
  CHECK(header.width >= 1 && header.height >= 0, "%d x %d", header.width, header.height);
  CHECK(header.num_components >= 1 && header.num_components <= 4, "%d", header.num_components);
  CHECK(end <= stream.size(), "offset %zu of %zu bytes", end, stream.size());
  for (int c = 0; c < header.num_components; ++c) {
    const int32_t h = header.h_sampling[c], v = header.v_sampling[c];
    CHECK(h >= 1 && h <= 4 && v >= 1 && v <= 4, "component %d: %d x %d", c, h, v);
  }
  // Nothing behind the header may matter.
  const Bytes head = stream.first(end);
  imseq_header again{};
  const int32_t status = imseq_read_header(head.data(), head.size(), &again, nullptr);
  CHECK(status == IMSEQ_OK, "status %d of the header alone", status);
  CHECK(std::memcmp(&header, &again, sizeof(header)) == 0, "another header of the header alone");
}

// Numbers for a recipe: those that one may have, or any bits.
struct Numbers {
  Options& options;
  const bool usual = options.flag();

  double real() const {
    constexpr double kUsual[] = {1.0, 0.0, 0.08, 0.5, 0.75, 4.0 / 3, 1e-9, 1e9};
    return usual ? options.one_of(kUsual) : static_cast<double>(options.raw<float>());
  }
  void range(double* min, double* max) const {
    *min = real();
    *max = real();
    if (usual && *min > *max) std::swap(*min, *max);
  }
  int32_t integer() const {
    return usual ? static_cast<int32_t>(options.below(64)) : options.raw<int32_t>();
  }
};

imseq_recipe any_recipe(Options& options) {
  imseq_recipe recipe{};
  recipe.geometry = static_cast<int32_t>(options.below(5));
  recipe.out_height = 1 + static_cast<int32_t>(options.below(64));
  recipe.out_width = 1 + static_cast<int32_t>(options.below(64));
  recipe.filter = IMSEQ_FILTER_BILINEAR;
  const Numbers numbers{options};
  recipe.flip_probability = options.flag() ? 0.5 : numbers.real();
  switch (recipe.geometry) {
    case IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP:
      numbers.range(&recipe.scale_min, &recipe.scale_max);
      numbers.range(&recipe.ratio_min, &recipe.ratio_max);
      break;
    case IMSEQ_GEOMETRY_RESIZE_CROP:
      recipe.resize_height = numbers.integer();
      recipe.resize_width = options.flag() ? 0 : numbers.integer();
      recipe.resize_max = options.flag() ? 0 : numbers.integer();
      recipe.crop_height = options.flag() ? recipe.out_height : numbers.integer();
      recipe.crop_width = options.flag() ? recipe.out_width : numbers.integer();
      recipe.center_rule = static_cast<int32_t>(options.below(2));
      break;
    default:
      recipe.fixed_top = numbers.integer();
      recipe.fixed_left = numbers.integer();
      recipe.fixed_height = numbers.integer();
      recipe.fixed_width = numbers.integer();
      recipe.fixed_flip = static_cast<int32_t>(options.below(3));
  }
  return recipe;
}

void check_draw(Options& options, int32_t width, int32_t height) {
  const imseq_key key = key_of(options);
  const imseq_recipe recipe = any_recipe(options);
  imseq_view view{};
  imseq_error error{};
  const int32_t status = imseq_draw(&recipe, &key, width, height, &view, &error);
  if (status == IMSEQ_ERROR_ARGUMENT) {
    CHECK(error.code == status && error.message[0] != 0, "an error without a message");
    return;
  }
  if (status == IMSEQ_NOT_DECODED) return;
  CHECK(status == IMSEQ_OK, "status %d", status);
  CHECK(view.top >= 0 && view.height >= 1 && view.height <= height - view.top,
        "top %d, height %d of %d", view.top, view.height, height);
  CHECK(view.left >= 0 && view.width >= 1 && view.width <= width - view.left,
        "left %d, width %d of %d", view.left, view.width, width);
  CHECK(view.resized_height >= 1 && view.resized_width >= 1, "resized to %d x %d",
        view.resized_height, view.resized_width);
  CHECK(view.flip == 0 || view.flip == 1, "%d", view.flip);
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint8_t* const option_bytes = options_of(data, size);
  if (option_bytes == nullptr) return 0;
  Options options(option_bytes);
  const Bytes stream(data, size - kOptionBytes);
  imseq_header header{};
  const int32_t status = imseq_read_header(stream.data(), stream.size(), &header, nullptr);
  CHECK(status == IMSEQ_OK || status == IMSEQ_NOT_DECODED, "status %d", status);
  if (status == IMSEQ_OK) {
    check_header(stream, header);
    check_draw(options, header.width, header.height);
  } else {
    const auto width = options.raw<int32_t>();
    const auto height = options.raw<int32_t>();
    check_draw(options, width, height);
  }
  return 0;
}
