// Which instruction set the kernels use. Every stage has one table of kernels per level.
#pragma once

#include <cstdint>

namespace imseq {

enum class CpuLevel {
  kPortable,  // plain C++: the reference
  kAvx2,      // AVX2, BMI1, BMI2, MOVBE: Haswell, Zen and later
  kAvx512,    // AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI: Ice Lake, Zen 4 and later
  kNeon       // every ARM64
};

// The level in use: the best this processor has, until use_cpu_level names another one. It may
// change at any time: all levels give the same bits.
[[nodiscard]] CpuLevel cpu_level();
[[nodiscard]] bool cpu_has(CpuLevel level);
void use_cpu_level(CpuLevel level);

[[nodiscard]] const char* cpu_level_name(CpuLevel level);

// Kernels may read and write this many bytes behind the end of a row of samples or pixels.
constexpr int kRowSlack = 64;

}  // namespace imseq
