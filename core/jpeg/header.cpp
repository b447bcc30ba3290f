#include "jpeg/header.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace imseq {

const std::array<uint8_t, 64> kNaturalOrder = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

namespace {

// libjpeg-turbo's JPEG_MAX_DIMENSION and D_MAX_BLOCKS_IN_MCU (jmorecfg.h, jpeglib.h).
constexpr int kMaxDimension = 65500;
constexpr int kMaxMcuBlocks = 10;

bool parse_dqt(JpegPayload in, JpegHeader* header) {
  size_t at = 0;
  while (at < in.size) {
    const int precision = in.u8(at) >> 4, index = in.u8(at) & 15;
    const size_t table_bytes = precision == 0 ? 64 : 128;
    if (precision > 1 || index > 3 || in.size - at < 1 + table_bytes) return false;
    ++at;
    JpegQuantTable& table = header->quant_tables[static_cast<size_t>(index)];
    table.defined = true;
    for (size_t k = 0; k < 64; ++k) {
      table.values[k] = static_cast<uint16_t>(precision == 0 ? in.u8(at + k) : in.u16(at + 2 * k));
    }
    at += table_bytes;
  }
  return true;
}

bool parse_dht(JpegPayload in, JpegHeader* header) {
  size_t at = 0;
  while (at < in.size) {
    const int table_class = in.u8(at) >> 4, index = in.u8(at) & 15;
    if (table_class > 1 || index > 3 || in.size - at < 17) return false;
    JpegHuffmanSpec spec;
    spec.defined = true;
    std::memcpy(spec.counts.data(), in.bytes + at + 1, 16);
    at += 17;
    const auto num_codes = std::accumulate(spec.counts.begin(), spec.counts.end(), size_t{0});
    if (num_codes > 256 || in.size - at < num_codes) return false;
    std::memcpy(spec.values.data(), in.bytes + at, num_codes);
    at += num_codes;
    auto& tables = table_class == 0 ? header->dc_tables : header->ac_tables;
    tables[static_cast<size_t>(index)] = spec;
  }
  return true;
}

bool parse_frame(int marker, JpegPayload in, JpegHeader* header) {
  if (header->frame_marker != 0 || in.size < 6) return false;
  header->frame_marker = marker;
  header->precision = in.u8(0);
  header->height = in.u16(1);
  header->width = in.u16(3);
  header->num_components = in.u8(5);
  const int n = header->num_components;
  if (n < 1 || n > 4 || header->width == 0 || in.size != 6 + 3 * static_cast<size_t>(n))
    return false;
  for (size_t c = 0; c < static_cast<size_t>(n); ++c) {
    JpegComponent& component = header->components[c];
    component.id = in.u8(6 + 3 * c);
    component.h_sampling = in.u8(7 + 3 * c) >> 4;
    component.v_sampling = in.u8(7 + 3 * c) & 15;
    component.quant_table = in.u8(8 + 3 * c);
    if (component.h_sampling < 1 || component.h_sampling > 4 || component.v_sampling < 1 ||
        component.v_sampling > 4 || component.quant_table > 3) {
      return false;
    }
    header->max_h_sampling = std::max(header->max_h_sampling, component.h_sampling);
    header->max_v_sampling = std::max(header->max_v_sampling, component.v_sampling);
  }
  return true;
}

// Pillow parses these blocks when it opens a file. It fails on one that ends right behind the
// resource code (IndexError in JpegImagePlugin.APP) and accepts any other damage.
bool pillow_fails_on_photoshop(JpegPayload in) {
  size_t at = 14;
  while (in.size >= at + 4 && std::memcmp(in.bytes + at, "8BIM", 4) == 0) {
    at += 6;
    if (at == in.size) return true;
    if (at > in.size) return false;
    at += 1 + static_cast<size_t>(in.u8(at));
    at += at & 1;
    if (at + 4 > in.size) return false;
    const uint32_t block_bytes = static_cast<uint32_t>(in.u16(at)) << 16 | in.u16(at + 2);
    at += 4 + static_cast<size_t>(block_bytes);
    at += at & 1;
  }
  return false;
}

// Application segments decide the colour space. Those that Pillow parses when it opens a file must
// be as it expects. One known exception: some versions of Pillow fail on a damaged XResolution in
// Exif data (JpegImageFile._read_dpi_from_exif); all of Exif is ignored here.
bool parse_application(int marker, JpegPayload in, JpegHeader* header) {
  if (marker == kApp0 && in.starts_with("JFIF", 4)) {
    if (in.size < 14) return false;
    if (in.starts_with("JFIF\0", 5)) header->has_jfif = true;
  } else if (marker == kApp14 && in.starts_with("Adobe", 5)) {
    if (in.size < 12) return false;
    header->has_adobe = true;
    header->adobe_transform = in.u8(11);
  } else if (marker == kApp2 && in.starts_with("ICC_PROFILE\0", 12)) {
    return in.size >= 14;
  } else if (marker == kApp13 && in.starts_with("Photoshop 3.0\0", 14)) {
    return !pillow_fails_on_photoshop(in);
  }
  return true;
}

// *whole_image: the scan has all components, in the order of the frame.
bool parse_scan(JpegPayload in, JpegHeader* header, bool* whole_image) {
  if (header->frame_marker == 0 || in.size < 1) return false;
  const int n = in.u8(0);
  if (n < 1 || n > 4 || in.size != 4 + 2 * static_cast<size_t>(n)) return false;
  const size_t end = 1 + 2 * static_cast<size_t>(n);
  *whole_image =
      n == header->num_components && in.u8(end) == 0 && in.u8(end + 1) == 63 && in.u8(end + 2) == 0;
  for (size_t c = 0; *whole_image && c < static_cast<size_t>(n); ++c) {
    JpegComponent& component = header->components[c];
    component.dc_table = in.u8(2 + 2 * c) >> 4;
    component.ac_table = in.u8(2 + 2 * c) & 15;
    *whole_image = in.u8(1 + 2 * c) == component.id;
  }
  return true;
}

bool is_frame_marker(int marker) {
  return marker >= kSof0 && marker <= kSof15 && marker != kDht && marker != kJpg && marker != kDac;
}

bool parse_segment(int marker, JpegPayload in, JpegHeader* header, bool* whole_image) {
  if (is_frame_marker(marker)) return parse_frame(marker, in, header);
  if (marker >= kApp0 && marker <= kApp15) return parse_application(marker, in, header);
  switch (marker) {
    case kDqt:
      return parse_dqt(in, header);
    case kDht:
      return parse_dht(in, header);
    case kDri:
      if (in.size != 2) return false;
      header->restart_interval = in.u16(0);
      return true;
    case kSos:
      return parse_scan(in, header, whole_image);
    case kCom:
    case kDac:
      return true;
    default:
      return false;
  }
}

}  // namespace

// T.81 C.2, and as libjpeg-turbo checks it (jpeg_make_d_derived_tbl): no code may be all ones.
bool is_prefix_code(const JpegHuffmanSpec& spec) {
  uint32_t code = 0;
  for (int bits = 1; bits <= 16; ++bits) {
    code = code * 2 + spec.counts[static_cast<size_t>(bits - 1)];
    // The greatest code of this length is code - 1.
    if (spec.counts[static_cast<size_t>(bits - 1)] != 0 && code >= 1u << bits) return false;
  }
  return true;
}

bool is_dc_table(const JpegHuffmanSpec& spec) {
  // Behind the last code there are zeros.
  return *std::max_element(spec.values.begin(), spec.values.end()) <= 15;
}

namespace {

bool quant_tables_are_defined(const JpegHeader& header) {
  const auto used = header.used_components();
  return std::all_of(used.begin(), used.end(), [&](const JpegComponent& component) {
    return header.quant_tables[component.quant_table].defined;
  });
}

bool huffman_tables_are_sound(const JpegHeader& header) {
  for (const JpegComponent& component : header.used_components()) {
    if (component.dc_table > 3 || component.ac_table > 3) return false;
    const JpegHuffmanSpec& dc = header.dc_tables[component.dc_table];
    const JpegHuffmanSpec& ac = header.ac_tables[component.ac_table];
    if (!dc.defined || !ac.defined) return false;
    if (!is_prefix_code(dc) || !is_prefix_code(ac) || !is_dc_table(dc)) return false;
  }
  return true;
}

// Whether all sampling factors divide the greatest ones, and libjpeg-turbo accepts the MCU's size.
bool sampling_is_integral(const JpegHeader& header) {
  int mcu_blocks = 0;
  for (const JpegComponent& component : header.used_components()) {
    if (header.max_h_sampling % component.h_sampling != 0) return false;
    if (header.max_v_sampling % component.v_sampling != 0) return false;
    mcu_blocks += component.h_sampling * component.v_sampling;
  }
  return header.num_components == 1 || mcu_blocks <= kMaxMcuBlocks;
}

bool ids_are_distinct(const JpegHeader& header) {
  const auto& c = header.components;
  return header.num_components == 1 ||
         (c[0].id != c[1].id && c[0].id != c[2].id && c[1].id != c[2].id);
}

bool has_arithmetic_conditioning(const JpegHeader& header) {
  return std::any_of(header.segments.begin(), header.segments.end(),
                     [](const JpegSegment& segment) { return segment.marker == kDac; });
}

bool is_sequential(const JpegHeader& header) {
  return header.frame_marker == kSof0 || header.frame_marker == kSof1;
}

bool in_scope(const JpegHeader& header) {
  return !has_arithmetic_conditioning(header) &&
         (is_sequential(header) || header.frame_marker == kSof2) && header.precision == 8 &&
         (header.num_components == 1 || header.num_components == 3) && header.height > 0 &&
         header.height <= kMaxDimension && header.width <= kMaxDimension &&
         !(header.has_adobe && header.adobe_transform > 1) && ids_are_distinct(header) &&
         sampling_is_integral(header) && quant_tables_are_defined(header);
}

// libjpeg-turbo's default_decompress_parms (jdapimin.c): JFIF means YCbCr; otherwise Adobe's marker
// decides; otherwise the component ids.
JpegColour colour_of(const JpegHeader& header) {
  if (header.num_components == 1) return JpegColour::kGrey;
  if (header.has_jfif) return JpegColour::kYCbCr;
  if (header.has_adobe) return header.adobe_transform == 0 ? JpegColour::kRgb : JpegColour::kYCbCr;
  const auto& c = header.components;
  const bool rgb = c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B';
  return rgb ? JpegColour::kRgb : JpegColour::kYCbCr;
}

void derive_geometry(JpegHeader* header) {
  const int max_h = header->max_h_sampling, max_v = header->max_v_sampling;
  const bool lone = header->num_components == 1;
  header->mcus_wide = divide_up(header->width, lone ? 8 : 8 * max_h);
  header->mcus_high = divide_up(header->height, lone ? 8 : 8 * max_v);
  for (size_t c = 0; c < static_cast<size_t>(header->num_components); ++c) {
    JpegComponent& component = header->components[c];
    // T.81 A.2.2: with one component an MCU is one block, whatever the factors.
    component.mcu_width = lone ? 1 : component.h_sampling;
    component.mcu_height = lone ? 1 : component.v_sampling;
    component.width = divide_up(header->width * component.h_sampling, max_h);
    component.height = divide_up(header->height * component.v_sampling, max_v);
    component.blocks_wide = header->mcus_wide * component.mcu_width;
    component.blocks_high = header->mcus_high * component.mcu_height;
  }
}

// Skips the 0xFF that begins a marker and fill bytes (T.81 B.1.1.2). Returns the marker and leaves
// *at behind it; 0: there is none.
int read_marker(const uint8_t* bytes, size_t size, size_t* at) {
  if (*at >= size || bytes[*at] != 0xFF) return 0;
  while (*at < size && bytes[*at] == 0xFF) ++*at;
  return *at < size ? bytes[(*at)++] : 0;
}

// Reads the segment whose marker ends at bytes[*at].
bool read_segment(int marker, const uint8_t* bytes, size_t size, size_t* at, JpegHeader* header,
                  bool* whole_image) {
  if (size - *at < 2) return false;
  const size_t length = static_cast<size_t>(bytes[*at] << 8 | bytes[*at + 1]);
  if (length < 2 || size - *at < length) return false;
  if (!parse_segment(marker, {bytes + *at + 2, length - 2}, header, whole_image)) return false;
  header->segments.push_back({static_cast<uint8_t>(marker), *at - 2, length + 2});
  *at += length;
  return true;
}

}  // namespace

JpegKind parse_jpeg(const uint8_t* bytes, size_t size, JpegHeader* header) {
  std::vector<JpegSegment> segments = std::move(header->segments);  // keeps their memory
  segments.clear();
  *header = {.segments = std::move(segments)};
  if (size < 4 || bytes[0] != 0xFF || bytes[1] != kSoi || bytes[2] != 0xFF)
    return JpegKind::kDamaged;
  bool whole_image = false;
  size_t at = 2;
  for (int marker = 0; marker != kSos;) {
    marker = read_marker(bytes, size, &at);
    if (marker == 0 || !read_segment(marker, bytes, size, &at, header, &whole_image))
      return JpegKind::kDamaged;
  }
  header->entropy_offset = at;
  const bool baseline = whole_image && is_sequential(*header);
  if (!in_scope(*header) || (baseline && !huffman_tables_are_sound(*header)))
    return JpegKind::kUnsupported;
  header->colour = colour_of(*header);
  derive_geometry(header);
  return baseline ? JpegKind::kBaseline : JpegKind::kSeveralScans;
}

int parse_to_next_scan(const uint8_t* bytes, size_t size, size_t* at, JpegHeader* header) {
  bool whole_image = false;
  while (true) {
    const int marker = read_marker(bytes, size, at);
    if (marker == kEoi) return kEoi;
    if (marker != kDht && marker != kDri && marker != kSos) return 0;
    if (!read_segment(marker, bytes, size, at, header, &whole_image)) return 0;
    if (marker == kSos) return kSos;
  }
}

}  // namespace imseq
