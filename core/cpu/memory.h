// Rounding, growing vectors and reading the clock, for all stages.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace imseq {

// For values that are not negative. Always inlined: otherwise the linker could keep the copy that
// was compiled for one kind of processor, for all.
template <typename T>
__attribute__((always_inline)) constexpr T divide_up(T value, std::type_identity_t<T> unit) {
  return (value + unit - 1) / unit;
}
template <typename T>
__attribute__((always_inline)) constexpr T round_down(T value, std::type_identity_t<T> unit) {
  return value / unit * unit;
}
template <typename T>
__attribute__((always_inline)) constexpr T round_up(T value, std::type_identity_t<T> unit) {
  return divide_up(value, unit) * unit;
}

// Makes the vector at least `size` long; never shortens it, so that its memory is reused.
template <typename T>
void grow(std::vector<T>* memory, size_t size) {
  if (memory->size() < size) memory->resize(size);
}

// Nanoseconds of a clock that never goes back.
inline int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace imseq
