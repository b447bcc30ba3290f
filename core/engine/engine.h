// The engine: threads that read blocks, decode samples and fill batches in plan order.
//
// It executes one plan (a Run) at a time. Readers take blocks in reading order as long as the block
// budget allows, and then those of the prepared plan. A decoder takes the next position whose batch
// has memory (its slot is open), and the positions behind it that are ready too; it waits for the
// first one's block, and decodes the group. Rows and blocks that Python has to make go into the
// task queue. The consumer gets batch after batch.
//
// Why it can't deadlock: blocks are read in the order of their first use (window by window, where
// there are windows); a block that a decoder waits for is read whatever the budget says, with all
// before it; and positions are taken in order. So the first unfinished position can always go on.
//
// Locking: one mutex guards everything that is not atomic. A group whose blocks are there and whose
// slots are open takes no lock; blocks, batches and python rows do.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "engine/run.h"
#include "imagenet_seq.h"
#include "read/disk_lock.h"
#include "read/kept.h"

namespace imseq {

class SampleDecoder;

// Counting from several threads. The counters are the fields of imseq_stats.
inline void add(int64_t* counter, int64_t amount) {
  __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED);
}

// Adds the time from construction to destruction to a counter.
class Timer {
 public:
  explicit Timer(int64_t* counter) : counter_(counter), begin_ns_(now_ns()) {}
  ~Timer() { add(counter_, now_ns() - begin_ns_); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  int64_t* counter_;
  int64_t begin_ns_;
};

// The samples whose bytes matched their checksums, a bit for each. When a file has changed, the set
// is cleared and its generation is raised. A block is stamped with the generation in which its file
// was opened: bytes that were read before a change can't add their samples to the set, nor are they
// taken for those verified since. Thread-safe.
class VerifiedSamples {
 public:
  // Makes room for samples below num_samples; not beside has() and add().
  void grow(int64_t num_samples) {
    std::lock_guard lock(mutex_);
    const size_t num_words = static_cast<size_t>(num_samples + 63) / 64;
    if (num_words > words_.size()) words_.resize(num_words);
  }

  // The stamp of a block that is about to be read from a file of this version.
  int64_t generation_of(const std::string& path, uint64_t version) {
    std::lock_guard lock(mutex_);
    const auto [found, is_new] = versions_.try_emplace(path, version);
    if (!is_new && std::exchange(found->second, version) != version) {
      generation_.fetch_add(1, std::memory_order_relaxed);
      for (uint64_t& word : words_) __atomic_store_n(&word, uint64_t{0}, __ATOMIC_RELAXED);
    }
    return generation();
  }

  // The stamp of a block that is not read from a file.
  int64_t generation() const { return generation_.load(std::memory_order_relaxed); }

  bool has(int64_t sample, int64_t generation_of_block) const {
    // In this order: a bit that was added in a later generation is never taken for an older one.
    return (__atomic_load_n(&words_[sample / 64], __ATOMIC_ACQUIRE) & bit(sample)) != 0 &&
           generation() == generation_of_block;
  }

  void add(int64_t sample, int64_t generation_of_block) {
    std::lock_guard lock(mutex_);
    if (generation() != generation_of_block) return;
    __atomic_fetch_or(&words_[sample / 64], bit(sample), __ATOMIC_RELEASE);
  }

 private:
  static uint64_t bit(int64_t sample) { return uint64_t{1} << (sample % 64); }

  std::mutex mutex_;
  std::vector<uint64_t> words_;
  std::atomic<int64_t> generation_{0};
  std::unordered_map<std::string, uint64_t> versions_;  // of files, as last read
};

[[nodiscard]] int32_t check_config(const imseq_engine_config& config, imseq_error* error);

// The public functions are those of imagenet_seq.h, which says what they do.
class Engine {
 public:
  explicit Engine(const imseq_engine_config& config);
  ~Engine() { close(); }

  int32_t prepare(const imseq_plan& plan, imseq_error* error);
  int32_t start(const imseq_plan* plan, void* const* rows, imseq_error* error);
  int32_t next(int64_t timeout_ns, imseq_batch* out, imseq_error* error);
  int32_t release(int32_t slot, void* rows, imseq_error* error);
  void cancel();
  void close();
  void stats(imseq_stats* out);
  void pending(imseq_pending* out);
  int64_t requests(imseq_request* out, int64_t capacity);
  int32_t take(int64_t timeout_ns, imseq_task* out);
  int32_t finish_row(int64_t ticket, const char* failure, imseq_error* error);
  int32_t finish_block(int64_t ticket, const uint8_t* bytes, int64_t size, const int64_t* offsets,
                       const int64_t* lengths, int64_t num_samples, const char* failure,
                       imseq_error* error);

 private:
  // What a reader is reading.
  struct Reading {
    std::shared_ptr<Run> run;  // nullptr: nothing
    int64_t block = 0;
    int64_t began_ns = 0;
  };

  // Positions that one thread decodes together: [begin, end).
  struct Group {
    int64_t begin = 0, end = 0;
  };

  // Work for Python.
  struct Ticket {
    std::shared_ptr<Run> run;
    int32_t kind = 0;
    int64_t position = 0;  // row: position; block: index of the block
    bool prefix_done = false;
  };

  // At most 146 years, because the sum with the clock's time must not overflow.
  static std::chrono::nanoseconds time_out(int64_t ns) {
    return std::chrono::nanoseconds(std::min(ns, INT64_MAX / 2));
  }

  // engine.cpp
  void start_threads();
  void drop_prepared(std::unique_lock<std::mutex>& lock);
  void wake_all();
  void fail_run(Run& run);
  void push_task(const std::shared_ptr<Run>& run, int32_t kind, int64_t position, bool prefix_done);
  int32_t claim_ticket(int64_t ticket, int32_t kind, Ticket* out, imseq_error* error);
  // Work for a plan that allocates: memory that can't be had must not end the process.
  template <class Work>
  void run_or_fail(Run& run, Work work) try {
    work();
  } catch (const std::bad_alloc&) {
    std::lock_guard lock(mutex_);
    fail_run(run);
  }

  // decoding.cpp
  void decode_thread();
  bool take_group(Run& run, Group* group);
  int64_t group_end(const Run& run, int64_t begin, int64_t open_end) const;
  bool wait_for_slot(Run& run);
  bool wait_for_block(Run& run, int64_t block);
  void decode_group(const std::shared_ptr<Run>& run, const Group& group, SampleDecoder& decoder);
  int32_t locate(const Run& run, int64_t position, const uint8_t** bytes, int64_t* size,
                 imseq_error* error) const;
  int32_t describe(const Run& run, int64_t position, imseq_sample* out, imseq_error* error);
  bool verifies(const Run& run) const {
    return config_.verify_checksums != 0 && !run.checksum.empty();
  }
  int32_t verify(const Run& run, int64_t position, const uint8_t* bytes, int64_t size,
                 imseq_error* error);
  void done_with_position(const std::shared_ptr<Run>& run, int64_t position, int32_t status,
                          const imseq_error& error);
  uint8_t* row_of(const Run& run, int64_t position) const;
  void done_with_block(Run& run, int64_t position);
  void done_with_row(Run& run, int64_t position);
  void fail_row(Run& run, int64_t position, const imseq_error& error);

  // reading.cpp
  void read_thread(int number);
  std::shared_ptr<Run> run_to_read() const;
  bool may_read(const Run& run) const;
  int64_t cost(const Run& run, int64_t block) const;
  bool is_kept(const Run& run, int64_t block) const;
  void read_next(const std::shared_ptr<Run>& run, Reading& reading, FileReader& reader,
                 std::unique_lock<std::mutex>& lock);
  int64_t begin_block(Run& run);
  DiskRequest begin_request(const Run& run, bool is_whole);
  void look_up_window(Run& run, Reading& reading);
  void read_block(Run& run, int64_t block, FileReader& reader);
  int32_t read_file(Run& run, int64_t block, FileReader& reader, int64_t* length,
                    imseq_error* error);
  int32_t read_into(Run& run, int64_t block, FileReader& reader, int64_t length, uint8_t* memory,
                    imseq_error* error);
  void count_request(const imseq_request& request);
  void take_buffer(Loaded& loaded, int64_t size_bytes);
  void block_came(Run& run, int64_t block, int64_t size_bytes, int32_t status,
                  const imseq_error& error);

  const imseq_engine_config config_;
  std::vector<uint8_t> table_;
  imseq_recipe recipe_;
  imseq_stats counters_ = {};  // without what stats() fills in

  std::mutex mutex_;
  std::condition_variable run_changed_;      // decoders without a run wait here
  std::condition_variable slot_opened_;      // decoders
  std::condition_variable block_changed_;    // decoders
  std::condition_variable reading_changed_;  // readers
  std::condition_variable batch_done_;       // next
  std::condition_variable task_added_;       // take
  std::condition_variable thread_left_;      // cancel

  std::shared_ptr<Run> run_;
  std::shared_ptr<Run> prepared_;
  int64_t generation_ = 0;      // of run_
  int64_t threads_in_run_ = 0;  // decoders
  int64_t num_reading_ = 0;     // readers that read a block or look up a window
  bool ended_ = false;          // the last plan was delivered whole
  bool closed_ = false;
  std::once_flag closing_;
  int64_t block_bytes_ = 0, block_bytes_peak_ = 0;
  // Of blocks of unknown length; at first the mean of ImageNet's files.
  int64_t mean_block_bytes_ = 128 * 1024;
  int64_t last_file_ = -1;
  int64_t last_end_ = -1;
  BufferPool buffers_;
  KeptBlocks kept_;
  DiskTurns disk_;
  std::vector<Reading> reading_;        // of each reader
  std::deque<imseq_request> recorded_;  // where the configuration asks for it
  VerifiedSamples verified_;
  std::deque<Ticket> row_tasks_, block_tasks_;
  std::unordered_map<int64_t, Ticket> taken_;
  int64_t next_ticket_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace imseq
