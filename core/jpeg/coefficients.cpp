#include "jpeg/coefficients.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/cpu.h"
#include "jpeg/markers.h"

namespace imseq {

bool IntervalReader::read(const JpegHeader& header, const uint8_t* bytes, size_t size) {
  intervals_.clear();
  const uint8_t* const data = bytes + header.entropy_offset;
  const size_t data_size = size - header.entropy_offset;
  const int64_t num_intervals = header.num_intervals();
  // Every interval takes a marker of two bytes.
  if (data_size > UINT32_MAX || static_cast<int64_t>(data_size / 2) < num_intervals) return false;
  markers_.resize(static_cast<size_t>(num_intervals));
  if (!find_markers(header, data, data_size, num_intervals, markers_.data())) return false;
  arena_.resize(data_size + kRowSlack + BitReader::kBlockBytes);
  const int64_t step = header.interval_mcus();
  const MarkerKernels& kernels = marker_kernels(cpu_level());
  uint8_t* out = arena_.data();
  size_t at = 0;
  bool sound = true;
  for (int64_t i = 0; i < num_intervals; ++i) {
    const size_t end = markers_[static_cast<size_t>(i)];
    const size_t length = kernels.unstuff(data + at, end - at, out, &sound);
    intervals_.push_back(
        {out, out + length, i * step, std::min((i + 1) * step, header.num_mcus())});
    out += length;
    at = end + 2;
  }
  std::memset(out, 0, BitReader::kBlockBytes);
  end_offset_ = header.entropy_offset + at;
  return sound;
}

namespace {

// One MCU of all components into its place; false on an anomaly.
bool decode_mcu(const JpegHeader& header, const HuffmanTables& tables, int64_t mcu,
                BitReader& reader, std::array<int, 3>& predictions, JpegCoefficients* out) {
  const int mcu_y = static_cast<int>(mcu / header.mcus_wide);
  const int mcu_x = static_cast<int>(mcu % header.mcus_wide);
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[static_cast<size_t>(c)];
    for (int y = 0; y < component.mcu_height; ++y) {
      for (int x = 0; x < component.mcu_width; ++x) {
        int16_t* block =
            out->block(c, mcu_y * component.mcu_height + y, mcu_x * component.mcu_width + x);
        int& prediction = predictions[static_cast<size_t>(c)];
        if (!decode_block(reader, tables, c, prediction, block) || reader.overrun()) return false;
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
  if (!reader.read(header, bytes, size)) return false;
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
