#include "pack/scan_writer.h"

#include <algorithm>
#include <array>

namespace imseq {

namespace {

// A symbol's code, shifted to make room for the extra bits.
struct SymbolCode {
  uint32_t bits;
  int32_t length;  // extra bits included
};

using SymbolCodes = std::array<SymbolCode, 4 * 256>;

SymbolCodes symbol_codes(const HuffmanCodes& codes) {
  SymbolCodes result{};
  for (size_t table = 0; table < codes.size(); ++table) {
    for (size_t symbol = 0; symbol < 256; ++symbol) {
      const int extra_length = static_cast<int>(symbol & 15);
      const int length = codes[table].length[symbol] + extra_length;
      const uint32_t bits = static_cast<uint32_t>(codes[table].code[symbol]) << extra_length;
      result[table << 8 | symbol] = {bits, length};
    }
  }
  return result;
}

// Writes bits, most significant first. Stores eight bytes at a time; those behind position() are
// not valid yet.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* begin) : position_(begin) {}

  // Up to 32 bits.
  void put(uint32_t bits, int length) {
    accumulator_ = accumulator_ << length | bits;
    used_ += length;
    const uint64_t word = __builtin_bswap64(accumulator_ << (63 - used_) << 1);
    std::memcpy(position_, &word, sizeof(word));
    position_ += used_ >> 3;
    used_ &= 7;
  }
  // Fills the last byte with ones.
  void fill_byte() { put((1u << (-used_ & 7)) - 1, -used_ & 7); }

  // Continues at begin; the bytes written before may be overwritten.
  void restart(uint8_t* begin) { position_ = begin; }
  [[nodiscard]] uint8_t* position() const { return position_; }

 private:
  uint8_t* position_;
  uint64_t accumulator_ = 0;  // its lowest used_ bits are still to be written
  int used_ = 0;
};

}  // namespace

void write_scan(const ScanTokens& scan, const HuffmanCodes& huffman, StuffingWriter* writer,
                std::vector<size_t>* sizes) {
  constexpr ptrdiff_t kTokensAtOnce = 1024;  // with their bytes they stay in the L1 cache
  const SymbolCodes codes = symbol_codes(huffman);
  std::array<uint8_t, kTokensAtOnce * 4 + 16> unstuffed;
  BitWriter bits(unstuffed.data());
  const Token* token = scan.begin();
  for (size_t i = 0; i < scan.num_intervals(); ++i) {
    const uint8_t* const begin = writer->position();
    const Token* const interval_end = scan.interval_end(i);
    const bool is_last = i + 1 == scan.num_intervals();
    while (token != interval_end) {
      const Token* const end = token + std::min(interval_end - token, kTokensAtOnce);
      for (; token != end; ++token) {
        const SymbolCode code = codes[*token & kTokenSymbol];
        bits.put(code.bits | *token >> kExtraShift, code.length);
      }
      if (token == interval_end) bits.fill_byte();
      writer->write(unstuffed.data(), bits.position());
      bits.restart(unstuffed.data());
    }
    writer->marker(is_last ? kEoi : static_cast<uint8_t>(kRst0 + i % 8));
    sizes->push_back(static_cast<size_t>(writer->position() - begin));
  }
}

}  // namespace imseq
