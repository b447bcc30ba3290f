// The disk lock, shared by the readers of one engine.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

#include "read/disk_lock.h"

namespace imseq {

// A turn at the disk lasts for a fixed time or one request, whichever is longer, and goes on while
// no other process waits for the disk. While none does, the requests of two readers may overlap, if
// each goes to the disk as a whole: the next request then waits in the disk's queue when the one
// before it ends, and the disk is never idle in between.
class DiskTurns {
 public:
  explicit DiskTurns(const std::string& path) : exists_(!path.empty()), disk_(path) {}

  // Waits until a request may go to the disk or *cancelled is true; end() must follow. Returns
  // whether the lock is held; the request may go ahead without it, too: see DiskLock::acquire.
  // is_whole: false for a request that is read in pieces, as through the page cache; the pieces of
  // two such requests would alternate, with a move of the head for each.
  [[nodiscard]] bool begin(const std::atomic<bool>* cancelled, bool is_whole);
  void end();
  // There is nothing to read: releases the lock, unless a request is under way.
  void rest();

 private:
  // The time a hard disk takes for a block of 16 MB, or for some files of a window.
  static constexpr int64_t kTurnNs = 80'000'000;
  // The kernel splits large requests. The pieces of two that begin at the same time would
  // alternate, with the head going back and forth.
  static constexpr int64_t kHeadStartNs = 10'000'000;

  bool may_join();

  const bool exists_;
  std::mutex mutex_;
  std::condition_variable changed_;
  DiskLock disk_;  // while is_acquiring_, the acquiring thread's alone; otherwise guarded by mutex_
  bool is_acquiring_ = false;
  int num_requests_ = 0;  // under way
  // First come, first served: blocks are needed in the order in which they are asked for.
  std::deque<int64_t> waiting_;  // tickets
  int64_t next_ticket_ = 0;
  int64_t turn_ns_ = 0;     // when the turn began
  int64_t request_ns_ = 0;  // when the last request began
  bool all_whole_ = true;   // of the requests under way
};

// A request: begin() until it goes out of scope.
class DiskRequest {
 public:
  DiskRequest(DiskTurns* turns, const std::atomic<bool>* cancelled, bool is_whole)
      : turns_(turns), has_lock_(turns->begin(cancelled, is_whole)) {}
  ~DiskRequest() { turns_->end(); }
  DiskRequest(const DiskRequest&) = delete;
  DiskRequest& operator=(const DiskRequest&) = delete;

  bool has_lock() const { return has_lock_; }

 private:
  DiskTurns* turns_;
  bool has_lock_;
};

}  // namespace imseq
