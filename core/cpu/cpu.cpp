#include "cpu/cpu.h"

#include <atomic>
#include <cstddef>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace imseq {

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports of older compilers does not know MOVBE.
bool has_movbe() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_MOVBE) != 0;
}
#endif

CpuLevel best_level() {
  for (const CpuLevel level : {CpuLevel::kAvx512, CpuLevel::kAvx2, CpuLevel::kNeon}) {
    if (cpu_has(level)) return level;
  }
  return CpuLevel::kPortable;
}

std::atomic<CpuLevel>& level_in_use() {
  static std::atomic<CpuLevel> level{best_level()};
  return level;
}

}  // namespace

CpuLevel cpu_level() { return level_in_use().load(std::memory_order_relaxed); }

void use_cpu_level(CpuLevel level) { level_in_use().store(level, std::memory_order_relaxed); }

bool cpu_has(CpuLevel level) {
  switch (level) {
    case CpuLevel::kPortable:
      return true;
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks whether the system saves the wide registers.
    case CpuLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2") && has_movbe();
    case CpuLevel::kAvx512:
      return cpu_has(CpuLevel::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
    case CpuLevel::kNeon:
      return true;
#endif
    default:
      return false;
  }
}

const char* cpu_level_name(CpuLevel level) {
  static constexpr const char* kNames[] = {"portable", "avx2", "avx512", "neon"};
  return kNames[static_cast<size_t>(level)];
}

}  // namespace imseq
