// CRC-32C (Castagnoli), RFC 3720 appendix B.4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace imseq {

[[nodiscard]] uint32_t crc32c(uint32_t crc, const uint8_t* bytes, size_t size);

}  // namespace imseq
