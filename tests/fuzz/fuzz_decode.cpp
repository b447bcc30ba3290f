// Decoding must give one answer: whatever kernels decode, alone or in a group, after whatever other
// image, into whatever memory; and the same as decoding the whole image first.
#include <array>

#include "fuzz.h"

namespace {

using namespace imseq::fuzz;

// ---- what to do ---------------------------------------------------------------------------------

// Tables for all dtypes. The first is what ToTensor and Normalize make of a byte, which a kernel
// may compute; the second is bits that only a look-up can give.
struct Tables {
  std::array<float, 768> normalised;
  std::array<uint32_t, 768> any;

  Tables() {
    for (size_t i = 0; i < 768; ++i) {
      normalised[i] = (static_cast<float>(i % 256) / 255.0f - 0.485f) / 0.229f;
      any[i] = static_cast<uint32_t>((i + 1) * 0x9E3779B9u);
    }
  }
};

void set_format(Options& options, imseq_recipe* recipe) {
  static const Tables tables;
  recipe->dtype = static_cast<int32_t>(options.below(4));
  recipe->layout = static_cast<int32_t>(options.below(2));
  const bool normalised = options.flag();
  if (recipe->dtype == IMSEQ_FLOAT32 && normalised) {
    recipe->table = tables.normalised.data();
  } else if (recipe->dtype != IMSEQ_UINT8) {
    recipe->table = tables.any.data();
  }
}

int32_t side_of(Options& options) {
  // Around the widths of vectors; 224 seldom, for it is slow.
  constexpr int32_t kSides[] = {1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65};
  return options.below(32) == 31 ? 224 : options.one_of(kSides);
}

// A crop that fits the image.
void set_fixed_crop(Options& options, const imseq_header& header, imseq_recipe* recipe) {
  const auto part_of = [&](int32_t n) { return n * static_cast<int32_t>(options.byte()) / 256; };
  recipe->fixed_top = part_of(header.height);
  recipe->fixed_left = part_of(header.width);
  recipe->fixed_height = 1 + part_of(header.height - recipe->fixed_top);
  recipe->fixed_width = 1 + part_of(header.width - recipe->fixed_left);
  recipe->fixed_flip = static_cast<int32_t>(options.below(2));
  if (options.flag()) {  // without a resize
    recipe->out_height = recipe->fixed_height;
    recipe->out_width = recipe->fixed_width;
  }
}

imseq_recipe recipe_of(Options& options, const imseq_header& header) {
  imseq_recipe recipe{};
  recipe.geometry = 1 + static_cast<int32_t>(options.below(3));
  recipe.out_height = side_of(options);
  recipe.out_width = side_of(options);
  recipe.filter = static_cast<int32_t>(options.below(3));
  recipe.passes = static_cast<int32_t>(options.below(2));
  recipe.strict = static_cast<int32_t>(options.below(2));
  recipe.max_pixels = kMaxPixels;
  recipe.flip_probability = 0.5 * options.below(3);
  set_format(options, &recipe);
  if (recipe.geometry == IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP) {
    recipe.scale_min = options.one_of({0.08, 0.0, 0.001, 0.5, 1.0});
    recipe.scale_max = 1.0;
    recipe.ratio_min = options.one_of({0.75, 0.1, 1.0, 1e-9});
    recipe.ratio_max = 1.0 / recipe.ratio_min;
  } else if (recipe.geometry == IMSEQ_GEOMETRY_RESIZE_CROP) {
    recipe.resize_height = options.one_of({recipe.out_height, 0, 1, 20, 73});
    recipe.crop_height = recipe.out_height;
    recipe.crop_width = recipe.out_width;
    const uint32_t kind = options.below(5);
    if (recipe.resize_height != 0 && kind == 1) recipe.resize_width = side_of(options);
    if (recipe.resize_height != 0 && kind == 2) recipe.resize_max = recipe.resize_height + 9;
    if (kind == 3) {  // no crop
      recipe.resize_height = recipe.out_height;
      recipe.resize_width = recipe.out_width;
      recipe.crop_height = recipe.crop_width = 0;
    }
    recipe.center_rule = static_cast<int32_t>(options.below(2));
  } else {
    set_fixed_crop(options, header, &recipe);
  }
  return recipe;
}

// ---- decoding -----------------------------------------------------------------------------------

size_t value_bytes_of(const imseq_recipe& recipe) {
  if (recipe.dtype == IMSEQ_UINT8) return 1;
  return recipe.dtype == IMSEQ_FLOAT32 ? 4 : 2;
}

size_t row_bytes_of(const imseq_recipe& recipe) {
  return static_cast<size_t>(recipe.out_height) * static_cast<size_t>(recipe.out_width) * 3 *
         value_bytes_of(recipe);
}

// A row as it may lie in a batch: aligned as one value is, between two others. It ends where its
// memory ends, and what lies before it is watched.
class Row {
 public:
  Row(const imseq_recipe& recipe, uint8_t fill)
      : before_(value_bytes_of(recipe)), fill_(fill), memory_(before_ + row_bytes_of(recipe)) {
    std::memset(memory_.data(), fill, memory_.size());
  }
  [[nodiscard]] uint8_t* data() { return memory_.data() + before_; }
  [[nodiscard]] Bytes take() {
    for (size_t i = 0; i < before_; ++i) {
      CHECK(memory_.data()[i] == fill_, "a byte before the row was written");
    }
    return {data(), memory_.size() - before_};
  }

 private:
  size_t before_;
  uint8_t fill_;
  Bytes memory_;
};

struct Result {
  int32_t status;
  Bytes row;  // means something only where status is IMSEQ_OK
};

struct Job {
  const imseq_recipe& recipe;
  imseq_key key;
  uint32_t flags;
  const std::vector<Bytes>& streams;

  // Each sample's draws are its own.
  [[nodiscard]] imseq_key key_of_sample(size_t i) const {
    return {key.seed, key.epoch, key.sample + static_cast<int64_t>(i)};
  }
};

Result decode_alone(const Job& job, size_t i, uint8_t fill) {
  const imseq_key key = job.key_of_sample(i);
  const Bytes& stream = job.streams[i];
  Row row(job.recipe, fill);
  const int32_t status =
      imseq_decode(&job.recipe, &key, stream.data(), stream.size(), job.flags, row.data(), nullptr);
  CHECK(status == IMSEQ_OK || status == IMSEQ_NOT_DECODED, "status %d of sample %zu", status, i);
  return {status, row.take()};
}

std::vector<Result> decode_group(const Job& job, uint8_t fill) {
  std::vector<Row> rows;
  std::vector<imseq_sample> samples;
  for (size_t i = 0; i < job.streams.size(); ++i) {
    rows.emplace_back(job.recipe, fill);
    const Bytes& stream = job.streams[i];
    samples.push_back({job.key_of_sample(i), stream.data(), static_cast<int64_t>(stream.size()),
                       rows[i].data(), job.flags, IMSEQ_ERROR_ARGUMENT});
  }
  const int32_t status = imseq_decode_group(&job.recipe, samples.data(),
                                            static_cast<int32_t>(samples.size()), nullptr, nullptr);
  CHECK(status == IMSEQ_OK, "status %d of a group without errors", status);
  std::vector<Result> results;
  for (size_t i = 0; i < rows.size(); ++i) results.push_back({samples[i].status, rows[i].take()});
  return results;
}

void expect_same(const Result& expected, const Result& result, const char* level, const char* how,
                 size_t i) {
  CHECK(result.status == expected.status, "status %d, not %d: %s, %s, sample %zu", result.status,
        expected.status, level, how, i);
  if (expected.status != IMSEQ_OK) return;
  const uint8_t* const begin = expected.row.data();
  const auto [at, other] = std::mismatch(begin, begin + expected.row.size(), result.row.data());
  CHECK(at == begin + expected.row.size(), "byte %td is %d, not %d: %s, %s, sample %zu", at - begin,
        *other, *at, level, how, i);
}

// ---- what must be the same ----------------------------------------------------------------------

// All levels, alone and in a group. Memory is filled with something else each time, so that what is
// not written differs; and each sample is decoded once behind every neighbour, so that what is left
// over from another image differs.
std::vector<Result> decode_in_all_ways(const Job& job) {
  const size_t n = job.streams.size();
  std::vector<Result> expected;
  for (const char* level : {"portable", "avx2", "avx512", "neon"}) {
    if (imseq_use_cpu(level, nullptr) != IMSEQ_OK) continue;
    if (expected.empty()) {
      for (size_t i = 0; i < n; ++i) expected.push_back(decode_alone(job, i, 0x00));
    }
    for (size_t i = n; i-- > 0;) {
      expect_same(expected[i], decode_alone(job, i, 0xFF), level, "alone", i);
    }
    const std::vector<Result> group = decode_group(job, 0x5A);
    for (size_t i = 0; i < n; ++i) expect_same(expected[i], group[i], level, "in a group", i);
  }
  return expected;
}

// A stream without any anomaly is decoded whatever the flags, and a crop's pixels are those of the
// whole image.
void check_against_whole_image(const Job& job, size_t i, const Result& result) {
  const Bytes& stream = job.streams[i];
  imseq_header header{};
  if (!read_small_header(stream, &header)) {
    CHECK(result.status == IMSEQ_NOT_DECODED, "status %d of an unsupported header", result.status);
    return;
  }
  const imseq_recipe recipe = whole_image(header);
  const Job whole{recipe, job.key, 0, job.streams};
  const Result image = decode_alone(whole, i, 0x00);
  if (image.status != IMSEQ_OK) return;
  const imseq_key key = job.key_of_sample(i);
  Row row(job.recipe, 0xA5);
  const int32_t status = imseq_apply(&job.recipe, &key, image.row.data(), header.width,
                                     header.height, row.data(), nullptr);
  expect_same({status, row.take()}, result, imseq_cpu(), "by way of the whole image", i);
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint8_t* const option_bytes = options_of(data, size);
  if (option_bytes == nullptr) return 0;
  Options options(option_bytes);
  const std::vector<Bytes> streams = streams_of(data, size);
  imseq_header header{};
  if (!read_small_header(streams[0], &header)) header.width = header.height = 1;
  const imseq_recipe recipe = recipe_of(options, header);
  const uint32_t flags = options.flag() ? uint32_t{IMSEQ_SAMPLE_CLEAN} : 0;
  const Job job{recipe, key_of(options), flags, streams};
  const std::vector<Result> results = decode_in_all_ways(job);
  for (size_t i = 0; i < streams.size(); ++i) check_against_whole_image(job, i, results[i]);
  return 0;
}
