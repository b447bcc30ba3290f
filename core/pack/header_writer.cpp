#include "pack/header_writer.h"

#include <algorithm>
#include <array>

#include "jpeg/codes.h"
#include "jpeg/markers.h"

namespace imseq {

namespace {

void write_quant_tables(const JpegHeader& header, bool* any_wide, HeaderWriter* writer) {
  *any_wide = false;
  for (int id = 0; id < 4; ++id) {
    const auto uses_it = [&](const JpegComponent& component) {
      return component.quant_table == id;
    };
    const auto begin = header.components.begin();
    if (std::none_of(begin, begin + header.num_components, uses_it)) continue;
    const auto& values = header.quant_tables[static_cast<size_t>(id)].values;
    const bool wide = *std::max_element(values.begin(), values.end()) > 255;
    std::vector<uint8_t> payload{static_cast<uint8_t>(wide << 4 | id)};
    for (const uint16_t value : values) {
      if (wide) payload.push_back(static_cast<uint8_t>(value >> 8));
      payload.push_back(static_cast<uint8_t>(value));
    }
    writer->segment(kDqt, payload);
    *any_wide = *any_wide || wide;
  }
}

void write_frame_header(const JpegHeader& header, bool extended, HeaderWriter* writer) {
  std::vector<uint8_t> payload{8,
                               static_cast<uint8_t>(header.height >> 8),
                               static_cast<uint8_t>(header.height),
                               static_cast<uint8_t>(header.width >> 8),
                               static_cast<uint8_t>(header.width),
                               static_cast<uint8_t>(header.num_components)};
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[static_cast<size_t>(c)];
    payload.push_back(static_cast<uint8_t>(component.id));
    payload.push_back(static_cast<uint8_t>(component.h_sampling << 4 | component.v_sampling));
    payload.push_back(static_cast<uint8_t>(component.quant_table));
  }
  writer->segment(extended ? kSof1 : kSof0, payload);
}

void write_huffman_table(const HuffmanCode& code, size_t table, HeaderWriter* writer) {
  std::array<uint8_t, kMaxDhtBytes> payload;
  const uint8_t* const end = write_dht(code, table, payload.data());
  writer->segment(kDht, {static_cast<const uint8_t*>(payload.data()), end});
}

}  // namespace

bool write_head(const JpegHeader& header, const uint8_t* bytes, bool strip,
                int32_t restart_interval, const HuffmanCodes& codes, HeaderWriter* writer) {
  writer->marker(kSoi);
  if (!write_metadata(header, bytes, strip, writer)) return false;
  bool extended = false;
  write_quant_tables(header, &extended, writer);
  write_frame_header(header, extended, writer);
  const size_t num_tables = header.num_components == 1 ? 2 : 4;
  for (size_t table = 0; table < num_tables; ++table) {
    write_huffman_table(codes[table], table, writer);
  }
  if (restart_interval > 0) {
    writer->segment(kDri, {static_cast<uint8_t>(restart_interval >> 8),
                           static_cast<uint8_t>(restart_interval)});
  }
  return true;
}

void write_scan_header(const JpegHeader& header, HeaderWriter* writer) {
  std::vector<uint8_t> payload{static_cast<uint8_t>(header.num_components)};
  for (int c = 0; c < header.num_components; ++c) {
    payload.push_back(static_cast<uint8_t>(header.components[static_cast<size_t>(c)].id));
    payload.push_back(c == 0 ? 0x00 : 0x11);
  }
  payload.insert(payload.end(), {0, 63, 0});
  writer->segment(kSos, payload);
}

size_t interval_sizes_bytes(size_t num_intervals) {
  constexpr size_t kMaxPayload = 65533;
  const size_t payload = sizeof(kIntervalSizes) + 2 * num_intervals;
  return payload <= kMaxPayload ? payload + 4 : 0;  // 0: there is none
}

void write_interval_sizes(const std::vector<size_t>& sizes, HeaderWriter* writer) {
  std::vector<uint8_t> payload(std::begin(kIntervalSizes), std::end(kIntervalSizes));
  for (const size_t size : sizes) {
    payload.push_back(static_cast<uint8_t>(size >> 8));
    payload.push_back(static_cast<uint8_t>(size));
  }
  writer->segment(kApp9, payload);
}

}  // namespace imseq
