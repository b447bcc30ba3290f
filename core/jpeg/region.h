// Decodes the pixels of a region of a baseline JPEG.
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

// How much of an image must be free of anomalies for its pixels to be accepted.
enum class Soundness {
  kRegion,   // what the region needs: for images known to be clean
  kMarkers,  // also the restart markers and the end marker, all of them
  kAll       // everything up to the end marker
};

// Decodes only what a region needs: the scan from its start to the region's last row, or, if there
// are restart markers, the intervals that touch the region; and the inverse DCT of the region's
// blocks only. Reuses its memory. Lanes do the entropy decoding:
//
//   if (!region.open(...)) ...;                           // left to Pillow
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

  // Gives the lane the first segment of the next interval. False: there is none.
  [[nodiscard]] bool begin_interval(Lane* lane);
  // Takes the segment that the lane has decoded. True: the lane has begun the next one.
  [[nodiscard]] bool take_segment(Lane* lane);
  // All intervals have been decoded or given up.
  [[nodiscard]] bool done() const {
    return num_open_ == 0 && (failed_ || next_interval_ == intervals_.size());
  }
  [[nodiscard]] bool failed() const { return failed_; }
  // The intervals' sizes are those that the image states; wrong ones may be why it failed.
  [[nodiscard]] bool has_stated_sizes() const { return sizes_are_stated_; }

  // When done: writes the region's pixels of row y of the image to planes[0 ...] (grey; or red,
  // green, blue), and up to kRowSlack bytes behind them.
  void row(int y, uint8_t* const* planes);

  // Memory of the region's samples.
  [[nodiscard]] size_t num_bytes() const { return num_bytes_; }
  // Frees the memory if it is more than max_bytes.
  void trim(size_t max_bytes);

 private:
  enum class Upsampling { kNone, kH2V1, kH2V2, kH1V2, kReplicate };

  // A component's samples in the region's MCUs.
  struct Plane {
    int h_factor, v_factor;  // pixels per sample
    Upsampling upsampling;
    int width, height;          // of the component
    int mcu_width, mcu_height;  // blocks
    int left, top;              // position of samples[0] in the component
    ptrdiff_t stride;
    std::vector<uint8_t> samples;
    std::vector<uint8_t> pixels;  // a row of them, upsampled
    IdctTable idct;

    // The y-th row of decoded blocks.
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
    int64_t end_mcu;  // behind the last that is decoded
    bool is_whole;    // end_mcu is the interval's end
  };
  static constexpr size_t kPrefetched = 8;  // number of intervals prefetched

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
  std::vector<uint32_t> markers_;  // where the intervals end in data_
  bool decode_all_ = false;        // also intervals outside the region
  int64_t interval_mcus_ = 0;
  int64_t total_intervals_ = 0;
  bool sizes_are_stated_ = false;    // markers_ was computed from the sizes that the image states
  std::vector<Interval> intervals_;  // to decode
  size_t next_interval_ = 0;
  int num_open_ = 0;  // intervals that lanes are decoding
  bool failed_ = false;
};

}  // namespace imseq
