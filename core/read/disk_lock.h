// One reader at a time on a disk with one head, over all processes.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>

namespace imseq {

// A queue of flock(2) locks: `path` is the disk, `path.next` the first place in the queue,
// `path.next2` the one behind it and so on. Who wants the disk enters at the last place and moves up
// place by place, so that who came first reads first, and a rank that just read can't take the disk
// again before those that wait. (With more waiting than there are places, chance decides among those
// behind.) The kernel releases all of it when a process dies.
//
// A lock belongs to an open file, so two objects in one process exclude each other, too: one per
// reading thread. A forked child has the parent's open files until it calls exec: what the parent
// releases is free for all, but if it dies holding a lock, its children keep that lock.
class DiskLock {
 public:
  static constexpr int64_t kPatienceNs = 5'000'000'000;

  // "": there is no lock, and acquiring it always succeeds. patience_ns: how long to wait.
  explicit DiskLock(const std::string& path, int64_t patience_ns = kPatienceNs);
  ~DiskLock();
  DiskLock(const DiskLock&) = delete;
  DiskLock& operator=(const DiskLock&) = delete;

  // Waits for the disk. False: go on without it, because patience came to its end (a process was
  // stopped, say), or locks don't work here, or *cancelled became true. For a while after patience
  // ended calls try without waiting, so that a stopped process costs one wait and not one a block.
  [[nodiscard]] bool acquire(const std::atomic<bool>* cancelled);
  void release();
  // Whether another process waits for it.
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

// The lock as the readers of one engine use it together: a turn at the disk takes some time or one
// request, whichever is longer, and goes on while nobody else wants the disk. While nobody does,
// readers' requests may overlap, if each goes to the disk whole: the next one then lies in the disk's
// queue when the one before it ends, and the disk does not wait for us in between.
class DiskTurns {
 public:
  explicit DiskTurns(const std::string& path) : exists_(!path.empty()), disk_(path) {}

  // Waits until a request may go to the disk; end() must follow it. Returns whether the lock is
  // held; without it too, requests go ahead: see DiskLock. is_whole: false where it is read in parts,
  // as through the page cache; those of two would come in turns, with a move of the head each.
  [[nodiscard]] bool begin(const std::atomic<bool>* cancelled, bool is_whole);
  void end();
  // There is nothing to read: gives the disk to others, unless a request is under way.
  void rest();

 private:
  // A block of 16 MB, or the files of a window that a hard disk reads in this time.
  static constexpr int64_t kTurnNs = 80'000'000;
  // The kernel splits large requests: of two that begin at once, the pieces come in turns, with the
  // head going back and forth.
  static constexpr int64_t kHeadStartNs = 10'000'000;

  bool may_join();

  const bool exists_;
  std::mutex mutex_;
  std::condition_variable changed_;
  DiskLock disk_;  // a thread that acquires it has it alone; otherwise guarded by the mutex
  bool is_acquiring_ = false;
  int num_requests_ = 0;  // under way
  // First come, first served: blocks are wanted in the order in which they are asked for.
  int64_t next_ticket_ = 0, first_waiting_ = 0;
  int64_t turn_ns_ = 0;     // when the turn began
  int64_t request_ns_ = 0;  // when the last request did
  bool all_whole_ = true;   // those under way
};

}  // namespace imseq
