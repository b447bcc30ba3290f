// Turns at a disk with one head: one process reads at a time.
#pragma once

#include <sys/file.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

namespace imseq {

// A queue of flock(2) locks: `path` is the disk, `path.next` the first place in the queue,
// `path.next2` the place behind it and so on. A process enters the queue at the last place and
// moves up place by place, so the first to come reads first, and a rank that has just read can't
// get the disk before those that wait. (If more wait than there are places, chance decides among
// the last.) When a process dies, the kernel releases its locks.
//
// A lock belongs to an open file, so two objects in one process exclude each other, too. A forked
// child shares the parent's open files until it calls exec: release() frees the lock for all, but
// if the parent dies holding it, the children keep it.
class DiskLock {
 public:
  static constexpr int64_t kPatienceNs = 5'000'000'000;

  // path "": no lock, acquire() always succeeds. patience_ns: how long acquire() waits.
  explicit DiskLock(const std::string& path, int64_t patience_ns = kPatienceNs);
  ~DiskLock();
  DiskLock(const DiskLock&) = delete;
  DiskLock& operator=(const DiskLock&) = delete;

  // Waits for the lock. False: read without it, because patience ended (the holder may be a stopped
  // process), or locks don't work here, or *cancelled became true. For a while after patience ended
  // calls don't wait, so that a stopped process costs one wait instead of one for each block.
  [[nodiscard]] bool acquire(const std::atomic<bool>* cancelled);
  void release();
  // Whether another process waits for the lock.
  bool is_wanted();
  bool held() const { return held_; }
  // False: the files could not be opened, or their file system has no locks.
  bool works() const { return works_; }

 private:
  static constexpr int kDisk = 0;
  static constexpr int kNumPlaces = 9;  // the disk, and eight that wait

  bool wait_for(int place, int64_t* patience_left_ns, const std::atomic<bool>* cancelled);
  bool try_lock(int place);
  void unlock(int place) { ::flock(files_[place], LOCK_UN); }

  const int64_t patience_ns_;
  std::array<int, kNumPlaces> files_;
  bool exists_;
  bool works_ = true;
  bool held_ = false;
  int64_t impatient_until_ns_ = 0;
};

// The disk lock, shared by the readers of one engine.
//
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
