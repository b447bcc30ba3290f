// The JPEG decoder by itself: entropy coding there and back, regions against the whole image, and
// damage that must neither be accepted nor read past the bytes (for sanitizers). Equality with
// Pillow is tests/test_decode.py's.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "jpeg/coefficients.h"
#include "jpeg/header.h"
#include "jpeg/region.h"
#include "jpeg_writer.h"
#include "read/crc32c.h"
#include "sample/decode.h"

namespace {

using imseq::JpegCoefficients;
using imseq::JpegHeader;
using imseq::JpegKind;
using imseq::JpegQuantTable;
using imseq::kNaturalOrder;
using imseq::Region;
using imseq::RegionDecoder;
using imseq::Soundness;

// ---- tests over generated images ----------------------------------------------------------------

void test_coefficients_come_back() {
  JpegHeader header;
  JpegCoefficients out;
  for (int i = 0; i < 300; ++i) {
    const Image image = random_image(kSamplings[static_cast<size_t>(i) % kSamplings.size()],
                                     i % 3 == 0 ? 32767 : 1 << draw(1, 11));
    const ExactCopy file(image.file, image.file.size());
    const bool parsed =
        imseq::parse_jpeg(file.bytes.get(), file.size, &header) == JpegKind::kBaseline;
    expect(parsed, "a sound header", i);
    if (!parsed) continue;
    expect(header.entropy_offset == image.entropy_offset, "entropy_offset", i);
    expect(header.segments.size() == 6, "six segments", i);
    const bool decoded = imseq::decode_coefficients(header, file.bytes.get(), file.size, &out);
    expect(decoded, "a sound scan", i);
    if (!decoded) continue;
    expect(out.end_offset == file.size, "end_offset", i);
    size_t next = 0;
    for (int64_t mcu = 0; mcu < header.num_mcus(); ++mcu) {
      const int mcu_y = static_cast<int>(mcu) / header.mcus_wide;
      const int mcu_x = static_cast<int>(mcu) % header.mcus_wide;
      for (int c = 0; c < header.num_components; ++c) {
        const auto& component = header.components[static_cast<size_t>(c)];
        for (int b = 0; b < component.mcu_width * component.mcu_height; ++b) {
          const int16_t* block =
              out.block(c, mcu_y * component.mcu_height + b / component.mcu_width,
                        mcu_x * component.mcu_width + b % component.mcu_width);
          expect(std::equal(block, block + 64, image.blocks[next].begin()), "a block", i, mcu, c);
          ++next;
        }
      }
    }
  }
}

// Runs lanes over the intervals of one image.
class OneImage final : public imseq::LaneWork {
 public:
  // The tables are used often enough beforehand to be served as flat ones, or new each time.
  [[nodiscard]] bool decode(const JpegHeader& header, const uint8_t* bytes, size_t size,
                            const Region& region, Soundness soundness, bool flat = false) {
    if (!flat) flat_tables_ = imseq::FlatTables();
    for (int i = 0; flat && i < 20; ++i) (void)flat_tables_.serve(header, true);
    if (!decoder.open(header, bytes, size, region, soundness, &flat_tables_, true, ++id_))
      return false;
    const imseq::ScanTables& tables = decoder.tables();
    expect((tables.flat != nullptr) == flat, "the kind of tables that was asked for");
    const imseq::LaneKernels& kernels = imseq::lane_kernels(imseq::cpu_level());
    const int num_lanes = flat ? kernels.num_flat_lanes : kernels.num_image_lanes;
    for (imseq::Lane* lane = lanes_.get(); lane != lanes_.get() + num_lanes; ++lane) {
      if (!decoder.begin_interval(lane)) lane->park(tables.flat, tables.tables.entries());
    }
    (flat ? kernels.flat : kernels.image)(lanes_.get(), tables.flat, this);
    expect(decoder.done(), "all intervals are done");
    for (int l = 0; l < num_lanes; ++l) {
      const auto& values = lanes_[static_cast<size_t>(l)].coefficients;
      expect(std::all_of(std::begin(values), std::end(values), [](int16_t v) { return v == 0; }),
             "lanes are left with zeros");
    }
    return !decoder.failed();
  }

  RegionDecoder decoder;

 private:
  bool advance(imseq::Lane* lane) override {
    if (decoder.take_segment(lane) || decoder.begin_interval(lane)) return true;
    const imseq::ScanTables& tables = decoder.tables();
    lane->park(tables.flat, tables.tables.entries());
    return false;
  }

  std::unique_ptr<imseq::Lane[]> lanes_ = std::make_unique<imseq::Lane[]>(imseq::kMaxLanes);
  imseq::FlatTables flat_tables_;
  uint64_t id_ = 0;
};

std::vector<uint8_t> pixels_of(RegionDecoder* decoder, const Region& region) {
  const auto width = static_cast<size_t>(region.width);
  const size_t stride = width + imseq::kRowSlack;
  std::vector<uint8_t> pixels;
  std::vector<uint8_t> row(3 * stride, 0);
  for (int y = region.top; y < region.top + region.height; ++y) {
    uint8_t* planes[3] = {row.data(), row.data() + stride, row.data() + 2 * stride};
    decoder->row(y, planes);
    for (const uint8_t* plane : planes) pixels.insert(pixels.end(), plane, plane + width);
  }
  return pixels;
}

// Every level that this processor has, for as long as the test takes.
template <typename Test>
void on_every_level(const Test& test) {
  const imseq::CpuLevel before = imseq::cpu_level();
  for (const auto level : {imseq::CpuLevel::kPortable, imseq::CpuLevel::kAvx2,
                           imseq::CpuLevel::kAvx512, imseq::CpuLevel::kNeon}) {
    if (!imseq::cpu_has(level)) continue;
    imseq::use_cpu_level(level);
    test();
  }
  imseq::use_cpu_level(before);
}

void test_regions_are_parts_of_the_image() {
  JpegHeader header;
  OneImage whole, part;
  for (int i = 0; i < 200; ++i) {
    const Image image = random_image(kSamplings[static_cast<size_t>(i) % kSamplings.size()], 100);
    const uint8_t* bytes = image.file.data();
    const size_t size = image.file.size();
    if (imseq::parse_jpeg(bytes, size, &header) != JpegKind::kBaseline) {
      expect(false, "a sound header", i);
      continue;
    }
    const Region all{0, 0, image.height, image.width};
    imseq::use_cpu_level(imseq::CpuLevel::kPortable);
    expect(whole.decode(header, bytes, size, all, Soundness::kAll), "the whole image", i);
    const std::vector<uint8_t> expected = pixels_of(&whole.decoder, all);
    for (int j = 0; j < 10; ++j) {
      Region region;
      region.top = draw(0, image.height - 1);
      region.left = draw(0, image.width - 1);
      region.height = draw(1, image.height - region.top);
      region.width = draw(1, image.width - region.left);
      const Soundness soundness[] = {Soundness::kRegion, Soundness::kMarkers, Soundness::kAll};
      std::vector<uint8_t> cut;
      for (size_t row = 0; row < 3 * static_cast<size_t>(region.height); ++row) {
        const uint8_t* from =
            expected.data() +
            (static_cast<size_t>(region.top) * 3 + row) * static_cast<size_t>(image.width) +
            region.left;
        cut.insert(cut.end(), from, from + region.width);
      }
      on_every_level([&] {
        for (const bool flat : {false, true}) {
          expect(part.decode(header, bytes, size, region, soundness[j % 3], flat), "a region", i,
                 j);
          const std::vector<uint8_t> pixels = pixels_of(&part.decoder, region);
          const size_t planes = header.num_components == 1 ? 1 : 3;
          for (size_t row = 0; row < 3 * static_cast<size_t>(region.height); ++row) {
            if (row % 3 >= planes) continue;
            const auto at = static_cast<ptrdiff_t>(row) * region.width;
            expect(std::equal(pixels.begin() + at, pixels.begin() + at + region.width,
                              cut.begin() + at),
                   "a region's row", i, j, static_cast<long long>(row));
          }
        }
      });
    }
  }
}

// Whole images, all of whose pixels come back the same.
void expect_same_pixels(const Bytes& file, const Bytes& other, Soundness soundness, int i) {
  static JpegHeader header;
  static OneImage decoder;
  const auto pixels = [&](const Bytes& bytes, Soundness how, bool flat) {
    const ExactCopy copy(bytes, bytes.size());
    const bool parsed =
        imseq::parse_jpeg(copy.bytes.get(), copy.size, &header) == JpegKind::kBaseline;
    expect(parsed, "a sound header", i);
    const Region all{0, 0, header.height, header.width};
    expect(decoder.decode(header, copy.bytes.get(), copy.size, all, how, flat), "a sound image", i);
    return pixels_of(&decoder.decoder, all);
  };
  const Bytes expected = pixels(file, Soundness::kAll, false);
  on_every_level([&] {
    for (const bool flat : {false, true}) {
      expect(pixels(other, soundness, flat) == expected, "the same pixels", i, flat);
    }
  });
}

// Extra bits are ones: every few bytes 0xFF and its stuffing.
std::vector<int16_t> block_of_ones() {
  std::vector<int16_t> block(64, 0);
  for (int k = draw(1, 3); k < 64; k += draw(1, 2)) {
    block[static_cast<size_t>(k)] = static_cast<int16_t>((1 << draw(9, 15)) - 1);
  }
  return block;
}

// Intervals of more bytes than a lane holds: what is at the border of what it takes at once is
// taken as anything else.
void test_long_intervals() {
  int num_pairs_at_border = 0, num_pairs_across_border = 0;
  for (int i = 0; i < 12; ++i) {
    const Codes codes = random_codes();
    const Shape shape{8 * draw(20, 40), 104, 0, {{1, 1}}};
    const std::mt19937 before = generator;
    const Image one = write_image(shape, codes, block_of_ones);
    generator = before;
    const Image many =
        write_image({shape.width, shape.height, 7, shape.sampling}, codes, block_of_ones);
    expect(one.blocks == many.blocks, "the same blocks", i);
    expect(one.file.size() - one.entropy_offset > imseq::kLaneBytes + 64, "a long interval", i);
    expect_same_pixels(many.file, one.file, Soundness::kAll, i);
    const uint8_t* const border = one.file.data() + one.entropy_offset + imseq::kLaneBytes;
    num_pairs_at_border += border[-2] == 0xFF;
    num_pairs_across_border += border[-1] == 0xFF;
  }
  expect(num_pairs_at_border > 0 && num_pairs_across_border > 0, "stuffing at the border");
}

bool is_accepted_by_sizes(const Bytes& file) {
  static JpegHeader header;
  static OneImage decoder;
  const ExactCopy copy(file, file.size());
  if (imseq::parse_jpeg(copy.bytes.get(), copy.size, &header) != JpegKind::kBaseline) return false;
  const Region all{0, 0, header.height, header.width};
  const bool accepted =
      decoder.decode(header, copy.bytes.get(), copy.size, all, Soundness::kRegion, true);
  on_every_level([&] {
    for (const bool flat : {false, true}) {
      const bool again =
          decoder.decode(header, copy.bytes.get(), copy.size, all, Soundness::kRegion, flat);
      expect(again == accepted, "all decoders agree on sizes");
    }
  });
  return accepted;
}

// Where the sizes of intervals are known nobody looks for markers; still, an FF without its 0 is an
// anomaly wherever it stands.
void test_missing_stuffing() {
  int num_double = 0;
  for (int i = 0; i < 6; ++i) {
    Image image = write_image({8 * 20, 80, 0, {{1, 1}}}, random_codes(), block_of_ones);
    const size_t data_size = image.file.size() - image.entropy_offset;
    if (data_size > 0xFFFF || data_size < imseq::kLaneBytes + 64) continue;
    expect(is_accepted_by_sizes(with_sizes(image)), "an image with sizes", i);
    const size_t border = image.entropy_offset + imseq::kLaneBytes;
    for (size_t at = border - 16; at < border + 16; ++at) {
      if (image.file[at] != 0xFF) continue;
      Bytes file = with_sizes(image);
      const size_t shift = file.size() - image.file.size();
      num_double += image.file[at + 2] == 0xFF;
      file.erase(file.begin() + static_cast<ptrdiff_t>(at + shift + 1));
      // The size is one less now; its low byte is the last one before the scan header.
      uint8_t* const size = file.data() + image.entropy_offset + shift - 12;
      const int written = (size[0] << 8 | size[1]) - 1;
      size[0] = static_cast<uint8_t>(written >> 8);
      size[1] = static_cast<uint8_t>(written);
      expect(!is_accepted_by_sizes(file), "FF without its 0", i, static_cast<long long>(at));
    }
  }
  expect(num_double > 0, "FF FF near the border");
}

// Of the whole image, sizes tell the same as markers, of damaged ones as of others.
void test_sizes() {
  static JpegHeader header;
  static JpegCoefficients coefficients;
  for (int i = 0; i < 40; ++i) {
    const Image image = random_image(kSamplings[static_cast<size_t>(i) % kSamplings.size()], 200);
    const Bytes file = with_sizes(image);
    expect_same_pixels(image.file, file, Soundness::kRegion, i);
    const size_t entropy_offset = file.size() - (image.file.size() - image.entropy_offset);
    for (int j = 0; j < 50; ++j) {
      Bytes damaged = file;
      const int low = static_cast<int>(entropy_offset), high = static_cast<int>(file.size()) - 1;
      const auto at = static_cast<size_t>(draw(low, high));
      damaged[at] = j % 3 == 0 ? 0xFF : static_cast<uint8_t>(generator());
      // Or right before a marker.
      for (size_t k = at; j % 3 == 1 && k + 1 < damaged.size(); ++k) {
        if (damaged[k] == 0xFF && damaged[k + 1] != 0 && k > entropy_offset) {
          damaged[k - 1] = 0xFF;
          break;
        }
      }
      const bool parsed =
          imseq::parse_jpeg(damaged.data(), damaged.size(), &header) == JpegKind::kBaseline;
      expect(parsed, "a sound header", i);
      expect(is_accepted_by_sizes(damaged) ==
                 imseq::decode_coefficients(header, damaged.data(), damaged.size(), &coefficients),
             "damage is found by sizes as it is by markers", i, j);
    }
  }
}

// ---- groups -------------------------------------------------------------------------------------

struct Pixels {
  int32_t status;
  Bytes row;
};

constexpr int kSide = 24;

std::vector<Pixels> decode_group(imseq::SampleDecoder* decoder, const std::vector<Bytes>& files) {
  imseq_recipe recipe{};
  recipe.geometry = IMSEQ_GEOMETRY_RESIZE_CROP;
  recipe.out_height = recipe.out_width = recipe.crop_height = recipe.crop_width = kSide;
  recipe.dtype = IMSEQ_UINT8;
  std::vector<Pixels> out(files.size(), {IMSEQ_OK, Bytes(3 * kSide * kSide, 0)});
  std::vector<imseq_sample> samples;
  for (size_t i = 0; i < files.size(); ++i) {
    samples.push_back({{1, 0, static_cast<int64_t>(i)},
                       files[i].data(),
                       static_cast<int64_t>(files[i].size()),
                       out[i].row.data(),
                       i % 2 == 0 ? uint32_t{IMSEQ_SAMPLE_CLEAN} : 0,
                       IMSEQ_ERROR_ARGUMENT});
  }
  imseq_error error;
  const int32_t status =
      decoder->decode(recipe, samples.data(), static_cast<int>(samples.size()), nullptr, &error);
  expect(status == IMSEQ_OK, "a group", status);
  for (size_t i = 0; i < files.size(); ++i) {
    out[i].status = samples[i].status;
    expect(out[i].status == IMSEQ_OK || out[i].status == IMSEQ_NOT_DECODED, "a sample's status",
           out[i].status);
  }
  return out;
}

// A pack's image, colour or grey; one of another pack; one with tables of its own; a damaged one,
// one that is cut, and what is no image.
Bytes any_file(const std::array<Codes, 2>& packs, bool of_first_pack) {
  const int kind = of_first_pack ? draw(2, 8) : draw(0, 9);
  const bool own_codes = kind == 0, grey = kind < 4;
  const auto& sampling = grey ? kSamplings[7] : kSamplings[2];
  const Codes codes = own_codes ? random_codes() : packs[kind == 1 || kind == 9];
  const Shape shape{draw(1, 100), draw(1, 100), draw(0, 4) * draw(0, 2), sampling};
  const Image image = write_image(shape, codes, [] { return random_block(100); });
  Bytes file = draw(0, 1) == 0 ? image.file : with_sizes(image);
  const auto last = static_cast<int>(file.size()) - 1;
  switch (draw(0, 15)) {
    case 0:
      file.resize(static_cast<size_t>(draw(0, last)));
      break;
    case 1:
      file[static_cast<size_t>(draw(0, last))] = static_cast<uint8_t>(generator());
      break;
    case 2:
      file[file.size() - 2 - static_cast<size_t>(draw(0, std::min(last - 2, 20)))] = 0xFF;
      break;
    default:
      break;
  }
  return file;
}

// What is decoded beside an image, or before it, changes nothing: other tables, another kind of
// lanes, damage in the midst of which lanes are left.
void test_groups() {
  imseq::SampleDecoder decoder;
  const std::array<Codes, 2> packs{random_codes(), random_codes()};
  int num_decoded = 0, num_not_decoded = 0;
  for (int i = 0; i < 60; ++i) {
    std::vector<Bytes> files(static_cast<size_t>(draw(1, IMSEQ_MAX_GROUP)));
    for (Bytes& file : files) file = any_file(packs, i % 3 == 0);
    imseq::use_cpu_level(imseq::CpuLevel::kPortable);
    std::vector<Pixels> expected;
    for (const Bytes& file : files) {
      imseq::SampleDecoder fresh;
      const bool is_clean = expected.size() % 2 == 0;
      const std::vector<Bytes> alone =
          is_clean ? std::vector<Bytes>{file} : std::vector<Bytes>{{}, file};
      expected.push_back(decode_group(&fresh, alone).back());
      ++(expected.back().status == IMSEQ_OK ? num_decoded : num_not_decoded);
    }
    on_every_level([&] {
      const std::vector<Pixels> group = decode_group(&decoder, files);
      for (size_t f = 0; f < files.size(); ++f) {
        const auto number = static_cast<long long>(f);
        expect(group[f].status == expected[f].status, "status in a group", i, number);
        if (group[f].status != IMSEQ_OK) continue;
        expect(group[f].row == expected[f].row, "pixels in a group", i, number);
      }
    });
  }
  expect(num_decoded > 100 && num_not_decoded > 20, "images of both kinds", num_decoded,
         num_not_decoded);
}

// A marker that is not where the sizes say: the image is not decoded, wherever in it lanes find out,
// and nothing else in its group is.
void test_damaged_markers() {
  imseq::SampleDecoder decoder;
  const Image image =
      write_image({40, 40, 2, kSamplings[7]}, random_codes(), [] { return random_block(100); });
  const Bytes file = with_sizes(image);
  const size_t shift = file.size() - image.file.size();
  int num_not_decoded = 0;
  for (size_t at = image.entropy_offset + shift; at + 1 < file.size(); ++at) {
    if (file[at] != 0xFF || file[at + 1] == 0) continue;
    Bytes damaged = file;
    damaged[at + 1] = 0;
    const std::vector<Pixels> group = decode_group(&decoder, {damaged, file, damaged, {}, file});
    expect(group[0].status == group[2].status, "an image twice in a group");
    expect(group[1].status == IMSEQ_OK && group[4].status == IMSEQ_OK, "images beside it");
    expect(group[1].row == group[4].row, "their pixels");
    num_not_decoded += group[0].status == IMSEQ_NOT_DECODED;
  }
  expect(num_not_decoded > 5, "markers that are looked at", num_not_decoded);
}

// ---- damage -------------------------------------------------------------------------------------

// Strictly decoded: true or false, but never a crash.
bool accepts(const uint8_t* bytes, size_t size) {
  static JpegHeader header;
  static JpegCoefficients coefficients;
  static OneImage decoder;
  if (imseq::parse_jpeg(bytes, size, &header) != JpegKind::kBaseline) return false;
  const bool accepted = imseq::decode_coefficients(header, bytes, size, &coefficients);
  const Region region{header.height / 2, header.width / 2, 1, 1};
  on_every_level([&] {
    for (const bool flat : {false, true}) {
      const bool by_region = decoder.decode(header, bytes, size, region, Soundness::kAll, flat);
      expect(accepted == by_region, "all strict decoders agree", static_cast<long long>(size));
    }
  });
  return accepted;
}

void test_damage() {
  for (int i = 0; i < 20; ++i) {
    const Image image = random_image(kSamplings[static_cast<size_t>(i) % kSamplings.size()], 200);
    expect(accepts(image.file.data(), image.file.size()), "the file itself", i);
    const size_t step = image.file.size() / 400 + 1;
    for (size_t size = 0; size < image.file.size(); size += step) {
      const ExactCopy cut(image.file, size);
      expect(!accepts(cut.bytes.get(), size), "a file that was cut", i,
             static_cast<long long>(size));
    }
    for (int j = 0; j < 300; ++j) {
      const ExactCopy damaged(image.file, image.file.size());
      for (int n = draw(1, 4); n > 0; --n) {
        damaged.bytes[static_cast<size_t>(draw(0, static_cast<int>(damaged.size) - 1))] =
            static_cast<uint8_t>(generator());
      }
      (void)accepts(damaged.bytes.get(), damaged.size);
    }
  }
}

// A header that promises more blocks than the bytes can hold is refused before memory is asked for.
void test_huge_promises() {
  Image image = random_image(kSamplings[0], 10);
  for (size_t at = 2; at + 9 < image.entropy_offset; ++at) {
    if (image.file[at] != 0xFF || image.file[at + 1] != 0xC0) continue;
    image.file[at + 5] = image.file[at + 7] = 0xFF;  // 65280 + x in both directions
    image.file[at + 6] = image.file[at + 8] = 0x00;
  }
  expect(!accepts(image.file.data(), image.file.size()), "65280 x 65280 pixels in a few bytes");
}

// ---- checksum -----------------------------------------------------------------------------------

void test_crc32c() {
  const char* check = "123456789";
  const auto* bytes = reinterpret_cast<const uint8_t*>(check);
  expect(imseq::crc32c(0, bytes, 9) == 0xE3069283, "RFC 3720 check value");
  Bytes data(2000);  // enough for the lanes, twice
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(generator());
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t size = 0; begin + size <= data.size(); ++size) {
      expect(imseq::crc32c(7, data.data() + begin, size) ==
                 imseq::crc32c_portable(7, data.data() + begin, size),
             "both ways to a checksum", static_cast<long long>(begin),
             static_cast<long long>(size));
    }
  }
}

}  // namespace

int main() {
  test_coefficients_come_back();
  test_regions_are_parts_of_the_image();
  test_groups();
  test_damaged_markers();
  test_long_intervals();
  test_sizes();
  test_missing_stuffing();
  test_damage();
  test_huge_promises();
  test_crc32c();
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
