// Counting from several threads. The counters are the fields of imseq_stats.
#pragma once

#include <cstdint>

#include "cpu/memory.h"

namespace imseq {

inline void add(int64_t* counter, int64_t amount) {
  __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED);
}

// Adds the time from construction to destruction to a counter.
class Timer {
 public:
  explicit Timer(int64_t* counter) : counter_(counter), begin_ns_(now_ns()) {}
  ~Timer() { add(counter_, now_ns() - begin_ns_); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  int64_t* counter_;
  int64_t begin_ns_;
};

}  // namespace imseq
