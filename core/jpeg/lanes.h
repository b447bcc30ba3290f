// Entropy decoding of several restart intervals, or images, interleaved in one thread.
//
// Huffman decoding is bound by latency: each symbol begins where the one before ends. Several
// lanes, each with an interval of its own, hide it. A lane decodes a segment (some MCUs of its
// interval) and hands its coefficients over while they are in the L1 cache. The end of a block or
// component is not a branch: an array indexed by the position in the segment says which table comes
// next.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "jpeg/header.h"
#include "jpeg/lookup.h"

namespace imseq {

constexpr int kMaxLanes = 6;
constexpr int kSegmentBlocks = 32;
constexpr int kSegmentValues = 64 * kSegmentBlocks;
// Idle lanes advance behind a segment's end and store zeros there.
constexpr int kSegmentSlack = 128;

// Unstuffed bytes of an interval that a lane holds at once. A segment takes 8 KB at most (31 bits
// per symbol). Bytes behind num_bytes are stale but readable; bits_left() < 0 tells that they were
// used.
constexpr size_t kMaxSegmentBytes = kSegmentValues * HuffmanTable::kMaxSymbolBits / 8 + 64;
constexpr size_t kLaneBytes = 4 * kMaxSegmentBytes;

// How one image's segments are decoded; fixed while lanes work on it.
struct ScanTables {
  uint64_t id = 0;                  // unique
  const FlatEntry* flat = nullptr;  // null: `tables` are used
  HuffmanTables tables;
  int mcu_blocks = 0;
  int segment_mcus = 0;
  std::array<uint8_t, 10> component_of_block{};
  std::array<uint16_t, 3 * 64> block_places{};  // [component, zigzag index] where the table begins
  // [position in a segment] the same.
  std::array<uint16_t, kSegmentValues + kSegmentSlack> places{};

  // Chooses flat tables if they serve the image. may_build_flat: no other image is using flat
  // tables.
  void prepare(const JpegHeader& header, FlatTables* flat_tables, bool may_build_flat,
               uint64_t new_id);
};

struct alignas(64) Lane {
  // ---- what the loop works on ----
  uint64_t bits;  // the next bits, left-aligned; a one behind the last of them marks their end
  const uint8_t* next;  // where `bits` was loaded from at the last refill
  uint32_t at;          // position in the segment
  uint32_t end;         // of the segment
  const HuffmanEntry* entries;
  // C arrays: the linker could keep functions of std::array compiled for another processor.
  alignas(64) int16_t coefficients[kSegmentValues + kSegmentSlack];  // zigzag; zeros
  alignas(64) uint16_t places[kSegmentValues + kSegmentSlack];

  bool active = false;  // has a segment to decode
  // ---- its interval ----
  const ScanTables* tables = nullptr;
  uint64_t tables_id = 0;
  bool failed;            // an anomaly was found
  bool sound;             // no marker was found within the bytes so far
  int64_t mcu, num_mcus;  // of the segment
  int64_t end_mcu;        // where to stop: at the interval's end or before
  bool is_whole;          // end_mcu is the interval's end
  std::array<int, 3> predictions;
  const uint8_t* source;  // bytes of the interval still to be unstuffed
  const uint8_t* source_end;
  size_t num_bytes;  // of `bytes` that are valid
  alignas(64) uint8_t bytes[kLaneBytes + kMaxSegmentBytes + kRowSlack];

  // Begins an interval: its bytes, its first MCU, and the MCU to stop before.
  void begin_interval(const ScanTables& scan_tables, const uint8_t* begin, const uint8_t* end_bytes,
                      int64_t first_mcu, int64_t last_mcu);
  // Begins the next segment of the interval.
  void begin_segment();
  // Makes the lane idle. flat: as for the other lanes; any_entries: tables of any image.
  void park(const FlatEntry* flat, const HuffmanEntry* any_entries);
  // Bits of the interval that are left; negative: more were used than there are. While
  // has_all_bytes() is false, a lower bound.
  [[nodiscard]] ptrdiff_t bits_left() const;
  [[nodiscard]] bool has_all_bytes() const { return source == source_end; }

 private:
  void take_bytes();
  void set_end(uint32_t position);
};

// The source of the lanes' segments.
class LaneWork {
 public:
  // Called when the lane's segment is decoded: takes its coefficients, sets them to zero, and
  // begins another segment. False: there is none, and the lane is parked.
  [[nodiscard]] virtual bool advance(Lane* lane) = 0;

 protected:
  ~LaneWork() = default;
};

// Runs the lanes until advance() has no more segments. All lanes use the same flat tables, or all
// use the tables of their images. Each must have a segment or be parked.
using LaneLoop = void (*)(Lane* lanes, const FlatEntry* flat, LaneWork* work);

struct LaneKernels {
  LaneLoop image, flat;
  int num_image_lanes, num_flat_lanes;
};
[[nodiscard]] const LaneKernels& lane_kernels(CpuLevel level);
extern const LaneKernels kLanesAvx2;

// Decodes the symbol at lane.at without the look-up entries. Updates bits, next and at; on an
// anomaly sets failed and goes to the segment's end.
void decode_symbol_slowly(Lane* lane);

}  // namespace imseq
