// Entropy decoding of several restart intervals, or images, in turn in one thread.
//
// Huffman decoding waits: each symbol's place depends on the length of the one before. Several lanes,
// each with an interval of its own, hide that. A lane decodes a segment (some MCUs of its interval) and
// then asks the work for the next, handing over the segment's coefficients while they are in the L1
// cache. Neither the end of a block nor that of a component is a branch: what to look up next is a
// table's place, found by the position in the segment.
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
// Behind a segment's end lanes may wait, and store zeros.
constexpr int kSegmentSlack = 128;

// Bytes of an interval without stuffing that a lane holds at once. A segment takes 8 KB at most (31
// bits a symbol): so much is always readable, though it may be another segment's leavings.
constexpr size_t kMaxSegmentBytes = kSegmentValues * HuffmanTable::kMaxSymbolBits / 8 + 64;
constexpr size_t kLaneBytes = 4 * kMaxSegmentBytes;

// How one image's segments are decoded; fixed while lanes work on it.
struct ScanTables {
  uint64_t id = 0;                  // no other image's are called the same
  const FlatEntry* flat = nullptr;  // null: entries of `tables`
  HuffmanTables tables;
  int mcu_blocks = 0;
  int segment_mcus = 0;
  std::array<uint8_t, 10> component_of_block{};
  std::array<uint16_t, 3 * 64> block_places{};  // component, zigzag index -> place of the entries
  // Position in a segment -> the same.
  std::array<uint16_t, kSegmentValues + kSegmentSlack> places{};

  // True where flat tables serve the image.
  // may_build_flat: no other image is using flat tables.
  void prepare(const JpegHeader& header, FlatTables* flat_tables, bool may_build_flat,
               uint64_t new_id);
};

struct alignas(64) Lane {
  // ---- what the loop works on ----
  uint64_t bits;  // the next ones, left-aligned; the lowest bit set is no data but marks their end
  const uint8_t* next;  // bits began here, at the last refill, with the first bits taken
  uint32_t at;          // position in the segment
  uint32_t end;         // of the segment
  const HuffmanEntry* entries;
  // Arrays of C: of std::array's functions the linker might choose one for another processor.
  alignas(64) int16_t coefficients[kSegmentValues + kSegmentSlack];  // zigzag; zeros
  alignas(64) uint16_t places[kSegmentValues + kSegmentSlack];

  bool active = false;  // has a segment to decode
  // ---- its interval ----
  const ScanTables* tables = nullptr;
  uint64_t tables_id = 0;
  bool failed;            // an anomaly was found
  bool sound;             // no marker between the bytes so far
  int64_t mcu, num_mcus;  // of the segment
  int64_t end_mcu;        // of the interval, or of what is wanted of it
  bool is_whole;          // of the interval
  std::array<int, 3> predictions;
  const uint8_t* source;  // bytes of the interval that are still stuffed
  const uint8_t* source_end;
  size_t num_bytes;  // valid ones in `bytes`
  alignas(64) uint8_t bytes[kLaneBytes + kMaxSegmentBytes + kRowSlack];

  // Begins with MCU `mcu` of [source, source_end); end_mcu is where to stop.
  void begin_interval(const ScanTables& scan_tables, const uint8_t* begin, const uint8_t* end_bytes,
                      int64_t first_mcu, int64_t last_mcu);
  // Begins the next segment of the interval.
  void begin_segment();
  // Waits. flat: as the other lanes have it; entries: tables of any image.
  void park(const FlatEntry* flat, const HuffmanEntry* any_entries);
  // Bits of the interval that are left; negative: more were taken than there are. Before its last
  // segment, at least so many.
  [[nodiscard]] ptrdiff_t bits_left() const;
  [[nodiscard]] bool has_all_bytes() const { return source == source_end; }

 private:
  void use_tables(const ScanTables& scan_tables);
  void take_bytes();
  void set_end(uint32_t position);
};

// What lanes decode.
class LaneWork {
 public:
  // The lane's segment is decoded: takes its coefficients, leaving zeros, and begins another one.
  // False: there is none, and the lane is parked.
  [[nodiscard]] virtual bool advance(Lane* lane) = 0;

 protected:
  ~LaneWork() = default;
};

// Runs num_lanes lanes until advance() gives them nothing more. All are of one kind: decoded with the
// same flat tables, or with tables of their images. Each must have a segment or be parked.
using LaneLoop = void (*)(Lane* lanes, const FlatEntry* flat, LaneWork* work);

struct LaneKernels {
  LaneLoop image, flat;
  int num_image_lanes, num_flat_lanes;
};
[[nodiscard]] const LaneKernels& lane_kernels(CpuLevel level);
extern const LaneKernels kLaneKernelsPortable, kLaneKernelsAvx2;

// The symbol at lane.at, by the rules in full: for those that no entry tells of. Updates bits, next
// and at; an anomaly sets failed and goes to the segment's end.
void decode_symbol_slowly(Lane* lane);

}  // namespace imseq
