#include "entropy.h"

#include <algorithm>
#include <memory>

namespace imseq {

namespace {

// T.81 F.2.2.1 (EXTEND): `size` extra bits stand for a value whose top bit tells the sign.
int extend(uint32_t extra, int size) {
  if (size == 0) return 0;
  const int value = static_cast<int>(extra);
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

// What a symbol means: how far the zigzag index moves, and the number of extra bits. T.81 F.1.2.1,
// F.1.2.2.
struct Symbol {
  uint8_t advance;
  int size;
};

Symbol read_symbol(uint8_t symbol, HuffmanTable::Kind kind) {
  if (kind == HuffmanTable::Kind::kDc) return {1, symbol};
  const int run = symbol >> 4, size = symbol & 15;
  // A run of 15 of size 0 stands for 16 zeros: 15, and a value of 0 behind them.
  if (size != 0 || run == 15) return {static_cast<uint8_t>(run + 1), size};
  // libjpeg-turbo takes the undefined symbols 0x10 ... 0xE0 for an end of block; no encoder writes
  // them.
  return {run == 0 ? HuffmanTable::kEndOfBlock : HuffmanTable::kInvalid, 0};
}

}  // namespace

void HuffmanTable::build(const JpegHuffmanSpec& spec, Kind kind) {
  if (spec_.defined && kind == kind_ && spec == spec_) return;
  spec_ = spec;
  kind_ = kind;
  lookup_.fill({0, 0, 0});
  uint32_t code = 0;
  size_t next = 0;
  for (int length = 1; length <= 16; ++length) {
    const auto n = static_cast<size_t>(length);
    first_value_[n] = static_cast<int32_t>(next) - static_cast<int32_t>(code);
    for (int i = 0; i < spec.counts[n - 1]; ++i, ++code, ++next) {
      if (length <= kLookupBits) fill_lookup(code, length, spec.values[next]);
    }
    limit_[n] = code << (16 - length);
    code <<= 1;
  }
}

void HuffmanTable::fill_lookup(uint32_t code, int length, uint8_t symbol) {
  const auto [advance, size] = read_symbol(symbol, kind_);
  HuffmanEntry* entry = lookup_.data() + (static_cast<size_t>(code) << (kLookupBits - length));
  const int spare = kLookupBits - length - size;
  if (spare < 0 || advance == kInvalid) {
    const auto place = static_cast<int16_t>(length << 8 | symbol);
    std::fill_n(entry, size_t{1} << (kLookupBits - length), HuffmanEntry{0, 0, place});
    return;
  }
  const auto total = static_cast<uint8_t>(length + size);
  for (uint32_t extra = 0; extra < 1u << size; ++extra, entry += size_t{1} << spare) {
    const auto value = static_cast<int16_t>(extend(extra, size));
    std::fill_n(entry, size_t{1} << spare, HuffmanEntry{total, advance, value});
  }
}

HuffmanEntry HuffmanTable::decode_slowly(uint64_t bits) const {
  constexpr HuffmanEntry kNoCode{1, kInvalid, 0};
  const int place = lookup_[bits >> (64 - kLookupBits)].value;
  int length = place >> 8;
  auto symbol = static_cast<uint8_t>(place & 255);
  if (length == 0) {
    const auto code = static_cast<uint32_t>(bits >> 48);
    length = kLookupBits + 1;
    while (length <= 16 && code >= limit_[static_cast<size_t>(length)]) ++length;
    if (length > 16) return kNoCode;
    const int32_t index =
        first_value_[static_cast<size_t>(length)] + static_cast<int32_t>(code >> (16 - length));
    symbol = spec_.values[static_cast<size_t>(index)];
  }
  const auto [advance, size] = read_symbol(symbol, kind_);
  if (advance == kInvalid) return kNoCode;
  const auto extra = size == 0 ? 0 : static_cast<uint32_t>(bits << length >> (64 - size));
  return {static_cast<uint8_t>(length + size), advance, static_cast<int16_t>(extend(extra, size))};
}

void HuffmanTables::build(const JpegHeader& header) {
  for (size_t c = 0; c < static_cast<size_t>(header.num_components); ++c) {
    dc_index_[c] = static_cast<size_t>(header.components[c].dc_table);
    ac_index_[c] = static_cast<size_t>(header.components[c].ac_table);
    dc_[dc_index_[c]].build(header.dc_tables[dc_index_[c]], HuffmanTable::Kind::kDc);
    ac_[ac_index_[c]].build(header.ac_tables[ac_index_[c]], HuffmanTable::Kind::kAc);
  }
}

void IntervalReader::reserve(size_t size) {
  const size_t needed = size + BitReader::kBlockBytes;
  if (arena_.size() < needed) arena_.resize(needed + needed / 4);
}

int IntervalReader::copy_to_marker(const uint8_t* bytes, size_t size, size_t* at, uint8_t** out) {
  while (*at < size) {
    const uint8_t* const from = bytes + *at;
    const auto* ff = static_cast<const uint8_t*>(std::memchr(from, 0xFF, size - *at));
    if (ff == nullptr || ff + 1 == bytes + size) return 0;
    const bool stuffed = ff[1] == 0;
    if (out != nullptr) {
      const size_t length = static_cast<size_t>(ff - from) + (stuffed ? 1 : 0);
      std::memcpy(*out, from, length);
      *out += length;
    }
    *at = static_cast<size_t>(ff + 2 - bytes);
    if (!stuffed) return ff[1];
  }
  return 0;
}

namespace {

// One MCU of all components into its place; false on an anomaly.
bool decode_mcu(const JpegHeader& header, const HuffmanTables& tables, int64_t mcu,
                BitReader& reader, std::array<int, 3>& predictions, JpegCoefficients* out) {
  static constexpr auto kZigzag = [] {
    std::array<uint8_t, 64> order{};
    for (size_t k = 0; k < 64; ++k) order[k] = static_cast<uint8_t>(k);
    return order;
  }();
  const int mcu_y = static_cast<int>(mcu / header.mcus_wide);
  const int mcu_x = static_cast<int>(mcu % header.mcus_wide);
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[static_cast<size_t>(c)];
    for (int y = 0; y < component.mcu_height; ++y) {
      for (int x = 0; x < component.mcu_width; ++x) {
        int16_t* block =
            out->block(c, mcu_y * component.mcu_height + y, mcu_x * component.mcu_width + x);
        const int last =
            decode_block<true>(reader, tables.dc(c), tables.ac(c),
                               predictions[static_cast<size_t>(c)], kZigzag.data(), block);
        if (last < 0 || reader.overrun()) return false;
      }
    }
  }
  return true;
}

// Sizes and zeroes the output. False where the bytes can't hold so many blocks (a block takes a DC
// and an AC code of a bit each at least), before any memory is asked for.
bool prepare(const JpegHeader& header, size_t entropy_bytes, JpegCoefficients* out) {
  size_t num_blocks = 0;
  for (size_t c = 0; c < static_cast<size_t>(header.num_components); ++c) {
    const JpegComponent& component = header.components[c];
    num_blocks += static_cast<size_t>(component.blocks_wide) * component.blocks_high;
  }
  if (num_blocks > entropy_bytes * 4) return false;
  for (size_t c = 0; c < out->components.size(); ++c) {
    const JpegComponent& component = header.components[c];
    out->blocks_wide[c] = component.blocks_wide;
    out->components[c].assign(
        static_cast<size_t>(component.blocks_wide) * component.blocks_high * 64, 0);
  }
  return true;
}

}  // namespace

bool decode_coefficients(const JpegHeader& header, const uint8_t* bytes, size_t size,
                         JpegCoefficients* out) {
  if (!prepare(header, size - header.entropy_offset, out)) return false;
  IntervalReader reader;
  if (!reader.read(header, bytes, size, [](int64_t, int64_t) { return true; })) return false;
  const auto tables = std::make_unique<HuffmanTables>();
  tables->build(header);
  for (const Interval& interval : reader.intervals()) {
    BitReader bits(interval.begin, interval.end);
    std::array<int, 3> predictions{};
    for (int64_t mcu = interval.first_mcu; mcu < interval.end_mcu; ++mcu) {
      if (!decode_mcu(header, *tables, mcu, bits, predictions, out)) return false;
    }
    if (bits.bits_left() >= 8) return false;
  }
  out->end_offset = reader.end_offset();
  return true;
}

}  // namespace imseq
