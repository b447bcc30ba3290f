#include "read/kept.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <limits>

#include "cpu/memory.h"
#include "read/buffers.h"

namespace imseq {

namespace {

constexpr int32_t kEmpty = 0;
constexpr int32_t kThere = -1;
constexpr int32_t kBad = -2;  // every other state is the process that fills the entry
constexpr int64_t kMaxKeys = int64_t{1} << 40;
constexpr int64_t kMemoryCheckNs = 20'000'000;

bool is_dead(int32_t process) { return ::kill(process, 0) != 0 && errno == ESRCH; }

// MemAvailable of /proc/meminfo; the maximum where there is no such file.
int64_t available_bytes() {
  int64_t kilobytes = -1;
  if (std::FILE* file = std::fopen("/proc/meminfo", "re")) {
    char line[128];
    long long value;
    while (kilobytes < 0 && std::fgets(line, sizeof(line), file) != nullptr) {
      if (std::sscanf(line, "MemAvailable: %lld kB", &value) == 1) kilobytes = value;
    }
    std::fclose(file);
  }
  return kilobytes >= 0 ? kilobytes * 1024 : std::numeric_limits<int64_t>::max();
}

}  // namespace

// Shared between processes: only lock-free atomics, whose zero bytes are the number zero.
struct KeptBlocks::Header {
  std::atomic<int64_t> used_bytes;  // of the arena
  std::atomic<int64_t> num_blocks;
  std::atomic<int64_t> checked_ns;  // when the machine's available memory was last checked
  std::atomic<int64_t> is_short;
  int64_t unused[4];
};

// Order of writing: the room, then the block's bytes, its place and its size, then kThere.
struct KeptBlocks::Entry {
  std::atomic<int32_t> state;
  std::atomic<uint32_t> lead_bytes;  // of the room before the block
  std::atomic<int64_t> room_offset;  // in the arena
  std::atomic<int64_t> room_bytes;   // 0: none yet
  std::atomic<int64_t> size_bytes;
};

KeptBlocks::KeptBlocks(uint8_t* memory, int64_t memory_bytes, int64_t num_keys,
                       int64_t floor_bytes) {
  static_assert(std::atomic<int64_t>::is_always_lock_free);
  static_assert(std::atomic<int32_t>::is_always_lock_free);
  static_assert(sizeof(Header) == 64 && sizeof(Entry) == 32);
  const int64_t table = table_bytes(num_keys);
  if (memory == nullptr || num_keys <= 0 || memory_bytes <= table) return;
  memory_ = memory;
  arena_ = memory + table;
  arena_bytes_ = memory_bytes - table;
  num_keys_ = num_keys;
  floor_bytes_ = floor_bytes;
}

int64_t KeptBlocks::table_bytes(int64_t num_keys) {
  const auto num_entries = static_cast<size_t>(std::clamp<int64_t>(num_keys, 0, kMaxKeys));
  return round_up(static_cast<int64_t>(sizeof(Header) + num_entries * sizeof(Entry)), kPageBytes);
}

KeptBlocks::Header& KeptBlocks::header() const { return *reinterpret_cast<Header*>(memory_); }

KeptBlocks::Entry* KeptBlocks::entry(int64_t key) const {
  if (key < 0 || key >= num_keys_) return nullptr;
  return reinterpret_cast<Entry*>(memory_ + sizeof(Header)) + key;
}

bool KeptBlocks::find(int64_t key, const uint8_t** bytes, int64_t* size_bytes) const {
  const Entry* const found = entry(key);
  if (found == nullptr || found->state.load(std::memory_order_acquire) != kThere) return false;
  Room room;
  if (!room_of(*found, &room)) return false;
  const int64_t lead = found->lead_bytes.load(std::memory_order_relaxed);
  const int64_t size = found->size_bytes.load(std::memory_order_relaxed);
  if (size < 0 || size > room.size_bytes - lead) return false;
  *bytes = arena_ + room.offset + lead;
  *size_bytes = size;
  return true;
}

uint8_t* KeptBlocks::claim(int64_t key, int64_t room_bytes) {
  Entry* const claimed = entry(key);
  if (claimed == nullptr || room_bytes <= 0) return nullptr;
  int32_t state = claimed->state.load(std::memory_order_relaxed);
  if (state != kEmpty && (state < 0 || !is_dead(state))) return nullptr;
  if (!claimed->state.compare_exchange_strong(state, ::getpid(), std::memory_order_acquire)) {
    return nullptr;
  }
  Room room;
  if (room_of(*claimed, &room) && room.size_bytes >= room_bytes) return arena_ + room.offset;
  if (is_memory_short() || !take_room(room_bytes, &room)) {
    give_up(key);
    return nullptr;
  }
  // The size last: if this process dies in between, the entry has no room.
  claimed->room_offset.store(room.offset, std::memory_order_relaxed);
  claimed->room_bytes.store(room.size_bytes, std::memory_order_release);
  return arena_ + room.offset;
}

void KeptBlocks::publish(int64_t key, const uint8_t* bytes, int64_t size_bytes) {
  Entry* const filled = entry(key);
  Room room;
  if (filled == nullptr || !room_of(*filled, &room)) return;
  const int64_t lead = bytes - (arena_ + room.offset);
  filled->lead_bytes.store(static_cast<uint32_t>(lead), std::memory_order_relaxed);
  filled->size_bytes.store(size_bytes, std::memory_order_relaxed);
  if (change_state(key, ::getpid(), kThere)) header().num_blocks.fetch_add(1);
}

void KeptBlocks::discard(int64_t key) {
  if (change_state(key, kThere, kBad)) header().num_blocks.fetch_sub(1);
}

void KeptBlocks::give_up(int64_t key) { change_state(key, ::getpid(), kEmpty); }

bool KeptBlocks::change_state(int64_t key, int32_t from, int32_t to) {
  Entry* const found = entry(key);
  return found != nullptr &&
         found->state.compare_exchange_strong(from, to, std::memory_order_release);
}

int64_t KeptBlocks::used_bytes() const {
  if (memory_ == nullptr) return 0;
  const int64_t used = header().used_bytes.load(std::memory_order_relaxed);
  return std::clamp<int64_t>(used, 0, arena_bytes_);
}

int64_t KeptBlocks::num_blocks() const {
  if (memory_ == nullptr) return 0;
  return std::clamp<int64_t>(header().num_blocks.load(std::memory_order_relaxed), 0, num_keys_);
}

// The entry's room, if it has one that lies in the arena.
bool KeptBlocks::room_of(const Entry& entry, Room* room) const {
  const int64_t size = entry.room_bytes.load(std::memory_order_acquire);
  const int64_t offset = entry.room_offset.load(std::memory_order_relaxed);
  if (size <= 0 || offset < 0 || offset % kPageBytes != 0) return false;
  if (offset > arena_bytes_ - size) return false;
  *room = {offset, size};
  return true;
}

bool KeptBlocks::take_room(int64_t size_bytes, Room* room) {
  if (size_bytes > arena_bytes_) return false;
  const int64_t whole_pages = round_up(size_bytes, kPageBytes);
  int64_t used = header().used_bytes.load(std::memory_order_relaxed);
  do {
    if (used < 0 || used % kPageBytes != 0 || whole_pages > arena_bytes_ - used) return false;
  } while (!header().used_bytes.compare_exchange_weak(used, used + whole_pages,
                                                      std::memory_order_relaxed));
  *room = {used, whole_pages};
  return true;
}

// All processes together check at most every 20 ms, because a check costs as much as reading a
// small file from memory.
bool KeptBlocks::is_memory_short() const {
  if (floor_bytes_ <= 0) return false;
  Header& shared = header();
  const int64_t now = now_ns();
  int64_t checked = shared.checked_ns.load(std::memory_order_acquire);
  // No process wrote a time that lies in the future: the table is damaged.
  const bool is_old = checked > now || now - kMemoryCheckNs >= checked;
  if (checked == 0 || is_old) {
    shared.is_short.store(available_bytes() < floor_bytes_, std::memory_order_relaxed);
    shared.checked_ns.store(now, std::memory_order_release);
  }
  return shared.is_short.load(std::memory_order_relaxed) != 0;
}

}  // namespace imseq
