#include "pack/header_writer.h"

#include <algorithm>

#include "jpeg/markers.h"

namespace imseq {

namespace {

// ---- metadata -----------------------------------------------------------------------------------

// The orientation tag of an Exif segment's first directory (Exif 2.3, 4.6.4 A); 1: there is none.
int exif_orientation(JpegPayload payload) {
  constexpr size_t kTiffOffset = 6, kEntrySize = 12;
  constexpr uint32_t kOrientationTag = 0x0112, kTypeShort = 3;
  if (payload.size < kTiffOffset + 8) return 1;
  const JpegPayload tiff{payload.bytes + kTiffOffset, payload.size - kTiffOffset};
  const bool little = tiff.bytes[0] == 'I';
  const auto read = [&](size_t offset, int num_bytes) {
    uint32_t value = 0;
    for (int i = 0; i < num_bytes; ++i) {
      value = value << 8 | tiff.bytes[offset + (little ? num_bytes - 1 - i : i)];
    }
    return value;
  };
  const size_t directory = read(4, 4);
  if (directory > tiff.size - 2) return 1;
  const size_t num_entries = read(directory, 2);
  for (size_t i = 0; i < num_entries; ++i) {
    const size_t entry = directory + 2 + i * kEntrySize;
    if (entry + kEntrySize > tiff.size) return 1;
    if (read(entry, 2) == kOrientationTag && read(entry + 2, 2) == kTypeShort) {
      const uint32_t value = read(entry + 8, 2);
      return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
  }
  return 1;
}

// An Exif segment with only the orientation.
std::vector<uint8_t> exif_of_orientation(int value) {
  return {'E', 'x', 'i', 'f',  0, 0, 'M', 'M', 0, 42, 0, 0,
          0,   8,  // one directory, at 8
          0,   1,   1,   0x12, 0, 3, 0,   0,   0, 1,  0, static_cast<uint8_t>(value),
          0,   0,   0,   0,    0, 0};
}

bool is_metadata(uint8_t marker) { return (marker >= kApp0 && marker <= kApp15) || marker == kCom; }

// Copies the metadata segments in their order; strip: only those that affect how the image looks.
// False: there is one that would be wrong for the re-coded image.
bool write_metadata(const JpegHeader& header, const uint8_t* bytes, bool strip,
                    HeaderWriter* writer) {
  bool orientation_written = false;
  for (const JpegSegment& segment : header.segments) {
    if (!is_metadata(segment.marker)) continue;
    const JpegPayload payload = segment.payload(bytes);
    const bool is_jfif = segment.marker == kApp0 && payload.starts_with("JFIF", 4);
    const bool is_adobe = segment.marker == kApp14 && payload.starts_with("Adobe", 5);
    if (segment.marker == kApp9 && payload.starts_with(kIntervalSizes, sizeof(kIntervalSizes))) {
      continue;  // the re-coded image gets its own
    }
    if (strip && segment.marker == kApp1 && payload.starts_with("Exif\0", 6)) {
      const int orientation = exif_orientation(payload);
      if (orientation != 1 && !orientation_written) {
        writer->segment(kApp1, exif_of_orientation(orientation));
      }
      orientation_written = orientation_written || orientation != 1;
    } else if (!strip || is_jfif || is_adobe) {
      // A multi-picture index holds file offsets of other pictures, which re-coding would break.
      if (segment.marker == kApp2 && payload.starts_with("MPF", 4)) return false;
      writer->segment(segment.marker, {payload.bytes, payload.bytes + payload.size});
    }
  }
  return true;
}

// ---- tables and frame ---------------------------------------------------------------------------

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
  for (const JpegComponent& component : header.used_components()) {
    payload.push_back(static_cast<uint8_t>(component.id));
    payload.push_back(static_cast<uint8_t>(component.h_sampling << 4 | component.v_sampling));
    payload.push_back(static_cast<uint8_t>(component.quant_table));
  }
  writer->segment(extended ? kSof1 : kSof0, payload);
}

}  // namespace

bool write_head(const JpegHeader& header, const uint8_t* bytes, bool strip,
                int32_t restart_interval, const HuffmanCodes& codes, HeaderWriter* writer) {
  writer->bytes = {0xFF, kSoi};
  if (!write_metadata(header, bytes, strip, writer)) return false;
  bool extended = false;
  write_quant_tables(header, &extended, writer);
  write_frame_header(header, extended, writer);
  const size_t num_tables = header.num_components == 1 ? 2 : 4;
  for (size_t table = 0; table < num_tables; ++table) {
    std::vector<uint8_t> payload(kMaxDhtBytes);
    payload.resize(
        static_cast<size_t>(write_dht(codes[table], table, payload.data()) - payload.data()));
    writer->segment(kDht, payload);
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
    payload.push_back(static_cast<uint8_t>(header.components[c].id));
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
