// Re-coding must lose nothing, and what it writes must be in canonical form already.
#include <array>
#include <optional>

#include "fuzz.h"

namespace {

using namespace imseq::fuzz;

// The pack's tables that an image is re-coded with.
struct Tables {
  std::array<uint8_t, IMSEQ_TABLES_BYTES> bytes;
  bool sound = true;  // as imseq_fit_tables gave them
};

Tables tables_of(Options& options, const Bytes& stream) {
  std::array<uint64_t, 4 * 256> counts{};
  if (options.flag()) {  // fitted to this image, otherwise to any
    const int32_t status =
        imseq_count_symbols(stream.data(), stream.size(), 8, counts.data(), nullptr);
    CHECK(status == IMSEQ_OK || status == IMSEQ_NOT_DECODED, "status %d", status);
  } else {
    auto random = options.raw<uint32_t>();
    for (uint64_t& count : counts) {
      random = random * 1664525 + 1013904223;
      count = (uint64_t{1} << 47) >> (random >> 26);
    }
  }
  Tables tables;
  const int32_t status = imseq_fit_tables(counts.data(), tables.bytes.data(), nullptr);
  CHECK(status == IMSEQ_OK, "status %d of tables", status);
  if (options.below(4) == 0) {  // a damaged pack.json
    tables.sound = false;
    for (size_t i = 0; i < 2; ++i) {
      tables.bytes[options.raw<uint16_t>() % tables.bytes.size()] = options.byte();
    }
  }
  return tables;
}

struct Recoding {
  int32_t restart_interval;
  uint32_t options;
  const Tables* tables;  // null: the image's own
};

// Empty where the stream is left to Pillow. Otherwise also checks what is said about capacity.
Bytes recode(const Recoding& recoding, const Bytes& stream, imseq_header* header) {
  size_t size = 0;
  const uint8_t* const tables =
      recoding.tables == nullptr ? nullptr : recoding.tables->bytes.data();
  const auto into = [&](Bytes& out) {
    return imseq_transcode(stream.data(), stream.size(), recoding.restart_interval,
                           recoding.options, tables, out.data(), out.size(), &size, header,
                           nullptr);
  };
  Bytes none(0);
  const int32_t status = into(none);
  if (status == IMSEQ_NOT_DECODED) return none;
  if (status == IMSEQ_ERROR_ARGUMENT && recoding.tables != nullptr && !recoding.tables->sound) {
    return none;
  }
  CHECK(status == IMSEQ_ERROR_CAPACITY, "status %d without room", status);
  CHECK(size > 0, "a capacity of nothing");
  Bytes enough(size);
  const int32_t status_of_enough = into(enough);
  CHECK(status_of_enough == IMSEQ_OK, "status %d with the capacity asked for", status_of_enough);
  CHECK(size <= enough.size(), "%zu bytes in %zu", size, enough.size());
  Bytes result = enough.first(size);
  // A buffer that is too small is never written behind its end, however much fits.
  Bytes half(size / 2);
  const int32_t status_of_half = into(half);
  CHECK(status_of_half == IMSEQ_ERROR_CAPACITY, "status %d with half the room", status_of_half);
  return result;
}

Bytes pixels_of(const Bytes& stream, const imseq_header& header) {
  const imseq_recipe recipe = whole_image(header);
  const imseq_key key{};
  Bytes row(static_cast<size_t>(header.height) * static_cast<size_t>(header.width) * 3);
  const int32_t status =
      imseq_decode(&recipe, &key, stream.data(), stream.size(), 0, row.data(), nullptr);
  CHECK(status == IMSEQ_OK, "status %d of a stream that was re-coded", status);
  return row;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint8_t* const option_bytes = options_of(data, size);
  if (option_bytes == nullptr) return 0;
  constexpr int32_t kIntervals[] = {8, 0, 1, 2, 3, 5, 7, 16, 255, 256, 65535};
  Options options(option_bytes);
  const int32_t restart_interval = options.one_of(kIntervals);
  const uint32_t strip = options.flag() ? uint32_t{IMSEQ_STRIP_METADATA} : 0;
  const bool with_tables = options.flag();
  const Bytes stream(data, size - kOptionBytes);
  imseq_header before{};
  if (imseq_read_header(stream.data(), stream.size(), &before, nullptr) == IMSEQ_OK &&
      int64_t{before.width} * before.height > kMaxPixels) {
    return 0;
  }
  std::optional<Tables> tables;
  if (with_tables) tables = tables_of(options, stream);
  const Recoding recoding{restart_interval, strip, with_tables ? &*tables : nullptr};
  imseq_header after{};
  const Bytes result = recode(recoding, stream, &after);
  if (result.size() == 0) return 0;

  imseq_header of_result{};
  const bool readable = read_small_header(result, &of_result);
  CHECK(readable, "a result that is not supported");
  CHECK(std::memcmp(&after, &of_result, sizeof(after)) == 0, "another header than promised");
  CHECK(after.restart_interval == restart_interval, "%d, not %d", after.restart_interval,
        restart_interval);
  CHECK(after.width == before.width && after.height == before.height, "%d x %d, not %d x %d",
        after.width, after.height, before.width, before.height);
  const Bytes again = recode(recoding, result, &after);
  CHECK(again == result, "re-coded twice: %zu bytes instead of %zu", again.size(), result.size());
  if (before.supported == 1) {
    CHECK(pixels_of(stream, before) == pixels_of(result, after), "other pixels");
  }
  return 0;
}
