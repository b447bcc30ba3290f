// What the engine counts, and the timer that adds to the counters.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/memory.h"

namespace imseq {

struct Counters {
  std::atomic<int64_t> read_bytes{0}, read_requests{0}, read_seeks{0}, read_ns{0}, read_wait_ns{0};
  std::atomic<int64_t> read_lock_wait_ns{0}, read_direct_requests{0}, read_lookups{0};
  std::atomic<int64_t> read_cached_bytes{0}, read_kept_bytes{0};
  std::atomic<int64_t> decode_samples{0}, decode_ns{0}, decode_wait_read_ns{0};
  std::atomic<int64_t> decode_wait_batch_ns{0}, python_rows{0}, python_blocks{0};
  std::atomic<int64_t> batch_count{0}, batch_wait_ns{0};
};

inline void add(std::atomic<int64_t>* counter, int64_t amount) {
  counter->fetch_add(amount, std::memory_order_relaxed);
}

// Adds the time from construction to destruction to a counter.
class Timer {
 public:
  explicit Timer(std::atomic<int64_t>* counter) : counter_(counter), begin_ns_(now_ns()) {}
  ~Timer() { add(counter_, now_ns() - begin_ns_); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::atomic<int64_t>* counter_;
  int64_t begin_ns_;
};

}  // namespace imseq
