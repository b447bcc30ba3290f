// Markers and byte stuffing: every level against code that looks at one byte after the other, in
// memory that ends where the bytes do (for sanitizers), at every size and alignment that a vector
// can tell apart.
#include "jpeg/markers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

using imseq::CpuLevel;
using imseq::kRowSlack;
using imseq::MarkerKernels;

using Bytes = std::vector<uint8_t>;

constexpr size_t kLargestSize = 200;  // three steps of 64 bytes and a rest
constexpr size_t kAlignments = 64;

int num_failures = 0;
std::mt19937 generator(1);

void expect(bool holds, const char* what, CpuLevel level, size_t size, size_t offset) {
  if (holds) return;
  ++num_failures;
  std::fprintf(stderr, "failed: %s (%s, %zu bytes, offset %zu)\n", what,
               imseq::cpu_level_name(level), size, offset);
}

// ---- what is right ------------------------------------------------------------------------------

std::vector<uint32_t> markers_in(const uint8_t* bytes, size_t size) {
  std::vector<uint32_t> offsets;
  for (size_t i = 0; i + 1 < size; ++i) {
    if (bytes[i] == 0xFF && bytes[i + 1] != 0) offsets.push_back(static_cast<uint32_t>(i));
  }
  return offsets;
}

struct Unstuffed {
  Bytes bytes;
  bool sound = true;
};

Unstuffed unstuffed(const uint8_t* bytes, size_t size) {
  Unstuffed result;
  for (size_t i = 0; i < size; ++i) {
    result.bytes.push_back(bytes[i]);
    if (bytes[i] == 0xFF && (++i == size || bytes[i] != 0)) result.sound = false;
  }
  return result;
}

// ---- tests --------------------------------------------------------------------------------------

void test_find(CpuLevel level, const uint8_t* bytes, size_t size, size_t offset) {
  const std::vector<uint32_t> expected = markers_in(bytes, size);
  for (const size_t room : {size_t{0}, size_t{1}, expected.size() / 2, expected.size(), size}) {
    const size_t num_expected = std::min(room, expected.size());
    const auto offsets = std::make_unique<uint32_t[]>(room);
    const size_t num_found = imseq::marker_kernels(level).find(bytes, size, offsets.get(), room);
    const bool same = num_found == num_expected &&
                      std::equal(offsets.get(), offsets.get() + num_found, expected.begin());
    expect(same, "the markers", level, size, offset);
  }
}

void test_unstuff(CpuLevel level, const uint8_t* bytes, size_t size, size_t offset) {
  const Unstuffed expected = unstuffed(bytes, size);
  // Not even what is unsound makes more bytes of them.
  const auto out = std::make_unique<uint8_t[]>(size + kRowSlack);
  bool sound = true;
  const size_t num_bytes = imseq::marker_kernels(level).unstuff(bytes, size, out.get(), &sound);
  expect(sound == expected.sound, "soundness", level, size, offset);
  expect(num_bytes <= size, "no more bytes than before", level, size, offset);
  if (!expected.sound) return;
  const bool same = num_bytes == expected.bytes.size() &&
                    std::equal(out.get(), out.get() + num_bytes, expected.bytes.begin());
  expect(same, "bytes without stuffing", level, size, offset);
  sound = false;
  (void)imseq::marker_kernels(level).unstuff(bytes, size, out.get(), &sound);
  expect(!sound, "what was unsound before stays it", level, size, offset);
}

void test_on_every_level(const Bytes& bytes, size_t offset) {
  // At the end of an allocation, at the alignment that `offset` gives.
  const auto memory = std::make_unique<uint8_t[]>(offset + bytes.size());
  uint8_t* const copy = memory.get() + offset;
  std::copy(bytes.begin(), bytes.end(), copy);
  for (const CpuLevel level :
       {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
    if (!imseq::cpu_has(level)) continue;
    test_find(level, copy, bytes.size(), offset);
    test_unstuff(level, copy, bytes.size(), offset);
  }
}

// Of few values, so that FF 00, FF FF and FF D0 are frequent; or sound: each FF with its 0.
Bytes random_bytes(size_t size, bool sound) {
  constexpr uint8_t kValues[] = {0xFF, 0x00, 0xD0, 0x7F, 0x80, 0xFE, 0x01, 0x55};
  const size_t num_values = 1 + generator() % std::size(kValues);
  Bytes bytes(size);
  for (size_t i = 0; i < size; ++i) {
    bytes[i] = kValues[generator() % num_values];
    if (!sound || bytes[i] != 0xFF) continue;
    if (i + 1 == size) {
      bytes[i] = 0;
    } else {
      bytes[++i] = 0;
    }
  }
  return bytes;
}

void test_random_bytes() {
  for (size_t size = 0; size <= kLargestSize; ++size) {
    for (int i = 0; i < 40; ++i) {
      test_on_every_level(random_bytes(size, i % 2 == 0), generator() % kAlignments);
    }
  }
}

// One pair at every place: of data, of a marker, and an FF that nothing follows.
void test_every_place() {
  for (const size_t size : {size_t{31}, size_t{32}, size_t{33}, size_t{63}, size_t{64}, size_t{65},
                            size_t{97}, size_t{129}, kLargestSize}) {
    for (size_t at = 0; at < size; ++at) {
      for (const uint8_t follower : Bytes{0x00, 0xD9, 0xFF}) {
        Bytes bytes(size, 0xA5);
        bytes[at] = 0xFF;
        if (at + 1 < size) bytes[at + 1] = follower;
        test_on_every_level(bytes, at % kAlignments);
      }
    }
  }
}

}  // namespace

int main() {
  test_random_bytes();
  test_every_place();
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
