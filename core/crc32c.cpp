#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace imseq {

namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // RFC 3720 appendix B.4, bit-reflected

// kTables[n][b]: the checksum of byte b followed by n zero bytes.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t n = 1; n < 8; ++n) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[n - 1][byte];
      tables[n][byte] = crc >> 8 ^ tables[0][crc & 255];
    }
  }
  return tables;
}();

uint32_t update_by_byte(uint32_t crc, const uint8_t* bytes, size_t size) {
  for (size_t i = 0; i < size; ++i) crc = crc >> 8 ^ kTables[0][(crc ^ bytes[i]) & 255];
  return crc;
}

// Eight bytes a step ("slicing by 8", Kounavis and Berry 2005).
uint32_t update_portably(uint32_t crc, const uint8_t* bytes, size_t size) {
  for (; size >= 8; size -= 8, bytes += 8) {
    uint32_t next = 0;
    for (size_t i = 0; i < 8; ++i) {
      const uint32_t byte = bytes[i] ^ (i < 4 ? crc >> (8 * i) & 255 : 0);
      next ^= kTables[7 - i][byte];
    }
    crc = next;
  }
  return update_by_byte(crc, bytes, size);
}

#if defined(__x86_64__)
// Clang gave the instruction a feature of its own in version 14.
#if defined(__clang__) && __clang_major__ >= 14
#define IMSEQ_TARGET_CRC32 __attribute__((target("sse4.2,crc32")))
#else
#define IMSEQ_TARGET_CRC32 __attribute__((target("sse4.2")))
#endif
IMSEQ_TARGET_CRC32 uint32_t update_by_instruction(uint32_t crc, const uint8_t* bytes, size_t size) {
  uint64_t wide = crc;
  for (; size >= 8; size -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  return update_by_byte(static_cast<uint32_t>(wide), bytes, size);
}
#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const uint8_t* bytes, size_t size) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return ~update_by_instruction(~crc, bytes, size);
#endif
  return crc32c_portable(crc, bytes, size);
}

uint32_t crc32c_portable(uint32_t crc, const uint8_t* bytes, size_t size) {
  return ~update_portably(~crc, bytes, size);
}

}  // namespace imseq
