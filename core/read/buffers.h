// Memory for blocks: page-aligned buffers, and a pool that reuses them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace imseq {

// The alignment of offsets, lengths and memory for O_DIRECT. Disks with 512-byte sectors accept
// less; every disk accepts a page.
inline constexpr int64_t kPageBytes = 4096;

// Memory of one block, aligned to kPageBytes.
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc.
  explicit Buffer(int64_t size_bytes);

  uint8_t* get() const { return bytes_.get(); }
  // The capacity of a new buffer for size_bytes.
  static int64_t capacity_for(int64_t size_bytes);

  int64_t capacity_bytes = 0;

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<uint8_t[], Free> bytes_;
};

// Unused buffers. A fresh allocation of this size costs a page fault for every 4 KB, so buffers are
// reused. Not thread-safe.
class BufferPool {
 public:
  // A buffer of at least size_bytes. Throws std::bad_alloc.
  [[nodiscard]] Buffer get(int64_t size_bytes);
  // Keeps the buffer if all unused ones together then take at most keep_bytes; frees it otherwise.
  void give(Buffer buffer, int64_t keep_bytes);

 private:
  std::vector<Buffer> free_;
  int64_t free_bytes_ = 0;
};

}  // namespace imseq
