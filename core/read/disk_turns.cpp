#include "read/disk_turns.h"

#include <algorithm>
#include <chrono>

#include "cpu/memory.h"

namespace imseq {

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
