// A lock for a disk with one head: one process reads at a time.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
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

  // path "": there is no lock, and acquire() always succeeds. patience_ns: how long acquire()
  // waits.
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
  void unlock(int place);

  const int64_t patience_ns_;
  std::array<int, kNumPlaces> files_;
  bool exists_;
  bool works_ = true;
  bool held_ = false;
  int64_t impatient_until_ns_ = 0;
};

}  // namespace imseq
