// Writes the entropy-coded data of a scan.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pack/huffman.h"
#include "pack/tokens.h"

namespace imseq {

// Writes bytes to [begin, end) with a zero byte behind each 0xFF (T.81 F.1.2.3). Once there is no
// room left it writes nothing more, and full() is true.
class StuffingWriter {
 public:
  StuffingWriter(uint8_t* begin, uint8_t* end) : position_(begin), end_(end) {}

  void write(const uint8_t* bytes, const uint8_t* bytes_end) {
    full_ |= end_ - position_ < 2 * (bytes_end - bytes);
    if (full_) return;
    for (; bytes_end - bytes >= 8; bytes += 8) {
      uint64_t word;
      std::memcpy(&word, bytes, sizeof(word));
      // True if no byte is 0xFF: adding 1 clears the top bit of such a byte.
      if ((word & ~(word + 0x0101010101010101u) & 0x8080808080808080u) == 0) {
        std::memcpy(position_, &word, sizeof(word));
        position_ += sizeof(word);
      } else {
        stuff(bytes, bytes + 8);
      }
    }
    stuff(bytes, bytes_end);
  }
  void marker(uint8_t code) {
    full_ |= end_ - position_ < 2;
    if (full_) return;
    *position_++ = 0xFF;
    *position_++ = code;
  }

  [[nodiscard]] uint8_t* position() const { return position_; }
  [[nodiscard]] bool full() const { return full_; }

 private:
  void stuff(const uint8_t* bytes, const uint8_t* bytes_end) {
    uint8_t* out = position_;
    for (; bytes != bytes_end; ++bytes) {
      *out++ = *bytes;
      if (*bytes == 0xFF) *out++ = 0;
    }
    position_ = out;
  }

  uint8_t* position_;
  uint8_t* end_;
  bool full_ = false;
};

// Writes the entropy-coded data with their markers. Appends to *sizes the bytes of each restart
// interval with its marker.
void write_scan(const ScanTokens& scan, const HuffmanCodes& huffman, StuffingWriter* writer,
                std::vector<size_t>* sizes);

}  // namespace imseq
