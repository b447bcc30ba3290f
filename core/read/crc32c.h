// CRC-32C (Castagnoli), RFC 3720 appendix B.4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace imseq {

// Of bytes, continuing from crc (0 to begin); by the processor's instruction where it has one.
[[nodiscard]] uint32_t crc32c(uint32_t crc, const uint8_t* bytes, size_t size);

// The same on any processor: the reference of tests.
[[nodiscard]] uint32_t crc32c_portable(uint32_t crc, const uint8_t* bytes, size_t size);

}  // namespace imseq
