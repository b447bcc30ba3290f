// Writes random baseline JPEGs with unusual Huffman codes, for jpeg_test.cpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

int num_failures = 0;
std::mt19937 generator(1);

void expect(bool holds, const char* what, long long a = 0, long long b = 0, long long c = 0) {
  if (holds) return;
  ++num_failures;
  std::fprintf(stderr, "failed: %s (%lld, %lld, %lld)\n", what, a, b, c);
}

int draw(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<unsigned>(high - low + 1));
}

class BitWriter {
 public:
  void put(uint32_t value, int num_bits) {
    for (int i = num_bits - 1; i >= 0; --i) {
      byte_ = byte_ << 1 | (value >> i & 1);
      if (++num_bits_ == 8) flush();
    }
  }
  void pad() {
    while (num_bits_ != 0) put(1, 1);
  }
  Bytes bytes;

 private:
  void flush() {
    bytes.push_back(static_cast<uint8_t>(byte_));
    if ((byte_ & 255) == 255) bytes.push_back(0);
    num_bits_ = 0;
  }
  uint32_t byte_ = 0;
  int num_bits_ = 0;
};

// A Huffman code for symbols in order of their frequency: lengths as given by counts.
struct Code {
  Bytes counts, symbols;
  std::map<int, std::pair<uint32_t, int>> words;

  Code(Bytes counts_of_lengths, Bytes symbols_in_order)
      : counts(std::move(counts_of_lengths)), symbols(std::move(symbols_in_order)) {
    uint32_t word = 0;
    size_t next = 0;
    for (int length = 1; length <= 16; ++length, word <<= 1) {
      for (int i = 0; i < counts[static_cast<size_t>(length - 1)]; ++i) {
        words[symbols[next++]] = {word++, length};
      }
    }
  }
};

// Shuffled symbols under codes of 1, 2, ... bits and, for most, 16 (AC): every way through the
// decoder's tables is taken.
Code code_of(Bytes symbols) {
  std::shuffle(symbols.begin(), symbols.end(), generator);
  Bytes counts(16, 0);
  size_t left = symbols.size();
  const size_t short_codes = symbols.size() > 100 ? 8 : 3;
  for (size_t n = 0; n < short_codes; ++n, --left) counts[n] = 1;
  // 2^-short_codes of the code space is left; one code, all ones, must stay free.
  size_t rest_length = short_codes;
  while ((size_t{1} << (rest_length - short_codes)) <= left) ++rest_length;
  counts[rest_length - 1] = static_cast<uint8_t>(left);
  return Code(counts, symbols);
}

struct Image {
  int width, height, restart_interval;
  std::vector<std::pair<int, int>> sampling;
  Bytes file;
  size_t entropy_offset;
  std::vector<std::vector<int16_t>> blocks;  // in the order of the scan, zigzag
};

void append(Bytes* out, const Bytes& more) {
  for (const uint8_t byte : more) out->push_back(byte);
}

void put_segment(Bytes* out, int marker, const Bytes& payload) {
  const size_t length = payload.size() + 2;
  append(out, {0xFF, static_cast<uint8_t>(marker), static_cast<uint8_t>(length >> 8),
               static_cast<uint8_t>(length)});
  append(out, payload);
}

void put_value(BitWriter* bits, const Code& code, int run, int value) {
  const int size = std::bit_width(static_cast<unsigned>(std::abs(value)));
  const auto [word, length] = code.words.at(run << 4 | size);
  bits->put(word, length);
  bits->put(static_cast<uint32_t>(value > 0 ? value : value + (1 << size) - 1), size);
}

void put_block(BitWriter* bits, const Code& dc, const Code& ac, const std::vector<int16_t>& block,
               int prediction) {
  put_value(bits, dc, 0, block[0] - prediction);
  int run = 0;
  for (size_t k = 1; k < 64; ++k) {
    if (block[k] == 0) {
      ++run;
      continue;
    }
    for (; run > 15; run -= 16) put_value(bits, ac, 15, 0);
    put_value(bits, ac, run, block[k]);
    run = 0;
  }
  if (run > 0) put_value(bits, ac, 0, 0);
}

std::vector<int16_t> random_block(int limit) {
  std::vector<int16_t> block(64, 0);
  block[0] = static_cast<int16_t>(draw(-limit, limit) / 2);
  const int density = draw(0, 3);
  for (int n = density == 3 ? 90 : density * 5; n > 0; --n) {
    block[static_cast<size_t>(draw(1, 63))] = static_cast<int16_t>(draw(-limit, limit));
  }
  return block;
}

struct Codes {
  Code dc, ac;
};

Codes random_codes() {
  Bytes dc_symbols, ac_symbols = {0x00, 0xF0};
  for (uint8_t size = 0; size < 16; ++size) dc_symbols.push_back(size);
  for (int run = 0; run < 16; ++run) {
    for (int size = 1; size < 16; ++size)
      ac_symbols.push_back(static_cast<uint8_t>(run << 4 | size));
  }
  return {code_of(dc_symbols), code_of(ac_symbols)};
}

struct Shape {
  int width, height, restart_interval;
  std::vector<std::pair<int, int>> sampling;
};

template <typename NextBlock>
Image write_image(const Shape& shape, const Codes& codes, const NextBlock& next_block) {
  const auto& [dc, ac] = codes;
  const auto& sampling = shape.sampling;
  Image image{shape.width, shape.height, shape.restart_interval, sampling, {0xFF, 0xD8}, 0, {}};
  Bytes& file = image.file;
  Bytes quant(65, 3), frame = {8,
                               static_cast<uint8_t>(image.height >> 8),
                               static_cast<uint8_t>(image.height),
                               static_cast<uint8_t>(image.width >> 8),
                               static_cast<uint8_t>(image.width),
                               static_cast<uint8_t>(sampling.size())};
  quant[0] = 0;
  Bytes scan = {static_cast<uint8_t>(sampling.size())};
  int max_h = 1, max_v = 1, id = 0;
  for (const auto& [h, v] : sampling) {
    max_h = std::max(max_h, h);
    max_v = std::max(max_v, v);
    append(&frame, {static_cast<uint8_t>(++id), static_cast<uint8_t>(h << 4 | v), 0});
    append(&scan, {static_cast<uint8_t>(id), 0});
  }
  append(&scan, {0, 63, 0});
  put_segment(&file, 0xDB, quant);
  put_segment(&file, 0xC0, frame);
  for (int kind = 0; kind < 2; ++kind) {
    const Code& code = kind == 0 ? dc : ac;
    Bytes table = {static_cast<uint8_t>(kind << 4)};
    append(&table, code.counts);
    append(&table, code.symbols);
    put_segment(&file, 0xC4, table);
  }
  put_segment(&file, 0xDD, {0, static_cast<uint8_t>(image.restart_interval)});
  put_segment(&file, 0xDA, scan);
  image.entropy_offset = file.size();

  const bool lone = sampling.size() == 1;
  const int mcu_width = lone ? 8 : 8 * max_h, mcu_height = lone ? 8 : 8 * max_v;
  const int num_mcus =
      ((image.width + mcu_width - 1) / mcu_width) * ((image.height + mcu_height - 1) / mcu_height);
  BitWriter bits;
  std::vector<int> predictions(sampling.size(), 0);
  for (int mcu = 0; mcu < num_mcus; ++mcu) {
    if (image.restart_interval > 0 && mcu > 0 && mcu % image.restart_interval == 0) {
      bits.pad();
      bits.bytes.push_back(0xFF);
      bits.bytes.push_back(static_cast<uint8_t>(0xD0 + (mcu / image.restart_interval - 1) % 8));
      std::fill(predictions.begin(), predictions.end(), 0);
    }
    for (size_t c = 0; c < sampling.size(); ++c) {
      for (int n = lone ? 1 : sampling[c].first * sampling[c].second; n > 0; --n) {
        image.blocks.push_back(next_block());
        put_block(&bits, dc, ac, image.blocks.back(), predictions[c]);
        predictions[c] = image.blocks.back()[0];
      }
    }
  }
  bits.pad();
  append(&file, bits.bytes);
  append(&file, {0xFF, 0xD9});
  return image;
}

Image random_image(const std::vector<std::pair<int, int>>& sampling, int limit) {
  const Shape shape{draw(1, 70), draw(1, 70), draw(0, 3) * draw(0, 3), sampling};
  return write_image(shape, random_codes(), [&] { return random_block(limit); });
}

// The same image as packs have it: with the sizes of its restart intervals before the scan header.
Bytes with_sizes(const Image& image) {
  Bytes sizes = {'i', 'm', 's', 'e', 'q', 0};
  size_t begin = image.entropy_offset;
  for (size_t at = begin; at + 1 < image.file.size(); ++at) {
    if (image.file[at] != 0xFF || image.file[at + 1] == 0) continue;
    const size_t interval_bytes = at + 2 - begin;
    expect(interval_bytes <= 0xFFFF, "an interval whose size can be written");
    append(&sizes,
           {static_cast<uint8_t>(interval_bytes >> 8), static_cast<uint8_t>(interval_bytes)});
    begin = at + 2;
  }
  const size_t scan_header = image.entropy_offset - (8 + 2 * image.sampling.size());
  const auto middle = image.file.begin() + static_cast<ptrdiff_t>(scan_header);
  Bytes file(image.file.begin(), middle);
  put_segment(&file, 0xE9, sizes);
  file.insert(file.end(), middle, image.file.end());
  return file;
}

const std::vector<std::vector<std::pair<int, int>>> kSamplings = {{{1, 1}, {1, 1}, {1, 1}},
                                                                  {{2, 1}, {1, 1}, {1, 1}},
                                                                  {{2, 2}, {1, 1}, {1, 1}},
                                                                  {{1, 2}, {1, 1}, {1, 1}},
                                                                  {{4, 1}, {1, 1}, {1, 1}},
                                                                  {{2, 2}, {2, 1}, {1, 2}},
                                                                  {{1, 1}, {2, 2}, {1, 1}},
                                                                  {{1, 1}},
                                                                  {{2, 2}}};

// Memory of exactly the file's size, so that a read behind it is seen.
struct ExactCopy {
  explicit ExactCopy(const Bytes& file, size_t size_of_copy)
      : size(size_of_copy), bytes(new uint8_t[size_of_copy]) {
    std::copy_n(file.begin(), size, bytes.get());
  }
  size_t size;
  std::unique_ptr<uint8_t[]> bytes;
};

}  // namespace
