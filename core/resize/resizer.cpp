#include "resize/resizer.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace imseq {

void Resizer::begin(const imseq_view& view, int out_height, int out_width, int num_planes,
                    int filter, int passes) {
  kernels_ =
      kernels_of_level<&kResizePortable, &kResizeAvx2, &kResizeAvx512, &kResizeNeon>(cpu_level());
  num_planes_ = num_planes;
  out_height_ = out_height;
  out_width_ = out_width;
  first_row_ = std::clamp(-view.window_top, 0, out_height);
  end_row_ = std::clamp(view.resized_height - view.window_top, first_row_, out_height);
  first_column_ = std::clamp(-view.window_left, 0, out_width);
  end_column_ = std::clamp(view.resized_width - view.window_left, first_column_, out_width);
  source_ = Region{};
  num_added_ = 0;
  flips_ = can_write_rows_ = false;
  zeros_.reserve(static_cast<size_t>(out_width) + kRowSlack);
  if (first_row_ == end_row_ || first_column_ == end_column_) {
    first_row_ = end_row_ = 0;
    num_ready_ = out_height;
    return;
  }
  num_ready_ = first_row_;
  vertical_.compute(view.height, view.resized_height, view.window_top + first_row_,
                    view.window_top + end_row_, filter);
  horizontal_.compute(view.width, view.resized_width, view.window_left + first_column_,
                      view.window_left + end_column_, filter);
  source_ = {view.top + vertical_.first_input(), view.left + horizontal_.first_input(),
             vertical_.end_input() - vertical_.first_input(),
             horizontal_.end_input() - horizontal_.first_input()};
  const int lost_height = view.height - view.resized_height;
  const int lost_width = view.width - view.resized_width;
  vertical_first_ =
      passes == IMSEQ_PASSES_PILLOW_13 && lost_height > 0 && lost_height > 2 * lost_width;
  flips_ = view.flip != 0 && !horizontal_.identity();
  // Where the vertical pass has nothing to do it is the last one.
  can_write_rows_ = end_row_ - first_row_ == out_height &&
                    end_column_ - first_column_ == out_width &&
                    static_cast<size_t>(out_width) >= Columns::kMinWidth && !vertical_.identity();
  lay_out_rows();
  make_plans();
}

void Resizer::lay_out_rows() {
  const auto planes = static_cast<size_t>(num_planes_);
  // A window of 64 bytes that starts at the last input, and what pads a group of taps before it.
  constexpr size_t kBehind = kRowSlack + AxisWeights::kTapGroup;
  source_stride_ = round_up(static_cast<size_t>(source_.width) + kRowSlack, 64);
  resized_stride_ = static_cast<size_t>(end_column_ - first_column_);
  row_bytes_ = round_up(planes * (stores_source_rows() ? source_stride_ : resized_stride_), 64);
  ring_rows_ = std::bit_ceil(static_cast<unsigned>(vertical_.max_taps()));
  rows_.reserve(row_bytes_ * static_cast<size_t>(ring_rows_) + kBehind);
  row_.reserve(planes * source_stride_ + kBehind);
  output_.reserve(planes * std::max(source_stride_, resized_stride_) + 64 + kBehind);
  padded_.reserve(planes * static_cast<size_t>(out_width_) + kRowSlack);
  grow(&tap_rows_, static_cast<size_t>(ring_rows_) + AxisWeights::kTapGroup);
}

void Resizer::make_plans() {
  if (!vertical_.identity()) {
    const AxisWeights& axis = vertical_.axis();
    kernels_->plan_vertically(axis, vertical_plan_.reserve(kernels_->vertical_plan_bytes(axis)));
  }
  if (!horizontal_.identity()) {
    const AxisWeights& axis = horizontal_.axis();
    horizontal_kernels_ = kernels_->can_resize_horizontally(axis) ? kernels_ : &kResizePortable;
    const size_t bytes = horizontal_kernels_->horizontal_plan_bytes(axis);
    horizontal_kernels_->plan_horizontally(axis, horizontal_plan_.reserve(bytes));
  }
}

std::array<uint8_t*, 3> Resizer::source_planes() {
  uint8_t* first = stores_source_rows() ? stored_row(num_added_) : row_.data();
  return {first, first + source_stride_, first + 2 * source_stride_};
}

void Resizer::add_row() {
  if (!stores_source_rows()) {
    resize_horizontally(row_.data(), stored_row(num_added_), resized_stride_);
  }
  ++num_added_;
  const auto is_ready = [this](int y) {
    const int i = y - first_row_;
    return vertical_.first_tap(i) + vertical_.num_taps(i) <= num_added_;
  };
  while (num_ready_ < end_row_ && is_ready(num_ready_)) ++num_ready_;
  if (num_ready_ == end_row_) num_ready_ = out_height_;
}

void Resizer::resize_horizontally(const uint8_t* in, uint8_t* out, size_t out_stride) const {
  const auto pass = num_planes_ == 1 ? horizontal_kernels_->horizontal_of_one
                                     : horizontal_kernels_->horizontal_of_three;
  pass(horizontal_.axis(), horizontal_plan_.data(), in, source_stride_, flips_, out, out_stride);
}

void Resizer::resize_vertically(int i, uint8_t* out, size_t out_stride) {
  const int first = vertical_.first_tap(i);
  const auto num_taps = static_cast<size_t>(vertical_.num_taps(i));
  size_t tap = 0;
  for (; tap < num_taps; ++tap) tap_rows_[tap] = stored_row(first + static_cast<int>(tap));
  for (; tap % AxisWeights::kTapGroup != 0; ++tap) tap_rows_[tap] = tap_rows_[0];
  const auto resize_columns = [&](const Columns& columns, uint8_t* to) {
    kernels_->vertical(vertical_.axis(), vertical_plan_.data(), i, tap_rows_.data(), columns, to,
                       out_stride);
  };
  const auto num_planes = static_cast<size_t>(num_planes_);
  if (stores_source_rows()) {
    const size_t width = std::max(static_cast<size_t>(source_.width), Columns::kMinWidth);
    for (size_t p = 0; p < num_planes; ++p) {
      resize_columns({p * source_stride_, width, 1}, out + p * out_stride);
    }
  } else if (out_stride == resized_stride_) {  // all planes are one
    resize_columns({0, std::max(num_planes * resized_stride_, Columns::kMinWidth), 1}, out);
  } else {
    resize_columns({0, resized_stride_, num_planes_}, out);
  }
}

void Resizer::write_row(int y, uint8_t* out, size_t out_stride) {
  const int i = y - first_row_;
  if (!vertical_first_ || horizontal_.identity()) return resize_vertically(i, out, out_stride);
  resize_vertically(i, row_.data(), source_stride_);
  resize_horizontally(row_.data(), out, out_stride);
}

std::array<const uint8_t*, 3> Resizer::output_row(int y) {
  if (y < first_row_ || y >= end_row_) return {zeros_.data(), zeros_.data(), zeros_.data()};
  const size_t stride = horizontal_.identity() ? source_stride_ : resized_stride_;
  const uint8_t* row = output_.data();
  if (vertical_.identity()) {
    row = stored_row(vertical_.first_tap(y - first_row_));
  } else {
    write_row(y, output_.data(), stride);
  }
  std::array<const uint8_t*, 3> planes{};
  for (size_t p = 0; p < static_cast<size_t>(num_planes_); ++p) {
    planes[p] = row + p * stride;
    if (end_column_ - first_column_ != out_width_) planes[p] = padded(planes[p], p);
  }
  return planes;
}

const uint8_t* Resizer::padded(const uint8_t* row, size_t plane) {
  const auto width = static_cast<size_t>(end_column_ - first_column_);
  const auto before = static_cast<size_t>(flips_ ? out_width_ - end_column_ : first_column_);
  const auto out_width = static_cast<size_t>(out_width_);
  uint8_t* out = padded_.data() + plane * out_width;
  std::memset(out, 0, before);
  std::memcpy(out + before, row, width);
  std::memset(out + before + width, 0, out_width - before - width);
  return out;
}

}  // namespace imseq
