// What the fuzz targets share: how an input is taken apart, and checks that fail loudly.
//
// An input is one JPEG or several with a separator between them, then kOptionBytes bytes that
// choose what is done with them. The choices stand at the end, each counted from there, so that a
// mutation that inserts or removes bytes of a JPEG does not turn one choice into another.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "imagenet_seq.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace imseq::fuzz {

// tests/fuzz/corpus.py writes inputs of the same layout.
constexpr size_t kOptionBytes = 32;
constexpr std::string_view kSeparator = "|next|";

// Larger images are not decoded: an input of a few bytes may claim to be one of 4 gigapixels.
constexpr int64_t kMaxPixels = 512 * 512;

#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                            \
      std::fprintf(stderr, "\n");                                                   \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)

// Bytes that end where their memory ends, so that a sanitizer sees an access behind them.
class Bytes {
 public:
  explicit Bytes(size_t size) : data_(new uint8_t[size]), size_(size) {}
  Bytes(const uint8_t* from, size_t size) : Bytes(size) {
    if (size != 0) std::memcpy(data_.get(), from, size);
  }
  [[nodiscard]] uint8_t* data() { return data_.get(); }
  [[nodiscard]] const uint8_t* data() const { return data_.get(); }
  [[nodiscard]] size_t size() const { return size_; }
  [[nodiscard]] Bytes first(size_t size) const { return {data_.get(), size}; }
  friend bool operator==(const Bytes& a, const Bytes& b) {
    return a.size_ == b.size_ && std::memcmp(a.data_.get(), b.data_.get(), a.size_) == 0;
  }

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t size_;
};

// The choices, taken one after the other from the end.
class Options {
 public:
  explicit Options(const uint8_t* bytes) : begin_(bytes), end_(bytes + kOptionBytes) {}
  uint8_t byte() { return begin_ == end_ ? uint8_t{0} : *--end_; }
  uint32_t below(uint32_t bound) { return byte() % bound; }
  bool flag() { return below(2) == 1; }
  template <typename T, size_t N>
  T one_of(const T (&values)[N]) {
    return values[below(N)];
  }
  template <typename T>
  T raw() {
    T result;
    uint8_t bytes[sizeof(T)];
    for (size_t i = 0; i < sizeof(T); ++i) bytes[i] = byte();
    std::memcpy(&result, bytes, sizeof(T));
    return result;
  }

 private:
  const uint8_t* begin_;
  const uint8_t* end_;
};

// Null where an input is too short to hold the options.
inline const uint8_t* options_of(const uint8_t* data, size_t size) {
  return size < kOptionBytes ? nullptr : data + size - kOptionBytes;
}

// The JPEGs of an input, IMSEQ_MAX_GROUP at most.
inline std::vector<Bytes> streams_of(const uint8_t* data, size_t size) {
  std::vector<Bytes> streams;
  const uint8_t* const end = data + size - kOptionBytes;
  while (streams.size() < IMSEQ_MAX_GROUP) {
    const uint8_t* const stop = std::search(data, end, kSeparator.begin(), kSeparator.end());
    streams.emplace_back(data, static_cast<size_t>(stop - data));
    if (stop == end) break;
    data = stop + kSeparator.size();
  }
  return streams;
}

inline imseq_key key_of(Options& options) {
  return {options.byte(), options.byte(), options.raw<int16_t>()};
}

// The image as it is: height x width x 3 bytes.
inline imseq_recipe whole_image(const imseq_header& header) {
  imseq_recipe recipe{};
  recipe.geometry = IMSEQ_GEOMETRY_FIXED_CROP;
  recipe.out_height = recipe.fixed_height = header.height;
  recipe.out_width = recipe.fixed_width = header.width;
  recipe.filter = IMSEQ_FILTER_BILINEAR;
  recipe.layout = IMSEQ_HWC;
  recipe.strict = 1;
  recipe.max_pixels = kMaxPixels;
  return recipe;
}

// Whether a decoder may be asked for the whole image.
inline bool read_small_header(const Bytes& stream, imseq_header* header) {
  return imseq_read_header(stream.data(), stream.size(), header, nullptr) == IMSEQ_OK &&
         header->supported == 1 && int64_t{header->width} * header->height <= kMaxPixels;
}

}  // namespace imseq::fuzz
