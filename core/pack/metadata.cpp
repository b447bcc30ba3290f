// Copies application and comment segments to a re-coded image.
#include <vector>

#include "jpeg/codes.h"
#include "jpeg/markers.h"
#include "pack/header_writer.h"

namespace imseq {

namespace {

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

}  // namespace

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

}  // namespace imseq
