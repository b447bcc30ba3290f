// DiskLock between real processes: one at a time, in turns, and what happens when one is killed or
// stopped while it has the disk.
#include "read/disk_lock.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "processes.h"

namespace {

using imseq::DiskLock;
using imseq::DiskTurns;
using imseq::now_ns;
using std::chrono::milliseconds;

const std::atomic<bool> kNotCancelled{false};
constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kLong = 60'000 * kMillisecond;  // longer than any test may take

std::string folder;

std::string lock_path() { return folder + "/disk"; }

// What the processes of a test share.
struct Shared {
  std::atomic<int> num_ready, num_inside, most_inside, num_turns, num_failures;
  std::atomic<int> turns[8];
};

Shared* share() {
  void* memory =
      ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANON, -1, 0);
  return new (memory) Shared{};
}

void wait_until(const std::function<bool()>& done) {
  while (!done()) std::this_thread::sleep_for(milliseconds(1));
}

// Takes turns until all together had num_turns; each comes back for the disk at once.
void take_turns(Shared* shared, int self, int num_processes, int num_turns) {
  DiskLock lock(lock_path(), kLong);
  ++shared->num_ready;
  wait_until([&] { return shared->num_ready == num_processes; });
  while (shared->num_turns < num_turns) {
    if (!lock.acquire(&kNotCancelled) || !lock.held()) ++shared->num_failures;
    shared->most_inside = std::max<int>(shared->most_inside, ++shared->num_inside);
    std::this_thread::sleep_for(milliseconds(3));
    ++shared->num_turns;
    ++shared->turns[self];
    --shared->num_inside;
    lock.release();
    if (lock.held()) ++shared->num_failures;
  }
}

void processes_take_turns() {
  constexpr int kNumProcesses = 8;
  constexpr int kNumTurns = 240;
  Shared* const shared = share();
  std::vector<pid_t> children;
  for (int self = 0; self < kNumProcesses; ++self) {
    children.push_back(start([=] { take_turns(shared, self, kNumProcesses, kNumTurns); }));
  }
  for (const pid_t child : children) expect_success(child);
  CHECK(shared->most_inside == 1);
  CHECK(shared->num_failures == 0);
  for (const auto& turns : shared->turns) {
    CHECK(turns >= 0.5 * kNumTurns / kNumProcesses);
    CHECK(turns <= 1.5 * kNumTurns / kNumProcesses);
  }
  ::munmap(shared, sizeof(Shared));
}

void threads_exclude_each_other() {
  std::atomic<int> num_inside{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      DiskLock lock(lock_path(), kLong);
      for (int turn = 0; turn < 20; ++turn) {
        CHECK(lock.acquire(&kNotCancelled));
        CHECK(++num_inside == 1);
        std::this_thread::sleep_for(std::chrono::microseconds(300));
        --num_inside;
        lock.release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A process that takes the disk, says so, and keeps it until it is killed.
pid_t start_holder(Shared* shared) {
  const pid_t holder = start([=] {
    DiskLock lock(lock_path(), kLong);
    CHECK(lock.acquire(&kNotCancelled));
    ++shared->num_ready;
    for (;;) ::pause();
  });
  wait_until([&] { return shared->num_ready > 0; });
  return holder;
}

void end(pid_t process) {
  ::kill(process, SIGKILL);
  ::waitpid(process, nullptr, 0);
}

void a_killed_process_frees_the_disk() {
  Shared* const shared = share();
  const pid_t holder = start_holder(shared);
  const pid_t waiting = start([=] {
    DiskLock lock(lock_path(), kLong);
    ++shared->num_ready;
    CHECK(lock.acquire(&kNotCancelled));
  });
  wait_until([&] { return shared->num_ready == 2; });
  end(holder);
  expect_success(waiting);
  ::munmap(shared, sizeof(Shared));
}

void a_stopped_process_costs_one_wait() {
  constexpr int64_t kPatience = 50 * kMillisecond;
  Shared* const shared = share();
  const pid_t holder = start_holder(shared);
  ::kill(holder, SIGSTOP);
  DiskLock lock(lock_path(), kPatience);
  const int64_t start_ns = now_ns();
  CHECK(!lock.acquire(&kNotCancelled) && !lock.held());
  const int64_t waited_ns = now_ns();
  CHECK(waited_ns - start_ns >= kPatience);
  int num_refused = 0;  // until patience comes back, calls return at once
  while (now_ns() - waited_ns < 5 * kPatience) num_refused += !lock.acquire(&kNotCancelled);
  CHECK(num_refused > 3);
  std::this_thread::sleep_for(std::chrono::nanoseconds(8 * kPatience));
  const int64_t later_ns = now_ns();
  CHECK(!lock.acquire(&kNotCancelled));
  CHECK(now_ns() - later_ns >= kPatience);
  CHECK(lock.works());
  end(holder);
  CHECK(lock.acquire(&kNotCancelled) && lock.held());
  ::munmap(shared, sizeof(Shared));
}

void a_turn_goes_on_while_nobody_wants_the_disk() {
  DiskTurns turns(lock_path());
  CHECK(turns.begin(&kNotCancelled, true));
  CHECK(turns.begin(&kNotCancelled, true));  // requests overlap
  std::atomic<bool> has_it{false};
  std::thread other([&] {
    DiskLock disk(lock_path());
    CHECK(disk.acquire(&kNotCancelled));
    has_it = true;
    std::this_thread::sleep_for(milliseconds(20));
    has_it = false;
    disk.release();
  });
  DiskLock probe(lock_path());
  wait_until([&] { return probe.is_wanted(); });
  turns.end();
  CHECK(!has_it);  // one of our requests is still under way
  turns.end();
  std::this_thread::sleep_for(milliseconds(100));  // longer than a turn
  CHECK(!has_it);                                  // and nobody has given the disk away
  CHECK(turns.begin(&kNotCancelled, true));        // goes behind the one that waits
  CHECK(!has_it);
  other.join();
  turns.end();
  turns.rest();
  CHECK(probe.acquire(&kNotCancelled));
}

void requests_in_parts_do_not_overlap() {
  DiskTurns turns(lock_path());
  for (const bool first_is_whole : {false, true}) {
    CHECK(turns.begin(&kNotCancelled, first_is_whole));
    std::atomic<bool> has_begun{false};
    std::thread second([&] {
      CHECK(turns.begin(&kNotCancelled, !first_is_whole));
      has_begun = true;
    });
    std::this_thread::sleep_for(milliseconds(60));
    CHECK(!has_begun);
    turns.end();
    second.join();
    turns.end();
  }
}

void readers_of_an_engine_share_its_turns() {
  std::vector<std::thread> threads;
  std::vector<int> num_inside(2, 0);  // of each engine
  DiskTurns turns[2] = {DiskTurns(lock_path()), DiskTurns(lock_path())};
  std::mutex mutex;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, engine = i % 2] {
      for (int k = 0; k < 50; ++k) {
        CHECK(turns[engine].begin(&kNotCancelled, true));
        {
          std::lock_guard lock(mutex);
          ++num_inside[engine];
          CHECK(num_inside[1 - engine] == 0);
        }
        std::this_thread::sleep_for(milliseconds(1));
        {
          std::lock_guard lock(mutex);
          --num_inside[engine];
        }
        turns[engine].end();
        turns[engine].rest();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void readers_of_an_engine_go_in_the_order_in_which_they_came() {
  DiskTurns turns(lock_path());
  const int next = ::open((lock_path() + ".next").c_str(), O_RDWR | O_CLOEXEC);
  CHECK(turns.begin(&kNotCancelled, true));
  CHECK(::flock(next, LOCK_EX) == 0);  // the disk is wanted, so that requests don't overlap
  std::mutex mutex;
  std::vector<int> order;
  std::vector<std::thread> threads;
  std::atomic<int> num_started{0};
  for (int i = 0; i < 5; ++i) {
    threads.emplace_back([&, i] {
      ++num_started;
      (void)turns.begin(&kNotCancelled, true);
      {
        std::lock_guard lock(mutex);
        order.push_back(i);
      }
      turns.end();
    });
    wait_until([&] { return num_started == i + 1; });
    std::this_thread::sleep_for(milliseconds(50));  // the next one shall come behind it
  }
  CHECK(order.empty());
  ::close(next);
  turns.end();
  for (std::thread& thread : threads) thread.join();
  CHECK(order == (std::vector<int>{0, 1, 2, 3, 4}));
}

// A request that waits behind another one of its engine, which waits for another process.
void a_queued_request_can_be_cancelled() {
  DiskTurns turns(lock_path());
  DiskLock other(lock_path(), kLong);
  CHECK(other.acquire(&kNotCancelled));
  std::atomic<bool> cancelled{false}, has_left{false};
  const auto request = [&](const std::atomic<bool>* is_cancelled) {
    const bool held = turns.begin(is_cancelled, true);
    CHECK(held == (is_cancelled == &kNotCancelled));
    has_left = has_left || is_cancelled == &cancelled;
    turns.end();
  };
  std::vector<std::thread> threads;
  for (const auto* is_cancelled : {&kNotCancelled, &std::as_const(cancelled), &kNotCancelled}) {
    threads.emplace_back(request, is_cancelled);
    std::this_thread::sleep_for(milliseconds(50));  // each comes behind the one before
  }
  cancelled = true;
  // Patience would last longer.
  for (int i = 0; i < 1000 && !has_left; ++i) std::this_thread::sleep_for(milliseconds(1));
  CHECK(has_left);
  other.release();
  for (std::thread& thread : threads) thread.join();
}

void waiting_can_be_cancelled() {
  DiskLock holder(lock_path(), kLong), waiting(lock_path(), kLong), other(lock_path(), kLong);
  CHECK(holder.acquire(&kNotCancelled));
  std::atomic<bool> cancelled{false};
  std::atomic<int64_t> cancelled_ns{0};
  std::thread canceller([&] {
    std::this_thread::sleep_for(milliseconds(20));
    cancelled_ns = now_ns();
    cancelled = true;
  });
  CHECK(!waiting.acquire(&cancelled));
  CHECK(cancelled_ns > 0 && now_ns() - cancelled_ns < 1000 * kMillisecond);
  canceller.join();
  holder.release();
  // The cancelled one left the queue, and its patience has not ended.
  CHECK(other.acquire(&kNotCancelled));
  std::thread releaser([&] {
    std::this_thread::sleep_for(milliseconds(20));
    other.release();
  });
  CHECK(waiting.acquire(&kNotCancelled));
  releaser.join();
}

void without_a_path_there_is_no_lock() {
  DiskLock first(""), second("");
  CHECK(first.acquire(&kNotCancelled) && second.acquire(&kNotCancelled));
  CHECK(!first.held() && first.works());
  first.release();
}

void where_the_files_cannot_be_opened_nothing_is_locked() {
  DiskLock missing(folder + "/missing/disk");
  CHECK(!missing.works() && !missing.acquire(&kNotCancelled) && !missing.held());
  CHECK(::symlink("/etc/passwd", (folder + "/link").c_str()) == 0);
  DiskLock link(folder + "/link");
  CHECK(!link.works());
}

void files_of_another_user_are_locked_too() {
  DiskLock mine(lock_path(), kLong);
  CHECK(mine.acquire(&kNotCancelled));
  for (const char* suffix : {"", ".next", ".next2", ".next8"}) {
    CHECK(::chmod((lock_path() + suffix).c_str(), 0444) == 0);
  }
  CHECK(::chmod(folder.c_str(), 0755) == 0);
  expect_success(start([] {
    // For root nothing is read-only.
    if (::geteuid() == 0) CHECK(::setuid(65534) == 0);
    DiskLock lock(lock_path(), 5 * kMillisecond);
    CHECK(lock.works());
    CHECK(!lock.acquire(&kNotCancelled));
    CHECK(lock.works());
  }));
}

}  // namespace

int main() {
  char pattern[] = "/tmp/imseq_lock_XXXXXX";
  folder = ::mkdtemp(pattern);
  processes_take_turns();
  a_killed_process_frees_the_disk();
  a_stopped_process_costs_one_wait();
  files_of_another_user_are_locked_too();
  threads_exclude_each_other();
  a_turn_goes_on_while_nobody_wants_the_disk();
  requests_in_parts_do_not_overlap();
  readers_of_an_engine_share_its_turns();
  readers_of_an_engine_go_in_the_order_in_which_they_came();
  a_queued_request_can_be_cancelled();
  waiting_can_be_cancelled();
  without_a_path_there_is_no_lock();
  where_the_files_cannot_be_opened_nothing_is_locked();
  ::unlink((folder + "/link").c_str());
  ::unlink(lock_path().c_str());
  ::unlink((lock_path() + ".next").c_str());
  for (int place = 2; place <= 8; ++place) {
    ::unlink((lock_path() + ".next" + std::to_string(place)).c_str());
  }
  CHECK(::rmdir(folder.c_str()) == 0);
  std::printf(failures == 0 ? "disk_lock: ok\n" : "disk_lock: %d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
