// The headers of a JPEG. Pixels of a region come from region.h, all coefficients from
// coefficients.h. All decode strictly: a stream is decoded without any anomaly or
// not at all, because only libjpeg-turbo can say what it makes of a damaged one.
//
// References: ITU-T T.81 (the numbered sections below), ITU-T T.871 (JFIF), and libjpeg-turbo 3.x
// and Pillow for whatever those leave open.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cpu/memory.h"

namespace imseq {

// The byte behind the 0xFF of a marker (T.81 table B.1).
constexpr uint8_t kSof0 = 0xC0, kSof1 = 0xC1, kSof2 = 0xC2, kDht = 0xC4, kJpg = 0xC8, kDac = 0xCC,
                  kSof15 = 0xCF, kRst0 = 0xD0, kSoi = 0xD8, kEoi = 0xD9, kSos = 0xDA, kDqt = 0xDB,
                  kDri = 0xDD, kApp0 = 0xE0, kApp1 = 0xE1, kApp2 = 0xE2, kApp9 = 0xE9,
                  kApp13 = 0xED, kApp14 = 0xEE, kApp15 = 0xEF, kCom = 0xFE;

// The largest magnitudes that baseline codes of 8-bit samples can hold (T.81 tables F.1 and F.2).
constexpr int kMaxDcDifference = 2047, kMaxAc = 1023;

// T.81 F.2.2.1 (EXTEND): `size` extra bits stand for a value whose top bit tells the sign.
constexpr int extend(uint32_t extra, int size) {
  if (size == 0) return 0;
  const int value = static_cast<int>(extra);
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

// Position in a block, row by row, of the k-th coefficient in zigzag order (T.81 figure 5).
extern const std::array<uint8_t, 64> kNaturalOrder;

// A Huffman table as it is written in a DHT segment.
struct JpegHuffmanSpec {
  bool defined = false;
  std::array<uint8_t, 16> counts{};   // codes of 1, 2, ... 16 bits
  std::array<uint8_t, 256> values{};  // zero behind the last code
  bool operator==(const JpegHuffmanSpec&) const = default;
};

struct JpegQuantTable {
  bool defined = false;
  std::array<uint16_t, 64> values{};  // zigzag order
};

struct JpegComponent {
  int id = 0;
  int h_sampling = 0, v_sampling = 0;  // as written in the frame header
  int quant_table = 0, dc_table = 0, ac_table = 0;
  // What follows is derived, and only for kBaseline and kSeveralScans.
  int mcu_width = 0, mcu_height = 0;     // blocks of this component in an MCU
  int width = 0, height = 0;             // samples of the image, without padding
  int blocks_wide = 0, blocks_high = 0;  // coded blocks, with those that pad MCUs
};

// The content of a marker segment, behind its length field.
struct JpegPayload {
  const uint8_t* bytes;
  size_t size;

  [[nodiscard]] int u8(size_t at) const { return bytes[at]; }
  [[nodiscard]] int u16(size_t at) const { return bytes[at] << 8 | bytes[at + 1]; }
  [[nodiscard]] bool starts_with(const char* text, size_t length) const {
    return size >= length && std::memcmp(bytes, text, length) == 0;
  }
};

// A marker segment before the entropy-coded data: image[offset, offset + size) begins with its
// 0xFF.
struct JpegSegment {
  uint8_t marker;
  size_t offset, size;

  [[nodiscard]] JpegPayload payload(const uint8_t* image) const {
    return {image + offset + 4, size - 4};  // 4: the marker and the length field
  }
};

enum class JpegColour { kGrey, kYCbCr, kRgb };

struct JpegHeader {
  int frame_marker = 0;  // SOF0 to SOF15
  int precision = 0;     // bits of a sample
  int width = 0, height = 0;
  int num_components = 0;
  std::array<JpegComponent, 4> components{};
  int max_h_sampling = 1, max_v_sampling = 1;
  int restart_interval = 0;  // MCUs, 0: none
  std::array<JpegQuantTable, 4> quant_tables{};
  std::array<JpegHuffmanSpec, 4> dc_tables{}, ac_tables{};
  bool has_jfif = false, has_adobe = false;
  int adobe_transform = 0;
  std::vector<JpegSegment> segments;  // all before the entropy-coded data; the last is SOS
  size_t entropy_offset = 0;          // first byte behind the scan header
  // What follows is derived, and only for kBaseline and kSeveralScans.
  JpegColour colour = JpegColour::kGrey;
  int mcus_wide = 0, mcus_high = 0;

  [[nodiscard]] std::span<const JpegComponent> used_components() const {
    return {components.data(), static_cast<size_t>(num_components)};
  }
  [[nodiscard]] int64_t num_mcus() const { return int64_t{mcus_wide} * mcus_high; }
  // MCUs of every restart interval except the last, which may have fewer.
  [[nodiscard]] int64_t interval_mcus() const {
    return restart_interval == 0 ? num_mcus() : restart_interval;
  }
  [[nodiscard]] int64_t num_intervals() const { return divide_up(num_mcus(), interval_mcus()); }
  [[nodiscard]] const JpegQuantTable& quant(int component) const {
    return quant_tables[components[component].quant_table];
  }
};

enum class JpegKind {
  kBaseline,      // the core decodes it
  kSeveralScans,  // progressive, or several sequential scans; only packing decodes it
  kUnsupported,   // a sound header of another kind: CMYK, 12 bit ...
  kDamaged        // no JPEG, or its header is not sound
};

// Reads everything up to the entropy-coded data of the first scan. Reads no byte outside [0, size).
[[nodiscard]] JpegKind parse_jpeg(const uint8_t* bytes, size_t size, JpegHeader* header);

// Reads the segments behind a scan, from bytes[*at] on: Huffman tables and restart intervals go
// into the header. Returns the marker that ends them and leaves *at behind it: SOS, whose segment
// is then the last of header->segments, or EOI. Returns 0 if there is anything else.
[[nodiscard]] int parse_to_next_scan(const uint8_t* bytes, size_t size, size_t* at,
                                     JpegHeader* header);

// Whether no code is a prefix of another and none is all ones.
[[nodiscard]] bool is_prefix_code(const JpegHuffmanSpec& spec);
// Whether all symbols are categories of a DC difference.
[[nodiscard]] bool is_dc_table(const JpegHuffmanSpec& spec);

}  // namespace imseq
