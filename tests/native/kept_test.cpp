// KeptBlocks among threads and processes; a process that dies while it fills a block; a table whose
// numbers are wrong.
#include "read/kept.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "imagenet_seq.h"
#include "processes.h"

namespace {

using imseq::KeptBlocks;

constexpr int64_t kPage = 4096;

// Shared with forked children; all zero.
class Memory {
 public:
  explicit Memory(int64_t size_bytes)
      : size_(static_cast<size_t>(size_bytes)),
        bytes_(::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANON, -1, 0)) {}
  ~Memory() { ::munmap(bytes_, size_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* get() const { return static_cast<uint8_t*>(bytes_); }
  int64_t size_bytes() const { return static_cast<int64_t>(size_); }
  KeptBlocks view(int64_t num_keys, int64_t floor_bytes = 0) const {
    return KeptBlocks(get(), size_bytes(), num_keys, floor_bytes);
  }

 private:
  size_t size_;
  void* bytes_;
};

// Every block has a size, a place in its room and contents of its own.
int64_t size_of(int64_t key) { return 3000 + key * 37 % 9000; }
int64_t lead_of(int64_t key) { return key * 513 % kPage; }
uint8_t byte_of(int64_t key, int64_t i) { return static_cast<uint8_t>(key * 7 + i * 3 + 1); }

void fill(int64_t key, uint8_t* bytes) {
  for (int64_t i = 0; i < size_of(key); ++i) bytes[i] = byte_of(key, i);
}

bool is_right(int64_t key, const uint8_t* bytes, int64_t size_bytes) {
  if (size_bytes != size_of(key)) return false;
  for (int64_t i = 0; i < size_bytes; ++i) {
    if (bytes[i] != byte_of(key, i)) return false;
  }
  return true;
}

// What a reader does with a block: finds it, or reads and keeps it. True: it is there now.
bool visit(KeptBlocks& kept, int64_t key, bool reading_fails, std::atomic<int>* num_published) {
  const uint8_t* bytes;
  int64_t size_bytes;
  if (kept.find(key, &bytes, &size_bytes)) {
    CHECK(is_right(key, bytes, size_bytes));
    return true;
  }
  uint8_t* const room = kept.claim(key, lead_of(key) + size_of(key));
  if (room == nullptr) return false;
  std::memset(room, 0, static_cast<size_t>(lead_of(key)));
  fill(key, room + lead_of(key));
  if (reading_fails) {
    kept.give_up(key);
    return false;
  }
  kept.publish(key, room + lead_of(key), size_of(key));
  ++*num_published;
  return true;
}

void hammer(KeptBlocks kept, int64_t num_keys, unsigned seed, std::atomic<int>* num_published) {
  std::mt19937 random(seed);
  for (int i = 0; i < 20 * num_keys; ++i) {
    visit(kept, static_cast<int64_t>(random() % num_keys), random() % 3 == 0, num_published);
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    while (!visit(kept, key, false, num_published)) std::this_thread::yield();
  }
}

void what_was_published_is_found() {
  const Memory memory(KeptBlocks::table_bytes(10) + 100 * kPage);
  KeptBlocks kept = memory.view(10);
  const uint8_t* bytes = nullptr;
  int64_t size_bytes = 0;
  CHECK(kept.capacity_bytes() == 100 * kPage);
  CHECK(kept.used_bytes() == 0 && kept.num_blocks() == 0);
  CHECK(!kept.find(3, &bytes, &size_bytes));
  uint8_t* const room = kept.claim(3, 5000);
  CHECK(room != nullptr && reinterpret_cast<uintptr_t>(room) % kPage == 0);
  CHECK(!kept.find(3, &bytes, &size_bytes) && kept.num_blocks() == 0);
  CHECK(kept.claim(3, 5000) == nullptr);
  kept.publish(3, room + 700, 4000);
  CHECK(kept.find(3, &bytes, &size_bytes) && bytes == room + 700 && size_bytes == 4000);
  CHECK(memory.view(10).find(3, &bytes, &size_bytes));
  CHECK(kept.used_bytes() == 2 * kPage && kept.num_blocks() == 1);
  CHECK(kept.claim(3, 5000) == nullptr);
  for (const int64_t key : {-1, 10}) {
    CHECK(!kept.find(key, &bytes, &size_bytes) && kept.claim(key, 100) == nullptr);
  }
  CHECK(kept.claim(4, 0) == nullptr);
}

void without_memory_nothing_is_kept() {
  const Memory memory(4 * kPage);
  for (KeptBlocks kept : {KeptBlocks(), KeptBlocks(nullptr, 0, 10, 0), memory.view(0),
                          memory.view(-5), memory.view(512), memory.view(INT64_MAX)}) {
    const uint8_t* bytes;
    int64_t size_bytes;
    CHECK(kept.claim(0, 1) == nullptr && !kept.find(0, &bytes, &size_bytes));
    CHECK(kept.used_bytes() == 0 && kept.capacity_bytes() == 0 && kept.num_blocks() == 0);
    kept.give_up(0);
  }
}

void table_is_whole_pages() {
  CHECK(imseq_kept_table_bytes(0) == kPage && imseq_kept_table_bytes(-7) == kPage);
  CHECK(KeptBlocks::table_bytes(126) == kPage && KeptBlocks::table_bytes(127) == 2 * kPage);
  CHECK(KeptBlocks::table_bytes(14'000'000) % kPage == 0);
  CHECK(KeptBlocks::table_bytes(14'000'000) < 14'000'001 * int64_t{33});
  CHECK(imseq_kept_table_bytes(INT64_MAX) > 0);
}

void a_room_given_up_is_used_again() {
  const Memory memory(KeptBlocks::table_bytes(10) + 100 * kPage);
  KeptBlocks kept = memory.view(10);
  uint8_t* const room = kept.claim(3, 5000);
  kept.give_up(3);
  const uint8_t* bytes;
  int64_t size_bytes;
  CHECK(!kept.find(3, &bytes, &size_bytes));
  CHECK(kept.claim(3, 5000) == room && kept.used_bytes() == 2 * kPage);
  kept.give_up(3);
  uint8_t* const larger = kept.claim(3, 50000);
  CHECK(larger != nullptr && larger != room);
  kept.publish(3, larger, 50000);
  kept.give_up(3);  // it is there: nobody's to give up
  CHECK(kept.find(3, &bytes, &size_bytes) && size_bytes == 50000);
}

// Rooms of random size from many threads: all inside the arena, none overlapping.
void a_full_arena_is_never_exceeded() {
  constexpr int64_t kNumKeys = 400;
  const Memory memory(KeptBlocks::table_bytes(kNumKeys) + 300 * kPage);
  KeptBlocks kept = memory.view(kNumKeys);
  const uint8_t* const arena = memory.get() + KeptBlocks::table_bytes(kNumKeys);
  std::vector<std::vector<std::pair<int64_t, int64_t>>> rooms(4);
  std::vector<std::thread> threads;
  for (size_t self = 0; self < rooms.size(); ++self) {
    threads.emplace_back([&, self] {
      for (auto key = static_cast<int64_t>(self); key < kNumKeys; key += 4) {
        const int64_t size = 1 + key * 7919 % (5 * kPage);
        const uint8_t* const room = kept.claim(key, size);
        if (room != nullptr) rooms[self].push_back({room - arena, room - arena + size});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<std::pair<int64_t, int64_t>> all;
  for (const auto& some : rooms) all.insert(all.end(), some.begin(), some.end());
  std::sort(all.begin(), all.end());
  CHECK(all.size() > 60 && all.size() < kNumKeys);
  CHECK(all.front().first == 0 && all.back().second <= 300 * kPage);
  for (size_t i = 1; i < all.size(); ++i) CHECK(all[i].first >= all[i - 1].second);
  CHECK(kept.used_bytes() > 295 * kPage && kept.used_bytes() <= kept.capacity_bytes());
  for (const int64_t room_bytes : {5 * kPage, 301 * kPage, INT64_MAX}) {
    CHECK(kept.claim(kNumKeys - 1, room_bytes) == nullptr);
  }
}

void threads_share_blocks() {
  constexpr int64_t kNumKeys = 60;
  const Memory memory(KeptBlocks::table_bytes(kNumKeys) + kNumKeys * 5 * kPage);
  std::atomic<int> num_published{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back(
        [&, seed] { hammer(memory.view(kNumKeys), kNumKeys, seed, &num_published); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_published == kNumKeys && memory.view(kNumKeys).num_blocks() == kNumKeys);
}

void processes_share_blocks() {
  constexpr int64_t kNumKeys = 200;
  const Memory memory(KeptBlocks::table_bytes(kNumKeys) + kNumKeys * 5 * kPage);
  const Memory counter(kPage);
  auto* const num_published = new (counter.get()) std::atomic<int>(0);
  std::vector<pid_t> children;
  for (unsigned seed = 0; seed < 4; ++seed) {
    children.push_back(
        start([&] { hammer(memory.view(kNumKeys), kNumKeys, seed, num_published); }));
  }
  for (const pid_t child : children) expect_success(child);
  CHECK(*num_published == kNumKeys && memory.view(kNumKeys).num_blocks() == kNumKeys);
}

void the_block_of_a_process_that_died_is_taken_over() {
  const Memory memory(KeptBlocks::table_bytes(10) + 100 * kPage);
  KeptBlocks kept = memory.view(10);
  const Memory flag(kPage);
  auto* const has_claimed = new (flag.get()) std::atomic<int>(0);
  const pid_t child = start([&] {
    std::memset(kept.claim(3, 5000), 0xEE, 2000);  // and then half of it is read
    *has_claimed = 1;
    for (;;) ::pause();
  });
  while (*has_claimed == 0) std::this_thread::yield();
  CHECK(kept.claim(3, 5000) == nullptr);
  kept.give_up(3);  // not ours to give up
  CHECK(kept.claim(3, 5000) == nullptr);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  const uint8_t* bytes;
  int64_t size_bytes;
  CHECK(!kept.find(3, &bytes, &size_bytes));
  std::atomic<int> num_published{0};
  CHECK(visit(kept, 3, false, &num_published) && num_published == 1);
  CHECK(visit(kept, 3, false, &num_published) && num_published == 1);
  CHECK(kept.used_bytes() == 2 * kPage && kept.num_blocks() == 1);
}

void little_memory_left_ends_keeping() {
#if defined(__linux__)
  const Memory memory(KeptBlocks::table_bytes(10) + 100 * kPage);
  CHECK(memory.view(10, INT64_MAX).claim(3, 5000) == nullptr);
  CHECK(memory.view(10).used_bytes() == 0);
  const Memory other(KeptBlocks::table_bytes(10) + 100 * kPage);
  CHECK(other.view(10, 1).claim(3, 5000) != nullptr);
#endif
}

// Whatever numbers a damaged table has, every byte that is handed out lies in the arena. The pages
// behind it are inaccessible.
void wrong_tables_do_no_harm() {
  constexpr int64_t kNumKeys = 20;
  constexpr int64_t kArenaBytes = 8 * kPage;
  const int64_t table = KeptBlocks::table_bytes(kNumKeys);
  const Memory memory(table + kArenaBytes + 16 * kPage);
  CHECK(::mprotect(memory.get() + table + kArenaBytes, 16 * kPage, PROT_NONE) == 0);
  const uint8_t* const arena = memory.get() + table;
  constexpr int64_t kThere = 0xFFFFFFFF;  // as the first eight bytes of an entry
  const int64_t nasty[] = {0,
                           1,
                           -1,
                           kPage,
                           4097,
                           kArenaBytes - kPage,
                           kArenaBytes,
                           INT64_MAX,
                           INT64_MIN,
                           INT64_MAX / kPage * kPage,
                           int64_t{-1} << 32,
                           kThere,
                           int64_t{1000} << 32 | kThere};
  std::mt19937_64 random(1);
  int num_found = 0, num_claimed = 0;
  for (int round = 0; round < 20000; ++round) {
    for (int64_t at = 0; at < table / 8; ++at) {
      int64_t value = nasty[random() % std::size(nasty)];
      std::memcpy(memory.get() + at * 8, &value, 8);
    }
    KeptBlocks kept(memory.get(), table + kArenaBytes, kNumKeys, round % 100 == 0 ? 1 : 0);
    CHECK(kept.used_bytes() >= 0 && kept.used_bytes() <= kArenaBytes);
    CHECK(kept.num_blocks() >= 0 && kept.num_blocks() <= kNumKeys);
    const auto key = static_cast<int64_t>(random() % kNumKeys);
    const uint8_t* bytes = nullptr;
    int64_t size_bytes = 0;
    if (kept.find(key, &bytes, &size_bytes)) {
      ++num_found;
      CHECK(size_bytes >= 0 && size_bytes <= kArenaBytes);
      CHECK(bytes >= arena && bytes + size_bytes <= arena + kArenaBytes);
    }
    const int64_t room_bytes = 1 + static_cast<int64_t>(random() % (2 * kArenaBytes));
    if (uint8_t* const room = kept.claim(key, room_bytes)) {
      ++num_claimed;
      CHECK(reinterpret_cast<uintptr_t>(room) % kPage == 0);
      std::memset(room, 1, static_cast<size_t>(room_bytes));
      kept.publish(key, room, room_bytes);
    }
  }
  CHECK(num_found > 10 && num_claimed > 10);
}

void what_is_damaged_is_not_found_and_not_kept_again() {
  const Memory memory(KeptBlocks::table_bytes(10) + 100 * kPage);
  KeptBlocks kept = memory.view(10);
  uint8_t* room = kept.claim(3, kPage);
  CHECK(room != nullptr);
  kept.publish(3, room, 100);
  CHECK(kept.num_blocks() == 1);
  kept.discard(3);
  const uint8_t* bytes;
  int64_t size;
  CHECK(!kept.find(3, &bytes, &size));
  CHECK(kept.claim(3, kPage) == nullptr);
  CHECK(kept.num_blocks() == 0);
  kept.discard(3);
  kept.discard(5);  // not there
  CHECK(kept.num_blocks() == 0);
  CHECK(kept.claim(5, kPage) != nullptr);
}

}  // namespace

int main() {
  processes_share_blocks();
  the_block_of_a_process_that_died_is_taken_over();
  what_was_published_is_found();
  without_memory_nothing_is_kept();
  table_is_whole_pages();
  a_room_given_up_is_used_again();
  a_full_arena_is_never_exceeded();
  threads_share_blocks();
  little_memory_left_ends_keeping();
  wrong_tables_do_no_harm();
  what_is_damaged_is_not_found_and_not_kept_again();
  std::printf(failures == 0 ? "kept: ok\n" : "kept: %d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
