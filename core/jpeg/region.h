// The project's own baseline JPEG decoder, part 2: the pixels of a region of an image.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "jpeg/header.h"
#include "jpeg/idct.h"
#include "jpeg/lanes.h"

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
// blocks alone. Keeps its memory from image to image. Lanes do the entropy decoding:
//
//   if (!region.open(...)) ...;                       // foreign
//   while (lanes are free) region.begin_interval(lane);   // false: there are no more
//   for each segment that a lane has decoded: region.take_segment(lane);
//   when done(): unless failed(), row() of every row
class RegionDecoder {
 public:
  // header: kBaseline. The region must lie in the image and not be empty. False: an anomaly.
  [[nodiscard]] bool open(const JpegHeader& header, const uint8_t* bytes, size_t size,
                          const Region& region, Soundness soundness, FlatTables* flat_tables,
                          bool may_build_flat, uint64_t id);
  [[nodiscard]] const ScanTables& tables() const { return tables_; }

  // Gives the lane the first segment of the next interval. False: there is none left.
  [[nodiscard]] bool begin_interval(Lane* lane);
  // Takes the segment that the lane has decoded. True: it has begun the next one of its interval.
  [[nodiscard]] bool take_segment(Lane* lane);
  // All intervals have been decoded, or given up.
  [[nodiscard]] bool done() const {
    return num_open_ == 0 && (failed_ || next_interval_ == intervals_.size());
  }
  [[nodiscard]] bool failed() const { return failed_; }
  // Intervals were taken from where the image says they are, which may have been the failure.
  [[nodiscard]] bool has_stated_sizes() const { return sizes_are_stated_; }

  // When done: pixels [left, left + width) of row y of the image, which lies in the region, to
  // planes[0 ...] (one of grey, or red, green, blue); kRowSlack bytes behind them may be written,
  // too.
  void row(int y, uint8_t* const* planes);

  // Bytes that the region's samples take.
  [[nodiscard]] size_t num_bytes() const { return num_bytes_; }
  // Gives back memory beyond max_bytes: what large images have needed.
  void trim(size_t max_bytes);

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

    // Where the y-th row of blocks begins, of those that are decoded.
    [[nodiscard]] uint8_t* block_row(int y) { return samples.data() + y * 8 * stride; }
    // Row y of the component, indexed by sample of the component.
    [[nodiscard]] const uint8_t* row(int y) const {
      return samples.data() + (y - top) * stride - left;
    }
  };

  struct Interval {
    int64_t number;
    uint32_t begin, end;  // bytes of the entropy-coded data, up to the marker
    int64_t first_mcu;
    int64_t end_mcu;  // behind the last that is needed
    bool is_whole;    // up to its last
  };
  static constexpr size_t kPrefetched = 8;  // intervals whose bytes are asked for ahead

  // MCUs of a segment that lie in one row of the image.
  struct McuRun {
    int first, num_mcus;  // in the segment
    int x, y;             // place of the first in the image
  };

  void lay_out(const JpegHeader& header, const Region& region);
  void lay_out_plane(const JpegHeader& header, size_t component);
  [[nodiscard]] bool find_intervals(const JpegHeader& header, const uint8_t* bytes, size_t size,
                                    bool all);
  void list_intervals(int64_t num_intervals);
  [[nodiscard]] bool has_markers(const Interval& interval) const;
  void prefetch(const Interval& interval) const;
  [[nodiscard]] int64_t next_needed(int64_t mcu) const;
  [[nodiscard]] int64_t needed_end(int64_t begin, int64_t end) const;
  [[nodiscard]] bool sum_dc(Lane* lane);
  template <typename Handle>
  void for_rows(const Lane& lane, const Handle& handle) const;
  void transform(Lane* lane);
  void transform_run(int16_t* blocks, int mcu_y, int mcu_x, int num_mcus);
  const uint8_t* upsampled_row(Plane& plane, int y);

  ScanTables tables_;
  JpegColour colour_ = JpegColour::kGrey;
  Region region_;
  int mcus_wide_ = 0;
  int64_t num_mcus_ = 0;
  int first_mcu_x_ = 0, end_mcu_x_ = 0, first_mcu_y_ = 0, end_mcu_y_ = 0;  // MCUs the region needs
  size_t num_components_ = 0;
  std::array<Plane, 3> planes_{};
  size_t num_bytes_ = 0;
  std::vector<uint16_t> sums_;

  const uint8_t* data_ = nullptr;  // entropy-coded
  size_t data_size_ = 0;
  std::vector<uint32_t> markers_;  // where intervals end in it
  bool decode_all_ = false;        // not only what is needed
  int64_t interval_mcus_ = 0;
  int64_t total_intervals_ = 0;
  bool sizes_are_stated_ = false;    // markers_ is what the image says, not what was found
  std::vector<Interval> intervals_;  // to decode
  size_t next_interval_ = 0;
  int num_open_ = 0;  // intervals that lanes are decoding
  bool failed_ = false;
};

}  // namespace imseq
