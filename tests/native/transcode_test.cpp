// The re-coder against hostile bytes and tight buffers.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "imagenet_seq.h"
#include "small_jpeg.h"

namespace {

struct Random {
  uint64_t state;
  uint32_t operator()(uint32_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state >> 33) % bound);
  }
};

struct Result {
  int32_t status;
  Bytes bytes;         // of IMSEQ_OK
  size_t needed_size;  // of IMSEQ_ERROR_CAPACITY
};

// Tables of a pack that holds images like kImage.
const Bytes& pack_tables() {
  static const Bytes tables = [] {
    std::array<uint64_t, 4 * 256> counts{};
    imseq_error error;
    CHECK(imseq_count_symbols(kImage.data(), kImage.size(), 8, counts.data(), &error) == IMSEQ_OK);
    Bytes bytes(IMSEQ_TABLES_BYTES);
    CHECK(imseq_fit_tables(counts.data(), bytes.data(), &error) == IMSEQ_OK);
    return bytes;
  }();
  return tables;
}

struct Options {
  int32_t restart_interval = 8;
  uint32_t flags = 0;
  bool of_pack = false;  // tables
};

// Input and output lie in blocks of exactly their size, so that a sanitizer sees one byte too far.
Result transcode(const Bytes& input, size_t capacity, const Options& options = {}) {
  const auto in = std::make_unique<uint8_t[]>(input.size());
  std::copy(input.begin(), input.end(), in.get());
  const auto out = std::make_unique<uint8_t[]>(capacity);
  const uint8_t* const tables = options.of_pack ? pack_tables().data() : nullptr;
  size_t out_size = 0;
  imseq_header header;
  imseq_error error;
  const int32_t status =
      imseq_transcode(in.get(), input.size(), options.restart_interval, options.flags, tables,
                      out.get(), capacity, &out_size, &header, &error);
  if (status != IMSEQ_OK) return {status, {}, out_size};
  return {status, Bytes(out.get(), out.get() + out_size), 0};
}

void test_every_capacity() {
  for (const Options options :
       {Options{0}, Options{1}, Options{8}, Options{8, 0, true}, Options{1, 0, true}}) {
    const Result whole = transcode(kImage, 1 << 16, options);
    CHECK(whole.status == IMSEQ_OK);
    for (size_t capacity = 0; capacity <= whole.bytes.size() + 40; ++capacity) {
      const Result tight = transcode(kImage, capacity, options);
      if (tight.status == IMSEQ_OK) {
        CHECK(tight.bytes == whole.bytes);
        continue;
      }
      CHECK(tight.status == IMSEQ_ERROR_CAPACITY);
      CHECK(tight.needed_size > capacity);
      const Result again = transcode(kImage, tight.needed_size, options);
      CHECK(again.status == IMSEQ_OK && again.bytes == whole.bytes);
    }
  }
}

void test_canonical_form_is_a_fixed_point() {
  const Result once = transcode(kImage, 1 << 16);
  CHECK(once.status == IMSEQ_OK);
  CHECK(transcode(once.bytes, 1 << 16).bytes == once.bytes);
  const Options of_pack{8, 0, true};
  const Result other = transcode(once.bytes, 1 << 16, of_pack);
  CHECK(other.bytes != once.bytes);
  CHECK(transcode(other.bytes, 1 << 16, of_pack).bytes == other.bytes);
  CHECK(transcode(other.bytes, 1 << 16).bytes == once.bytes);
  const Bytes end(once.bytes.end() - 2, once.bytes.end());
  CHECK((end == Bytes{0xFF, 0xD9}));
  Bytes longer = kImage;
  longer.insert(longer.end(), {1, 2, 3});
  CHECK(transcode(longer, 1 << 16).bytes == once.bytes);
}

void test_hostile_bytes() {
  for (size_t size = 0; size < kImage.size(); ++size) {
    const Bytes cut(kImage.begin(), kImage.begin() + static_cast<ptrdiff_t>(size));
    CHECK(transcode(cut, 4096).status == IMSEQ_NOT_DECODED);
  }
  // An Exif segment of every kind of nonsense, to be stripped.
  const Bytes exif = {0xFF, 0xE1, 0, 34,   'E', 'x', 'i', 'f', 0, 0, 'M', 'M', 0, 42, 0, 0, 0, 8,
                      0,    1,    1, 0x12, 0,   3,   0,   0,   0, 1, 0,   6,   0, 0,  0, 0, 0, 0};
  Bytes image = kImage;
  image.insert(image.begin() + 2, exif.begin(), exif.end());
  Random random{2};
  int num_accepted = 0;
  for (int round = 0; round < 60000; ++round) {
    Bytes damaged = image;
    for (uint32_t i = random(4) + 1; i > 0; --i) {
      const uint32_t place = random(static_cast<uint32_t>(image.size() + exif.size()));
      // Every other time in the Exif segment.
      damaged[place < image.size() ? place : 2 + place - image.size()] =
          static_cast<uint8_t>(random(256));
    }
    const uint32_t flags = random(2) ? IMSEQ_STRIP_METADATA : 0;
    const Options options{static_cast<int32_t>(random(20)), flags, random(2) == 0};
    const Result result = transcode(damaged, 2048, options);
    CHECK(result.status == IMSEQ_OK || result.status == IMSEQ_NOT_DECODED ||
          result.status == IMSEQ_ERROR_CAPACITY);
    num_accepted += result.status == IMSEQ_OK;
  }
  CHECK(num_accepted > 1000);  // otherwise little was tried
}

void test_arguments() {
  size_t out_size = 0;
  imseq_error error;
  CHECK(imseq_transcode(nullptr, 5, 8, 0, nullptr, nullptr, 0, &out_size, nullptr, &error) ==
        IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_transcode(kImage.data(), kImage.size(), 8, 0, nullptr, nullptr, 0, nullptr, nullptr,
                        nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_transcode(kImage.data(), kImage.size(), 65536, 0, nullptr, nullptr, 0, &out_size,
                        nullptr, &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(std::strstr(error.message, "65536") != nullptr);
  const Bytes no_tables(IMSEQ_TABLES_BYTES);
  CHECK(imseq_transcode(kImage.data(), kImage.size(), 8, 0, no_tables.data(), nullptr, 0, &out_size,
                        nullptr, &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(std::strstr(error.message, "imseq_fit_tables") != nullptr);
  CHECK(imseq_transcode(nullptr, 0, 8, 0, nullptr, nullptr, 0, &out_size, nullptr, &error) ==
        IMSEQ_NOT_DECODED);

  std::array<uint64_t, 4 * 256> counts{};
  CHECK(imseq_count_symbols(nullptr, 5, 8, counts.data(), &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_count_symbols(kImage.data(), 5, -1, counts.data(), &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_count_symbols(kImage.data(), 5, 8, nullptr, &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_count_symbols(kImage.data(), 300, 8, counts.data(), &error) == IMSEQ_NOT_DECODED);
  CHECK(std::count(counts.begin(), counts.end(), 0) == 4 * 256);
  Bytes tables(IMSEQ_TABLES_BYTES);
  CHECK(imseq_fit_tables(nullptr, tables.data(), &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_fit_tables(counts.data(), nullptr, &error) == IMSEQ_ERROR_ARGUMENT);
  counts[3] = uint64_t{1} << 48;
  CHECK(imseq_fit_tables(counts.data(), tables.data(), &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(std::strstr(error.message, "counts[3]") != nullptr);
}

}  // namespace

int main() {
  test_every_capacity();
  test_canonical_form_is_a_fixed_point();
  test_hostile_bytes();
  test_arguments();
  if (failures > 0) std::printf("%d checks failed\n", failures.load());
  return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
