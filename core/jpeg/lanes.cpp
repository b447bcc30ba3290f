#include "jpeg/lanes.h"

#include <algorithm>
#include <cstring>

#include "jpeg/lanes_loop.h"
#include "jpeg/markers.h"

namespace imseq {

namespace {

// An idle lane advances by one per step until the loop checks it, after this many steps at most.
constexpr int kWaits = 8;

uint16_t wait_place(const FlatEntry* flat) {
  return flat != nullptr ? FlatTables::wait_place() : HuffmanTables::wait_place();
}

}  // namespace

void ScanTables::prepare(const JpegHeader& header, FlatTables* flat_tables, bool may_build_flat,
                         uint64_t new_id) {
  id = new_id;
  flat = flat_tables->serve(header, may_build_flat) ? flat_tables->entries() : nullptr;
  tables.build(header);
  mcu_blocks = 0;
  for (int c = 0; c < header.num_components; ++c) {
    const JpegComponent& component = header.components[c];
    for (int b = component.mcu_width * component.mcu_height; b > 0; --b) {
      component_of_block[mcu_blocks++] = static_cast<uint8_t>(c);
    }
  }
  // Kernels transform four blocks at a time.
  segment_mcus = kSegmentBlocks / mcu_blocks;
  if (segment_mcus > 4) segment_mcus &= ~3;
  for (int c = 0; c < header.num_components; ++c) {
    for (int k = 0; k < 64; ++k) {
      block_places[c * 64 + k] = flat != nullptr ? flat_tables->place(c, k) : tables.place(c, k);
    }
  }
  for (size_t block = 0; block < places.size() / 64; ++block) {
    const size_t c = component_of_block[block % static_cast<size_t>(mcu_blocks)];
    std::copy_n(block_places.data() + c * 64, 64, places.data() + block * 64);
  }
}

// ---- a lane -------------------------------------------------------------------------------------

void Lane::begin_interval(const ScanTables& scan_tables, const uint8_t* begin,
                          const uint8_t* end_bytes, int64_t first_mcu, int64_t last_mcu) {
  if (tables_id != scan_tables.id) {
    tables = &scan_tables;
    tables_id = scan_tables.id;
    std::copy(scan_tables.places.begin(), scan_tables.places.end(), places);
    entries = scan_tables.tables.entries();
    end = 0;
  }
  active = true;
  failed = false;
  sound = true;
  source = begin;
  source_end = end_bytes;
  num_bytes = 0;
  next = bytes;
  mcu = first_mcu;
  num_mcus = 0;
  end_mcu = last_mcu;
  predictions.fill(0);
  take_bytes();
  bits = load_big_endian(next) | 1;
  begin_segment();
}

void Lane::begin_segment() {
  mcu += num_mcus;
  num_mcus = std::min<int64_t>(tables->segment_mcus, end_mcu - mcu);
  at = 0;
  set_end(static_cast<uint32_t>(num_mcus) * static_cast<uint32_t>(tables->mcu_blocks) * 64);
  const auto used = static_cast<size_t>(next - bytes);
  // While the interval has more bytes, the last segment left at least 64: all of `bits` is valid.
  if (!has_all_bytes() && num_bytes - std::min(num_bytes, used) < kMaxSegmentBytes) take_bytes();
}

// Moves the unused bytes to the front and appends more.
void Lane::take_bytes() {
  const size_t used = std::min(static_cast<size_t>(next - bytes), num_bytes);
  num_bytes -= used;
  std::memmove(bytes, bytes + used, num_bytes);
  next -= used;
  size_t size = std::min(static_cast<size_t>(source_end - source), kLaneBytes - num_bytes);
  // Do not separate a 0xFF from the byte that follows it.
  if (size > 0 && source + size != source_end && source[size - 1] == 0xFF) --size;
  num_bytes += marker_kernels(cpu_level()).unstuff(source, size, bytes + num_bytes, &sound);
  source += size;
}

// Makes the lane idle from `position` on, where an MCU would begin.
void Lane::set_end(uint32_t position) {
  std::copy_n(tables->places.data() + end, kWaits, places + end);
  end = position;
  std::fill_n(places + end, kWaits, wait_place(tables->flat));
}

void Lane::park(const FlatEntry* flat, const HuffmanEntry* any_entries) {
  active = false;
  tables_id = 0;
  entries = any_entries;
  at = end = kSegmentValues;
  std::fill_n(places + end, kWaits, wait_place(flat));
  next = bytes;
  bits = uint64_t{1} << 63;
}

ptrdiff_t Lane::bits_left() const {
  const auto used = (next - bytes) * 8 + __builtin_ctzll(bits);
  return static_cast<ptrdiff_t>(num_bytes) * 8 - used;
}

void decode_symbol_slowly(Lane* lane) {
  refill(&lane->bits, &lane->next);
  const ScanTables& scan = *lane->tables;
  const uint32_t block = lane->at / 64, k = lane->at % 64;
  const int c = scan.component_of_block[block % static_cast<uint32_t>(scan.mcu_blocks)];
  const HuffmanSymbol symbol = scan.tables.decode(c, k != 0, lane->bits);
  if (symbol.advance == kEndOfBlock) {
    lane->at = (block + 1) * 64;
  } else if (k + static_cast<uint32_t>(symbol.advance) <= 64) {
    lane->at += static_cast<uint32_t>(symbol.advance);
    lane->coefficients[lane->at - 1] = static_cast<int16_t>(symbol.value);
  } else {
    lane->failed = true;
    lane->at = lane->end;
    return;
  }
  lane->bits <<= symbol.length;
  refill(&lane->bits, &lane->next);
}

const LaneKernels& lane_kernels(CpuLevel level) {
  return *kernels_of_level<&kLaneKernels, &kLanesAvx2, &kLanesAvx2, &kLaneKernels>(level);
}

}  // namespace imseq
