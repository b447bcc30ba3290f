#include "jpeg/region.h"

#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/memory.h"
#include "jpeg/colour.h"
#include "jpeg/markers.h"

namespace imseq {

bool RegionDecoder::open(const JpegHeader& header, const uint8_t* bytes, size_t size,
                         const Region& region, Soundness soundness, FlatTables* flat_tables,
                         bool may_build_flat, uint64_t id) {
  data_ = bytes + header.entropy_offset;
  data_size_ = size - header.entropy_offset;
  // A block takes at least two bits: refuse impossible sizes before allocating.
  if (data_size_ > UINT32_MAX || header.num_mcus() > static_cast<int64_t>(data_size_) * 4) {
    return false;
  }
  lay_out(header, region);
  decode_all_ = soundness == Soundness::kAll;
  failed_ = false;
  num_open_ = 0;
  if (!find_intervals(header, bytes, size, soundness != Soundness::kRegion)) return false;
  tables_.prepare(header, flat_tables, may_build_flat, id);
  return true;
}

// all: also checks the markers of intervals that are not needed.
bool RegionDecoder::find_intervals(const JpegHeader& header, const uint8_t* bytes, size_t size,
                                   bool all) {
  interval_mcus_ = header.interval_mcus();
  total_intervals_ = header.num_intervals();
  const int64_t last_needed = int64_t{end_mcu_y_ - 1} * mcus_wide_ + end_mcu_x_ - 1;
  const int64_t num_needed = last_needed / interval_mcus_ + 1;
  const int64_t num_markers = all ? total_intervals_ : num_needed;
  // Every interval takes a marker of two bytes.
  if (static_cast<int64_t>(data_size_ / 2) < num_markers) return false;
  grow(&markers_, static_cast<size_t>(num_markers));
  // begin_interval() checks the sizes that an image states.
  sizes_are_stated_ = !all && read_markers(header, bytes, size, num_markers, markers_.data());
  if (!sizes_are_stated_ &&
      !find_markers(header, data_, data_size_, num_markers, markers_.data())) {
    return false;
  }
  list_intervals(decode_all_ ? total_intervals_ : num_needed);
  return true;
}

// Lists those of the first num_intervals intervals that are to be decoded.
void RegionDecoder::list_intervals(int64_t num_intervals) {
  intervals_.clear();
  next_interval_ = 0;
  const int64_t first = decode_all_ ? 0 : next_needed(0) / interval_mcus_;
  for (int64_t number = first; number < num_intervals; ++number) {
    const int64_t first_mcu = number * interval_mcus_;
    const int64_t last_mcu = std::min(first_mcu + interval_mcus_, num_mcus_);
    const int64_t end_mcu = decode_all_ ? last_mcu : needed_end(first_mcu, last_mcu);
    if (end_mcu == first_mcu) continue;
    const uint32_t begin = number == 0 ? 0 : markers_[static_cast<size_t>(number - 1)] + 2;
    const uint32_t end = markers_[static_cast<size_t>(number)];
    intervals_.push_back({number, begin, end, first_mcu, end_mcu, end_mcu == last_mcu});
    if (intervals_.size() <= kPrefetched) prefetch(intervals_.back());
  }
}

bool RegionDecoder::begin_interval(Lane* lane) {
  if (failed_ || next_interval_ == intervals_.size()) return false;
  const Interval& interval = intervals_[next_interval_++];
  if (sizes_are_stated_ && !has_markers(interval)) {
    failed_ = true;
    return false;
  }
  if (next_interval_ + kPrefetched <= intervals_.size()) {
    prefetch(intervals_[next_interval_ + kPrefetched - 1]);
  }
  lane->begin_interval(tables_, data_ + interval.begin, data_ + interval.end, interval.first_mcu,
                       interval.end_mcu);
  lane->is_whole = interval.is_whole;
  ++num_open_;
  return true;
}

// Whether the right markers lie before and behind the interval.
bool RegionDecoder::has_markers(const Interval& interval) const {
  const bool is_last = interval.number + 1 == total_intervals_;
  return ends_interval(data_ + interval.end, interval.number, is_last) &&
         (interval.number == 0 ||
          ends_interval(data_ + interval.begin - 2, interval.number - 1, false));
}

// Prefetches the bytes of an interval that is decoded soon.
void RegionDecoder::prefetch(const Interval& interval) const {
  constexpr uint32_t kLine = 64, kMost = 16 * kLine;
  const uint32_t end = std::min(interval.end + 2, interval.begin + kMost);
  for (uint32_t at = interval.begin; at < end; at += kLine) __builtin_prefetch(data_ + at);
}

bool RegionDecoder::take_segment(Lane* lane) {
  const ptrdiff_t bits_left = lane->bits_left();
  const int64_t end_mcu = lane->mcu + lane->num_mcus;
  const bool interval_ends = end_mcu == lane->end_mcu && lane->is_whole;
  if (lane->failed || !lane->sound || bits_left < 0 || !sum_dc(lane)) failed_ = true;
  // Only the padding of the last byte may be left.
  if (interval_ends && (!lane->has_all_bytes() || bits_left >= 8)) failed_ = true;
  if (failed_) {
    std::memset(lane->coefficients, 0, lane->end * sizeof(int16_t));
    --num_open_;
    return false;
  }
  transform(lane);
  if (end_mcu < lane->end_mcu) {
    lane->begin_segment();
    return true;
  }
  --num_open_;
  return false;
}

// Calls handle(run, first, end) for the segment's MCUs in each row of MCUs; [first, end) are those
// of the run that the region needs.
template <typename Handle>
void RegionDecoder::for_rows(const Lane& lane, const Handle& handle) const {
  const auto num_mcus = static_cast<int>(lane.num_mcus);
  const auto mcu = static_cast<uint32_t>(lane.mcu), width = static_cast<uint32_t>(mcus_wide_);
  McuRun run{0, 0, static_cast<int>(mcu % width), static_cast<int>(mcu / width)};
  for (; run.first < num_mcus; run.first += run.num_mcus, run.x = 0, ++run.y) {
    run.num_mcus = std::min(num_mcus - run.first, mcus_wide_ - run.x);
    const bool needed = run.y >= first_mcu_y_ && run.y < end_mcu_y_;
    const int first = needed ? std::clamp(first_mcu_x_ - run.x, 0, run.num_mcus) : 0;
    const int end = needed ? std::clamp(end_mcu_x_ - run.x, first, run.num_mcus) : 0;
    handle(run, first, end);
  }
}

// Adds up DC differences. False: a sum exceeds 16 bits, which no sound image has and libjpeg-turbo
// would cut off.
bool RegionDecoder::sum_dc(Lane* lane) {
  int16_t* block = lane->coefficients;
  int overflow = 0;
  for (int64_t i = 0; i < lane->num_mcus; ++i) {
    for (size_t c = 0; c < num_components_; ++c) {
      int prediction = lane->predictions[c];
      for (int b = planes_[c].mcu_width * planes_[c].mcu_height; b > 0; --b, block += 64) {
        prediction += block[0];
        block[0] = static_cast<int16_t>(prediction);
        overflow |= prediction ^ block[0];
      }
      lane->predictions[c] = prediction;
    }
  }
  return overflow == 0;
}

// Transforms those of the segment's blocks that the region needs to samples.
void RegionDecoder::transform(Lane* lane) {
  for_rows(*lane, [&](const McuRun& run, int first, int end) {
    const size_t mcu_values = static_cast<size_t>(tables_.mcu_blocks) * 64;
    int16_t* const blocks = lane->coefficients + static_cast<size_t>(run.first) * mcu_values;
    const auto clear = [&](int from, int to) {
      std::memset(blocks + static_cast<size_t>(from) * mcu_values, 0,
                  static_cast<size_t>(to - from) * mcu_values * sizeof(int16_t));
    };
    clear(0, first);
    if (first < end) {
      transform_run(blocks + static_cast<size_t>(first) * mcu_values, run.y - first_mcu_y_,
                    run.x + first - first_mcu_x_, end - first);
    }
    clear(end, run.num_mcus);
  });
}

// Transforms MCUs of one row; mcu_y and mcu_x count from the region's first.
void RegionDecoder::transform_run(int16_t* blocks, int mcu_y, int mcu_x, int num_mcus) {
  const ptrdiff_t mcu_values = ptrdiff_t{tables_.mcu_blocks} * 64;
  const IdctKernel idct = idct_kernel(cpu_level());
  for (size_t c = 0; c < num_components_; ++c) {
    Plane& plane = planes_[c];
    uint8_t* out = plane.block_row(mcu_y * plane.mcu_height) + mcu_x * plane.mcu_width * 8;
    for (int y = 0; y < plane.mcu_height; ++y, out += 8 * plane.stride) {
      idct(blocks, plane.mcu_width, mcu_values, num_mcus * plane.mcu_width, plane.idct, out,
           plane.stride);
      blocks += plane.mcu_width * 64;
    }
  }
}

void RegionDecoder::trim(size_t max_bytes) {
  size_t sum = markers_.size() * sizeof(uint32_t) + intervals_.capacity() * sizeof(Interval);
  for (const Plane& plane : planes_) sum += plane.samples.size();
  if (sum <= max_bytes) return;
  for (Plane& plane : planes_) plane.samples = {};
  markers_ = {};
  intervals_ = {};
}

// Finds the MCUs that the region needs and sizes the planes for them.
void RegionDecoder::lay_out(const JpegHeader& header, const Region& region) {
  colour_ = header.colour;
  region_ = region;
  mcus_wide_ = header.mcus_wide;
  num_mcus_ = header.num_mcus();
  num_components_ = static_cast<size_t>(header.num_components);
  first_mcu_x_ = header.mcus_wide;
  first_mcu_y_ = header.mcus_high;
  end_mcu_x_ = end_mcu_y_ = 0;
  num_bytes_ = 0;
  const int right = region.left + region.width - 1, bottom = region.top + region.height - 1;
  for (size_t c = 0; c < num_components_; ++c) {
    const JpegComponent& component = header.components[c];
    const int h = num_components_ == 1 ? 1 : header.max_h_sampling / component.h_sampling;
    const int v = num_components_ == 1 ? 1 : header.max_v_sampling / component.v_sampling;
    planes_[c].h_factor = h;
    planes_[c].v_factor = v;
    // Smooth upsampling also reads the neighbouring samples.
    const int x_margin = h > 1 ? 1 : 0, y_margin = v > 1 ? 1 : 0;
    const int mcu_columns = 8 * component.mcu_width, mcu_rows = 8 * component.mcu_height;
    const int x0 = std::max(region.left / h - x_margin, 0);
    const int y0 = std::max(region.top / v - y_margin, 0);
    const int x1 = std::min(right / h + x_margin, component.width - 1);
    const int y1 = std::min(bottom / v + y_margin, component.height - 1);
    first_mcu_x_ = std::min(first_mcu_x_, x0 / mcu_columns);
    first_mcu_y_ = std::min(first_mcu_y_, y0 / mcu_rows);
    end_mcu_x_ = std::max(end_mcu_x_, x1 / mcu_columns + 1);
    end_mcu_y_ = std::max(end_mcu_y_, y1 / mcu_rows + 1);
  }
  for (size_t c = 0; c < num_components_; ++c) lay_out_plane(header, c);
}

void RegionDecoder::lay_out_plane(const JpegHeader& header, size_t c) {
  const JpegComponent& component = header.components[c];
  Plane& plane = planes_[c];
  const int h = plane.h_factor, v = plane.v_factor;
  plane.width = component.width;
  plane.height = component.height;
  plane.mcu_width = component.mcu_width;
  plane.mcu_height = component.mcu_height;
  plane.idct = IdctTable(header.quant(static_cast<int>(c)));
  plane.left = first_mcu_x_ * 8 * component.mcu_width;
  plane.top = first_mcu_y_ * 8 * component.mcu_height;
  plane.stride = static_cast<ptrdiff_t>(end_mcu_x_ - first_mcu_x_) * 8 * component.mcu_width;
  const ptrdiff_t rows =
      static_cast<ptrdiff_t>(end_mcu_y_ - first_mcu_y_) * 8 * component.mcu_height;
  const size_t num_bytes = static_cast<size_t>(plane.stride * rows) + kRowSlack;
  num_bytes_ += num_bytes;
  grow(&plane.samples, num_bytes);
  // libjpeg-turbo's choice (jdsample.c, jinit_upsampler).
  const bool smooth = h == 2 && component.width > 2;
  plane.upsampling = h == 1 && v == 1   ? Upsampling::kNone
                     : smooth && v == 1 ? Upsampling::kH2V1
                     : smooth && v == 2 ? Upsampling::kH2V2
                     : h == 1 && v == 2 ? Upsampling::kH1V2
                                        : Upsampling::kReplicate;
  if (plane.upsampling == Upsampling::kNone) return;
  const size_t num_samples = static_cast<size_t>(region_.width / h) + 2;
  grow(&plane.pixels, num_samples * static_cast<size_t>(h) + kRowSlack);
  grow(&sums_, num_samples + 2 + kRowSlack);
}

// The first MCU at or behind `mcu` that the region needs; num_mcus_ if there is none.
int64_t RegionDecoder::next_needed(int64_t mcu) const {
  int64_t y = mcu / mcus_wide_, x = mcu % mcus_wide_;
  if (x >= end_mcu_x_) {
    ++y;
    x = 0;
  }
  if (y < first_mcu_y_) {
    y = first_mcu_y_;
    x = 0;
  }
  if (y >= end_mcu_y_) return num_mcus_;
  return y * mcus_wide_ + std::max<int64_t>(x, first_mcu_x_);
}

// Behind the last MCU of [begin, end) that the region needs; begin if there is none.
int64_t RegionDecoder::needed_end(int64_t begin, int64_t end) const {
  int64_t y = (end - 1) / mcus_wide_, x = (end - 1) % mcus_wide_;
  if (x < first_mcu_x_) {
    --y;
    x = mcus_wide_ - 1;
  }
  if (y >= end_mcu_y_) {
    y = end_mcu_y_ - 1;
    x = mcus_wide_ - 1;
  }
  if (y < first_mcu_y_) return begin;
  return std::max(begin, y * mcus_wide_ + std::min<int64_t>(x, end_mcu_x_ - 1) + 1);
}

void RegionDecoder::row(int y, uint8_t* const* planes) {
  const ColourKernels& kernels = colour_kernels(cpu_level());
  const auto width = static_cast<size_t>(region_.width);
  std::array<const uint8_t*, 3> in{};
  for (size_t c = 0; c < num_components_; ++c) in[c] = upsampled_row(planes_[c], y);
  if (colour_ == JpegColour::kYCbCr) {
    kernels.ycc_to_rgb(in[0], in[1], in[2], region_.width, planes[0], planes[1], planes[2]);
    return;
  }
  for (size_t c = 0; c < num_components_; ++c) std::memcpy(planes[c], in[c], width);
}

// Returns row y of the image, of one component, from the region's left edge on.
const uint8_t* RegionDecoder::upsampled_row(Plane& plane, int y) {
  const int own_y = y / plane.v_factor;
  const uint8_t* own = plane.row(own_y);
  const ColourKernels& kernels = colour_kernels(cpu_level());
  if (plane.upsampling == Upsampling::kNone) return own + region_.left;
  const int begin = region_.left / plane.h_factor;
  const int end = (region_.left + region_.width - 1) / plane.h_factor + 1;
  uint8_t* out = plane.pixels.data();
  // The other row that smooth upsampling needs; at the image's edge the same row.
  const bool below = y % plane.v_factor != 0;
  const int far_y = std::clamp(below ? own_y + 1 : own_y - 1, 0, plane.height - 1);
  switch (plane.upsampling) {
    case Upsampling::kH2V1:
      kernels.upsample_h2v1(own, begin, end, plane.width, out);
      break;
    case Upsampling::kH2V2:
      kernels.upsample_h2v2(own, plane.row(far_y), begin, end, plane.width, sums_.data(), out);
      break;
    case Upsampling::kH1V2:
      kernels.upsample_h1v2(own + begin, plane.row(far_y) + begin, below, end - begin, out);
      break;
    default:
      kernels.replicate(own + begin, end - begin, plane.h_factor, out);
  }
  return out + (region_.left - begin * plane.h_factor);
}

}  // namespace imseq
