// The loop of lanes.h. Included only by lanes*.cpp, each compiled for one kind of processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#include "jpeg/lanes.h"

namespace imseq {

namespace {

inline uint64_t load_big_endian(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  if constexpr (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) word = __builtin_bswap64(word);
  return word;
}

// The lowest bit becomes the one that marks the end. At least 56 bits are valid afterwards.
inline void refill(uint64_t* bits, const uint8_t** next) {
  const int taken = __builtin_ctzll(*bits);
  *next += taken >> 3;
  *bits = (load_big_endian(*next) | 1) << (taken & 7);
}

// The state of a lane that the loop keeps in registers.
struct Cursor {
  uint64_t bits;
  const uint8_t* next;
  uint32_t at;
};

inline Cursor load(const Lane& lane) { return {lane.bits, lane.next, lane.at}; }

inline void save(const Cursor& cursor, Lane* lane) {
  lane->bits = cursor.bits;
  lane->next = cursor.next;
  lane->at = cursor.at;
}

__attribute__((noinline)) Cursor step_slowly(Lane* lane, Cursor cursor) {
  save(cursor, lane);
  decode_symbol_slowly(lane);
  return load(*lane);
}

// Decodes a code of `length` bits whose run and number of extra bits are known, but not the extra
// bits, or not whether the run stays within the block.
__attribute__((always_inline)) inline void step_by_code(uint32_t length, uint32_t run,
                                                        uint32_t size, Lane* lane, Cursor* cursor) {
  if (__builtin_expect(cursor->at % 64 + run > 63, 0)) {
    *cursor = step_slowly(lane, *cursor);  // an anomaly
    return;
  }
  refill(&cursor->bits, &cursor->next);
  const uint64_t extra = cursor->bits << length;
  // EXTEND (T.81 F.2.2.1) without a branch: a first bit of 0 means a negative value.
  const int64_t sign = ~(static_cast<int64_t>(extra) >> 63);
  const auto magnitude = static_cast<int64_t>((extra ^ static_cast<uint64_t>(sign)) >> (64 - size));
  lane->coefficients[cursor->at + run] = static_cast<int16_t>((magnitude ^ sign) - sign);
  cursor->bits = extra << size;
  cursor->at += run + 1;
  refill(&cursor->bits, &cursor->next);
}

// ---- one symbol, by the image's own tables ----

struct ByImageTables {
  static constexpr int kSteps = 5;  // look-ups of 11 bits per refill
  static_assert(kSteps * HuffmanTable::kLookupBits <= 56);

  static void step(Lane* lane, const FlatEntry* /*flat*/, Cursor* cursor) {
    uint32_t entry;
    std::memcpy(&entry,
                lane->entries +
                    (lane->places[cursor->at] + (cursor->bits >> (64 - HuffmanTable::kLookupBits))),
                sizeof(entry));
    if (__builtin_expect((entry & 255) == 0, 0)) {
      if (entry == 0) {
        *cursor = step_slowly(lane, *cursor);
      } else {
        step_by_code(entry >> 8 & 63, entry >> 14 & 63, entry >> 20, lane, cursor);
      }
      return;
    }
    const uint32_t advance = entry >> 8 & 63;
    lane->coefficients[cursor->at + advance - 1] =
        static_cast<int16_t>(static_cast<int32_t>(entry) >> 20);
    cursor->bits <<= entry & 63;
    cursor->at = (cursor->at + advance) & ~(entry >> 14 & 63);
  }
};

// ---- up to four symbols, by flat tables ----

// Stores four values of one byte each as 16 bits.
inline void store_values(const FlatEntry* entry, int16_t* out) {
#if defined(__SSE4_1__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entry));
  _mm_storeh_pi(reinterpret_cast<__m64*>(out), _mm_castsi128_ps(_mm_cvtepi8_epi16(bytes)));
#else
  int8_t values[4];
  std::memcpy(values, reinterpret_cast<const uint8_t*>(entry) + 4, 4);
  for (int i = 0; i < 4; ++i) out[i] = values[i];
#endif
}

inline uint32_t third_byte(uint32_t value) {
#if defined(__BMI__)
  return _bextr_u32(value, 16, 8);  // one instruction, not three
#else
  return value >> 16 & 255;
#endif
}

struct ByFlatTables {
  static constexpr int kSteps = 4;
  static_assert(kSteps * FlatTables::kLookupBits <= 56);

  static void step(Lane* lane, const FlatEntry* flat, Cursor* cursor) {
    uint64_t index = lane->places[cursor->at] + (cursor->bits >> (64 - FlatTables::kLookupBits));
    uint32_t head;  // length, advance, first, mask
    std::memcpy(&head, flat + index, sizeof(head));
    if constexpr (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) head = __builtin_bswap32(head);
    if (__builtin_expect((head & 255) == 0, 0)) {
      if (head == 0) {
        *cursor = step_slowly(lane, *cursor);
      } else {
        step_by_code(head >> 8 & 255, head >> 16 & 255, head >> 24, lane, cursor);
      }
      return;
    }
    // Keeps compilers from computing the address first: two indexed loads are one instruction less.
    __asm__("" : "+r"(index));
    store_values(flat + index, lane->coefficients + cursor->at + third_byte(head));
    cursor->bits <<= head & 63;
    cursor->at = (cursor->at + (head >> 8 & 255)) & ~(head >> 24);
  }
};

// Enough lanes to hide the latency; more would need more registers than there are.
constexpr int kImageLanes = 4, kFlatLanes = 6;

template <typename Tables, int kLanes>
void run_lanes(Lane* lanes, const FlatEntry* flat, LaneWork* work) {
  Cursor cursors[kLanes];
  int num_active = 0;
#pragma GCC unroll 8
  for (int l = 0; l < kLanes; ++l) {
    cursors[l] = load(lanes[l]);
    num_active += lanes[l].active ? 1 : 0;
  }
  while (num_active > 0) {
#pragma GCC unroll 8
    for (int s = 0; s < Tables::kSteps; ++s) {
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) Tables::step(lanes + l, flat, cursors + l);
    }
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) {
      refill(&cursors[l].bits, &cursors[l].next);
      if (__builtin_expect(cursors[l].at >= lanes[l].end, 0)) {
        if (lanes[l].active) {
          save(cursors[l], lanes + l);
          if (!work->advance(lanes + l)) --num_active;
        }
        cursors[l] = load(lanes[l]);
      }
    }
  }
}

constexpr LaneKernels kLaneKernels = {run_lanes<ByImageTables, kImageLanes>,
                                      run_lanes<ByFlatTables, kFlatLanes>, kImageLanes, kFlatLanes};

}  // namespace

}  // namespace imseq
