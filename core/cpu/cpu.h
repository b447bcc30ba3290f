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

// A stage's kernels for a level, of those that are built for this kind of processor.
template <auto* kPortable, auto* kAvx2, auto* kAvx512, auto* kNeon>
auto* kernels_of_level([[maybe_unused]] CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAvx512) return kAvx512;
  if (level == CpuLevel::kAvx2) return kAvx2;
#elif defined(__aarch64__)
  if (level == CpuLevel::kNeon) return kNeon;
#endif
  return kPortable;
}

// Kernels may read and write this many bytes behind the end of a row of samples or pixels.
constexpr int kRowSlack = 64;

}  // namespace imseq
