// Memory for blocks: page-aligned buffers, and a pool that reuses them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/memory.h"

namespace imseq {

// The alignment of offsets, lengths and memory for O_DIRECT. Disks with 512-byte sectors accept
// less; every disk accepts a page.
inline constexpr int64_t kPageBytes = 4096;

// Memory of one block, aligned to kPageBytes.
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc.
  explicit Buffer(int64_t size_bytes) : capacity_bytes(capacity_for(size_bytes)) {
    const auto capacity = static_cast<size_t>(capacity_bytes);
    const bool is_large = capacity >= kHugePageBytes;
    void* bytes = nullptr;
    if (::posix_memalign(&bytes, is_large ? kHugePageBytes : kPageBytes, capacity) != 0) {
      throw std::bad_alloc();
    }
    bytes_.reset(static_cast<uint8_t*>(bytes));
#if defined(MADV_HUGEPAGE)
    // For O_DIRECT the kernel pins every page of a block of 16 MB: 8 huge ones instead of 4096.
    if (is_large) ::madvise(bytes, round_down(capacity, kHugePageBytes), MADV_HUGEPAGE);
#endif
  }

  uint8_t* get() const { return bytes_.get(); }
  // The capacity of a new buffer for size_bytes.
  static int64_t capacity_for(int64_t size_bytes) {
    return round_up(std::max<int64_t>(size_bytes, 1), kGrain);
  }

  static constexpr int64_t kGrain = 16 * 1024;  // of capacities, which helps reuse
  int64_t capacity_bytes = 0;

 private:
  static constexpr size_t kHugePageBytes = size_t{2} << 20;
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<uint8_t[], Free> bytes_;
};

// Unused buffers. A fresh allocation of this size costs a page fault for every 4 KB, so buffers are
// reused. Not thread-safe.
class BufferPool {
 public:
  // The smallest buffer of at least size_bytes. Throws std::bad_alloc.
  [[nodiscard]] Buffer get(int64_t size_bytes) {
    Buffer* best = nullptr;
    for (Buffer& buffer : free_) {
      if (buffer.capacity_bytes < size_bytes) continue;
      if (best == nullptr || buffer.capacity_bytes < best->capacity_bytes) best = &buffer;
    }
    // A buffer much larger than needed is left for a block that needs it.
    if (best == nullptr || best->capacity_bytes > 2 * (size_bytes + Buffer::kGrain)) {
      return Buffer(size_bytes);
    }
    std::swap(*best, free_.back());
    Buffer buffer = std::move(free_.back());
    free_.pop_back();
    free_bytes_ -= buffer.capacity_bytes;
    return buffer;
  }

  // Keeps the buffer if all unused ones together then take at most keep_bytes; frees it otherwise.
  void give(Buffer buffer, int64_t keep_bytes) {
    if (buffer.get() == nullptr || free_bytes_ + buffer.capacity_bytes > keep_bytes) return;
    free_bytes_ += buffer.capacity_bytes;
    free_.push_back(std::move(buffer));
  }

 private:
  std::vector<Buffer> free_;
  int64_t free_bytes_ = 0;
};

}  // namespace imseq
