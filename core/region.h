// The project's own baseline JPEG decoder, part 2: the pixels of a region of an image.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "entropy.h"
#include "idct.h"
#include "jpeg.h"

namespace imseq {

struct Region {
  int top = 0, left = 0, height = 0, width = 0;
};

// How much of a stream must be without anomaly for its pixels to count.
enum class Soundness {
  kRegion,   // what the region needs: for streams known to be clean
  kMarkers,  // also the restart markers and the end marker, all of them
  kAll       // everything up to the end marker
};

// Decodes only what a region needs: without restart markers the scan from its start to the region's
// last row, with them the intervals that touch the region; and the inverse DCT of the region's
// blocks alone. Keeps its memory from image to image.
class RegionDecoder {
 public:
  // header: kBaseline. The region must lie in the image and not be empty. False: an anomaly.
  [[nodiscard]] bool decode(const JpegHeader& header, const uint8_t* bytes, size_t size,
                            const Region& region, Soundness soundness);

  // After decode. Planes of a pixel row: 1 (grey) or 3 (red, green, blue).
  [[nodiscard]] int num_planes() const { return colour_ == JpegColour::kGrey ? 1 : 3; }
  // Pixels [left, left + width) of row y of the image, which lies in the region, to planes[0 ...].
  void row(int y, uint8_t* const* planes);

 private:
  enum class Upsampling { kNone, kH2V1, kH2V2, kH1V2, kReplicate };

  // A component's decoded samples, those of the region's MCUs, and how they become pixels.
  struct Plane {
    int h_factor, v_factor;  // pixels per sample
    Upsampling upsampling;
    int width, height;          // of the component
    int mcu_width, mcu_height;  // blocks
    int left, top;              // sample of the component that samples[0] is
    ptrdiff_t stride;
    std::vector<uint8_t> samples;
    std::vector<uint8_t> pixels;  // a row of them, upsampled
    IdctTable idct;

    // Row y of the component, indexed by sample of the component.
    [[nodiscard]] const uint8_t* row(int y) const {
      return samples.data() + (y - top) * stride - left;
    }
  };

  void lay_out(const JpegHeader& header, const Region& region);
  void lay_out_plane(const JpegHeader& header, size_t component);
  [[nodiscard]] int64_t next_needed(int64_t mcu) const;
  [[nodiscard]] bool decode_interval(const Interval& interval, bool to_end);
  [[nodiscard]] bool skip_mcus(BitReader& reader, int64_t num_mcus);
  [[nodiscard]] bool decode_mcus(BitReader& reader, int64_t mcu, int64_t num_mcus);
  const uint8_t* upsampled_row(Plane& plane, int y);

  JpegColour colour_ = JpegColour::kGrey;
  Region region_;
  int mcus_wide_ = 0;
  int64_t num_mcus_ = 0;
  int first_mcu_x_ = 0, end_mcu_x_ = 0, first_mcu_y_ = 0, end_mcu_y_ = 0;  // MCUs the region needs
  size_t num_components_ = 0;
  std::array<Plane, 3> planes_{};
  std::array<int, 3> predictions_{};
  std::vector<uint16_t> sums_;
  HuffmanTables tables_;
  IntervalReader intervals_;
};

}  // namespace imseq
