#include "read/buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

#include "cpu/memory.h"

namespace imseq {

namespace {

constexpr int64_t kGrain = 16 * 1024;  // capacities are multiples of this, which helps reuse
constexpr size_t kHugePageBytes = size_t{2} << 20;

}  // namespace

int64_t Buffer::capacity_for(int64_t size_bytes) {
  return round_up(std::max<int64_t>(size_bytes, 1), kGrain);
}

Buffer::Buffer(int64_t size_bytes) : capacity_bytes(capacity_for(size_bytes)) {
  const auto capacity = static_cast<size_t>(capacity_bytes);
  const bool is_large = capacity >= kHugePageBytes;
  void* bytes = nullptr;
  if (::posix_memalign(&bytes, is_large ? kHugePageBytes : static_cast<size_t>(kPageBytes),
                       capacity) != 0) {
    throw std::bad_alloc();
  }
  bytes_.reset(static_cast<uint8_t*>(bytes));
#if defined(MADV_HUGEPAGE)
  // For O_DIRECT the kernel pins every page of a block of 16 MB: 8 huge ones instead of 4096.
  if (is_large) ::madvise(bytes, round_down(capacity, kHugePageBytes), MADV_HUGEPAGE);
#endif
}

Buffer BufferPool::get(int64_t size_bytes) {
  size_t best = free_.size();
  for (size_t i = 0; i < free_.size(); ++i) {
    if (free_[i].capacity_bytes < size_bytes) continue;
    if (best == free_.size() || free_[i].capacity_bytes < free_[best].capacity_bytes) best = i;
  }
  // A buffer much larger than needed is left for a block that needs it.
  if (best < free_.size() && free_[best].capacity_bytes <= 2 * (size_bytes + kGrain)) {
    Buffer buffer = std::move(free_[best]);
    free_[best] = std::move(free_.back());
    free_.pop_back();
    free_bytes_ -= buffer.capacity_bytes;
    return buffer;
  }
  return Buffer(size_bytes);
}

void BufferPool::give(Buffer buffer, int64_t keep_bytes) {
  if (buffer.get() == nullptr || free_bytes_ + buffer.capacity_bytes > keep_bytes) return;
  free_bytes_ += buffer.capacity_bytes;
  free_.push_back(std::move(buffer));
}

}  // namespace imseq
