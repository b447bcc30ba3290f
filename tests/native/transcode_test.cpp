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

namespace {

using Bytes = std::vector<uint8_t>;

// 26 x 19 pixels, 4:2:0, quality 60, optimised tables; written by libjpeg-turbo 3.1.
const Bytes kImage = {
    0xFF, 0xD8, 0xFF, 0xE0, 0x00, 0x10, 0x4A, 0x46, 0x49, 0x46, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01,
    0x00, 0x01, 0x00, 0x00, 0xFF, 0xDB, 0x00, 0x43, 0x00, 0x0D, 0x09, 0x0A, 0x0B, 0x0A, 0x08, 0x0D,
    0x0B, 0x0A, 0x0B, 0x0E, 0x0E, 0x0D, 0x0F, 0x13, 0x20, 0x15, 0x13, 0x12, 0x12, 0x13, 0x27, 0x1C,
    0x1E, 0x17, 0x20, 0x2E, 0x29, 0x31, 0x30, 0x2E, 0x29, 0x2D, 0x2C, 0x33, 0x3A, 0x4A, 0x3E, 0x33,
    0x36, 0x46, 0x37, 0x2C, 0x2D, 0x40, 0x57, 0x41, 0x46, 0x4C, 0x4E, 0x52, 0x53, 0x52, 0x32, 0x3E,
    0x5A, 0x61, 0x5A, 0x50, 0x60, 0x4A, 0x51, 0x52, 0x4F, 0xFF, 0xDB, 0x00, 0x43, 0x01, 0x0E, 0x0E,
    0x0E, 0x13, 0x11, 0x13, 0x26, 0x15, 0x15, 0x26, 0x4F, 0x35, 0x2D, 0x35, 0x4F, 0x4F, 0x4F, 0x4F,
    0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F,
    0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F,
    0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0x4F, 0xFF, 0xC0,
    0x00, 0x11, 0x08, 0x00, 0x13, 0x00, 0x1A, 0x03, 0x01, 0x22, 0x00, 0x02, 0x11, 0x01, 0x03, 0x11,
    0x01, 0xFF, 0xC4, 0x00, 0x18, 0x00, 0x00, 0x03, 0x01, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x05, 0x03, 0x06, 0xFF, 0xC4, 0x00, 0x25, 0x10,
    0x00, 0x01, 0x04, 0x02, 0x00, 0x04, 0x07, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x01, 0x02, 0x03, 0x04, 0x11, 0x21, 0x05, 0x31, 0x32, 0x62, 0x12, 0x15, 0x22, 0x41, 0x51,
    0x61, 0x91, 0xFF, 0xC4, 0x00, 0x18, 0x01, 0x01, 0x00, 0x03, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0x04, 0x05, 0x06, 0x07, 0xFF, 0xC4, 0x00, 0x1D,
    0x11, 0x00, 0x02, 0x02, 0x02, 0x03, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x01, 0x03, 0x04, 0x02, 0x11, 0x12, 0x13, 0x61, 0x41, 0xFF, 0xDA, 0x00, 0x0C, 0x03,
    0x01, 0x00, 0x02, 0x11, 0x03, 0x11, 0x00, 0x3F, 0x00, 0xE1, 0x61, 0xA3, 0x9F, 0x61, 0xE8, 0x68,
    0x7D, 0x15, 0xE0, 0xA3, 0xCB, 0x45, 0x28, 0x28, 0x72, 0xD0, 0x10, 0xBE, 0xD0, 0x2B, 0x5F, 0xD7,
    0xD2, 0x24, 0x3C, 0x3B, 0xB4, 0x67, 0xCB, 0x7B, 0x4E, 0x81, 0x95, 0x5B, 0x1A, 0xE3, 0xC3, 0x97,
    0x7C, 0x1A, 0xA5, 0x79, 0x31, 0xD0, 0xDF, 0xC1, 0x33, 0x75, 0xA3, 0xCB, 0x8E, 0x4F, 0x6F, 0xC2,
    0xFE, 0x0B, 0xED, 0xE2, 0x2D, 0x59, 0x8D, 0xD6, 0x90, 0xA9, 0x0B, 0x5A, 0x91, 0xAA, 0xA2, 0x26,
    0x51, 0x00, 0x08, 0xD4, 0x5B, 0x51, 0xB7, 0xE1, 0xCF, 0xEB, 0xB7, 0xB4, 0x6B, 0x5A, 0x36, 0x6B,
    0xD2, 0x83, 0xE9, 0x1B, 0x31, 0xD2, 0x80, 0x00, 0xD2, 0x4B, 0x81, 0xA1, 0x8D, 0xBD, 0x1F, 0xFF,
    0xD9,
};

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
    CHECK(transcode(cut, 4096).status == IMSEQ_FOREIGN);
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
    CHECK(result.status == IMSEQ_OK || result.status == IMSEQ_FOREIGN ||
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
        IMSEQ_FOREIGN);

  std::array<uint64_t, 4 * 256> counts{};
  CHECK(imseq_count_symbols(nullptr, 5, 8, counts.data(), &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_count_symbols(kImage.data(), 5, -1, counts.data(), &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_count_symbols(kImage.data(), 5, 8, nullptr, &error) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_count_symbols(kImage.data(), 300, 8, counts.data(), &error) == IMSEQ_FOREIGN);
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
