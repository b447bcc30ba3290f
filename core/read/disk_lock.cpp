#include "read/disk_lock.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "cpu/memory.h"

namespace imseq {

namespace {

// flock can't wait for a limited time, so it is polled: more often by the first in the queue, as
// the disk is idle until that one notices, than by those behind.
constexpr std::chrono::microseconds kPollFirst{500};
constexpr std::chrono::microseconds kPoll{1000};
// If more time passes between two polls, this process was stopped; only so much counts as waiting.
constexpr int64_t kMaxPollNs = 100'000'000;
// After patience ended, calls don't wait for this many times patience_ns. So a stopped process
// costs less than a tenth of the time.
constexpr int64_t kImpatience = 12;

// Another user's file may not be writable, or not be opened with O_CREAT in a world-writable folder
// (sysctl fs.protected_regular). flock needs neither.
int open_lock_file(const std::string& path) {
  constexpr int kFlags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;  // opening a FIFO must not block
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT | kFlags, 0666);
  return file >= 0 ? file : ::open(path.c_str(), O_RDONLY | kFlags);
}

}  // namespace

DiskLock::DiskLock(const std::string& path, int64_t patience_ns)
    : patience_ns_(patience_ns), exists_(!path.empty()) {
  files_.fill(-1);
  if (!exists_) return;
  for (int place = kDisk; place < kNumPlaces && works_; ++place) {
    const std::string suffix = place == kDisk ? ""
                               : place == 1   ? ".next"
                                              : ".next" + std::to_string(place);
    files_[place] = open_lock_file(path + suffix);
    works_ = files_[place] >= 0;
  }
}

// Doesn't unlock: in a forked child that would release the parent's lock.
DiskLock::~DiskLock() {
  for (const int file : files_) {
    if (file >= 0) ::close(file);
  }
}

bool DiskLock::acquire(const std::atomic<bool>* cancelled) {
  if (!exists_ || held_) return true;
  if (!works_) return false;
  const bool patient = now_ns() >= impatient_until_ns_;
  int64_t patience_left_ns = patient ? patience_ns_ : 0;
  for (int place = kNumPlaces - 1; place >= kDisk; --place) {
    const bool moved_up = wait_for(place, &patience_left_ns, cancelled);
    if (place < kNumPlaces - 1) unlock(place + 1);
    if (!moved_up) {
      if (patient && patience_left_ns <= 0) {
        impatient_until_ns_ = now_ns() + kImpatience * patience_ns_;
      }
      return false;
    }
  }
  held_ = true;
  impatient_until_ns_ = 0;
  return true;
}

void DiskLock::release() {
  if (held_) unlock(kDisk);
  held_ = false;
}

bool DiskLock::is_wanted() {
  if (!exists_ || !works_) return false;
  const bool is_free = try_lock(kDisk + 1);
  if (is_free) unlock(kDisk + 1);
  return !is_free;
}

bool DiskLock::wait_for(int place, int64_t* patience_left_ns, const std::atomic<bool>* cancelled) {
  int64_t last_ns = now_ns();
  while (!cancelled->load(std::memory_order_relaxed)) {
    if (try_lock(place)) return true;
    if (!works_ || *patience_left_ns <= 0) return false;
    std::this_thread::sleep_for(place == kDisk ? kPollFirst : kPoll);
    const int64_t woken_ns = now_ns();
    *patience_left_ns -= std::min(woken_ns - last_ns, kMaxPollNs);
    last_ns = woken_ns;
  }
  return false;
}

bool DiskLock::try_lock(int place) {
  int result;
  do {
    result = ::flock(files_[place], LOCK_EX | LOCK_NB);
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EWOULDBLOCK) works_ = false;
  return result == 0;
}

bool DiskTurns::begin(const std::atomic<bool>* cancelled, bool is_whole) {
  if (!exists_) return false;
  std::unique_lock lock(mutex_);
  const int64_t ticket = next_ticket_++;
  waiting_.push_back(ticket);
  while (!*cancelled && (ticket != waiting_.front() || is_acquiring_ ||
                         (num_requests_ > 0 && !(is_whole && may_join())))) {
    changed_.wait_for(lock, std::chrono::nanoseconds(kHeadStartNs));
  }
  waiting_.erase(std::find(waiting_.begin(), waiting_.end(), ticket));
  ++num_requests_;
  if (*cancelled) return false;
  all_whole_ = is_whole;
  request_ns_ = now_ns();
  if (disk_.held()) {
    if (request_ns_ - turn_ns_ < kTurnNs) return true;
    if (num_requests_ > 1 || !disk_.is_wanted()) {
      turn_ns_ = request_ns_;
      return true;
    }
    disk_.release();
  }
  is_acquiring_ = true;
  lock.unlock();
  const bool held = disk_.acquire(cancelled);
  lock.lock();
  is_acquiring_ = false;
  turn_ns_ = request_ns_ = now_ns();
  changed_.notify_all();
  return held;
}

bool DiskTurns::may_join() {
  return all_whole_ && disk_.held() && now_ns() - request_ns_ >= kHeadStartNs && !disk_.is_wanted();
}

void DiskTurns::end() {
  std::lock_guard lock(mutex_);
  if (exists_) --num_requests_;
  changed_.notify_all();
}

void DiskTurns::rest() {
  std::lock_guard lock(mutex_);
  if (num_requests_ == 0) disk_.release();
}

}  // namespace imseq
