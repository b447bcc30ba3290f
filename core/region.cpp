#include "region.h"

#include <algorithm>
#include <cstring>

#include "colour.h"

namespace imseq {

namespace {

template <typename T>
void grow(std::vector<T>* memory, size_t size) {
  if (memory->size() < size) memory->resize(size);
}

}  // namespace

bool RegionDecoder::decode(const JpegHeader& header, const uint8_t* bytes, size_t size,
                           const Region& region, Soundness soundness) {
  // A block takes two bits at least; what is shorter need not be given memory.
  if (header.num_mcus() > static_cast<int64_t>(size - header.entropy_offset) * 4) return false;
  lay_out(header, region);
  const bool all = soundness == Soundness::kAll;
  const auto wanted = [&](int64_t first_mcu, int64_t end_mcu) {
    return all || next_needed(first_mcu) < end_mcu;
  };
  if (!intervals_.read(header, bytes, size, wanted)) return false;
  tables_.build(header);
  for (const Interval& interval : intervals_.intervals()) {
    if (!decode_interval(interval, all)) return false;
  }
  return true;
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
  const int right = region.left + region.width - 1, bottom = region.top + region.height - 1;
  for (size_t c = 0; c < num_components_; ++c) {
    const JpegComponent& component = header.components[c];
    const int h = num_components_ == 1 ? 1 : header.max_h_sampling / component.h_sampling;
    const int v = num_components_ == 1 ? 1 : header.max_v_sampling / component.v_sampling;
    // Smooth upsampling looks at one sample on either side, as far as there is one.
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
  const int h = num_components_ == 1 ? 1 : header.max_h_sampling / component.h_sampling;
  const int v = num_components_ == 1 ? 1 : header.max_v_sampling / component.v_sampling;
  plane.h_factor = h;
  plane.v_factor = v;
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
  grow(&plane.samples, static_cast<size_t>(plane.stride * rows));
  // libjpeg-turbo's choice (jdsample.c, jinit_upsampler).
  if (h == 1 && v == 1) {
    plane.upsampling = Upsampling::kNone;
  } else if (h == 2 && v == 1 && component.width > 2) {
    plane.upsampling = Upsampling::kH2V1;
  } else if (h == 2 && v == 2 && component.width > 2) {
    plane.upsampling = Upsampling::kH2V2;
  } else if (h == 1 && v == 2) {
    plane.upsampling = Upsampling::kH1V2;
  } else {
    plane.upsampling = Upsampling::kReplicate;
  }
  if (plane.upsampling == Upsampling::kNone) return;
  const size_t num_samples = static_cast<size_t>(region_.width / h) + 2;
  grow(&plane.pixels, num_samples * static_cast<size_t>(h));
  grow(&sums_, num_samples + 2);
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

bool RegionDecoder::decode_interval(const Interval& interval, bool to_end) {
  BitReader reader(interval.begin, interval.end);
  predictions_.fill(0);
  for (int64_t mcu = interval.first_mcu; mcu < interval.end_mcu;) {
    const int64_t needed = std::min(next_needed(mcu), interval.end_mcu);
    if (needed == interval.end_mcu && !to_end) return true;
    if (!skip_mcus(reader, needed - mcu)) return false;
    const int64_t run = std::min(end_mcu_x_ - needed % mcus_wide_, interval.end_mcu - needed);
    if (run > 0 && !decode_mcus(reader, needed, run)) return false;
    mcu = needed + std::max<int64_t>(run, 0);
  }
  return reader.bits_left() < 8;  // nothing but the padding of the last byte
}

bool RegionDecoder::skip_mcus(BitReader& reader, int64_t num_mcus) {
  for (int64_t i = 0; i < num_mcus; ++i) {
    for (size_t c = 0; c < num_components_; ++c) {
      const HuffmanTable& dc = tables_.dc(static_cast<int>(c));
      const HuffmanTable& ac = tables_.ac(static_cast<int>(c));
      for (int b = planes_[c].mcu_width * planes_[c].mcu_height; b > 0; --b) {
        if (decode_block<false>(reader, dc, ac, predictions_[c], nullptr, nullptr) < 0)
          return false;
        if (reader.overrun()) return false;
      }
    }
  }
  return true;
}

// MCUs of one row, all of which the region needs.
bool RegionDecoder::decode_mcus(BitReader& reader, int64_t mcu, int64_t num_mcus) {
  const auto mcu_y = static_cast<int>(mcu / mcus_wide_) - first_mcu_y_;
  const auto first_x = static_cast<int>(mcu % mcus_wide_) - first_mcu_x_;
  alignas(16) int16_t block[64];
  for (int mcu_x = first_x; mcu_x < first_x + static_cast<int>(num_mcus); ++mcu_x) {
    for (size_t c = 0; c < num_components_; ++c) {
      Plane& plane = planes_[c];
      const HuffmanTable& dc = tables_.dc(static_cast<int>(c));
      const HuffmanTable& ac = tables_.ac(static_cast<int>(c));
      for (int y = 0; y < plane.mcu_height; ++y) {
        uint8_t* out = plane.samples.data() + (mcu_y * plane.mcu_height + y) * 8 * plane.stride +
                       mcu_x * plane.mcu_width * 8;
        for (int x = 0; x < plane.mcu_width; ++x, out += 8) {
          std::memset(block, 0, sizeof(block));
          const int last =
              decode_block<true>(reader, dc, ac, predictions_[c], kNaturalOrder.data(), block);
          if (last < 0 || reader.overrun()) return false;
          idct_block(block, plane.idct, last, out, plane.stride);
        }
      }
    }
  }
  return true;
}

void RegionDecoder::row(int y, uint8_t* const* planes) {
  const auto width = static_cast<size_t>(region_.width);
  std::array<const uint8_t*, 3> in{};
  for (size_t c = 0; c < num_components_; ++c) in[c] = upsampled_row(planes_[c], y);
  if (colour_ == JpegColour::kYCbCr) {
    ycc_to_rgb(in[0], in[1], in[2], region_.width, planes[0], planes[1], planes[2]);
    return;
  }
  for (size_t c = 0; c < num_components_; ++c) std::memcpy(planes[c], in[c], width);
}

// Pixels of one component from the region's left edge on, in row y of the image.
const uint8_t* RegionDecoder::upsampled_row(Plane& plane, int y) {
  const int own_y = y / plane.v_factor;
  const uint8_t* own = plane.row(own_y);
  if (plane.upsampling == Upsampling::kNone) return own + region_.left;
  const int begin = region_.left / plane.h_factor;
  const int end = (region_.left + region_.width - 1) / plane.h_factor + 1;
  uint8_t* out = plane.pixels.data();
  // The other row that smooth upsampling mixes in; at the image's edge it is the same one.
  const bool below = y % plane.v_factor != 0;
  const int far_y = std::clamp(below ? own_y + 1 : own_y - 1, 0, plane.height - 1);
  switch (plane.upsampling) {
    case Upsampling::kH2V1:
      upsample_h2v1(own, begin, end, plane.width, out);
      break;
    case Upsampling::kH2V2:
      upsample_h2v2(own, plane.row(far_y), begin, end, plane.width, sums_.data(), out);
      break;
    case Upsampling::kH1V2:
      upsample_h1v2(own + begin, plane.row(far_y) + begin, below, end - begin, out);
      break;
    default:
      replicate(own + begin, end - begin, plane.h_factor, out);
  }
  return out + (region_.left - begin * plane.h_factor);
}

}  // namespace imseq
