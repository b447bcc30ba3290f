// The engine: threads that read blocks, decode samples and fill batches in plan order.
//
// One plan (a Run) is executed at a time. Readers take blocks in reading order as long as the block
// budget lasts, and then those of the prepared plan. A decoder takes the next position whose batch
// has memory (its slot is open), and those behind it that are ready too, waits for the first one's
// block, and decodes the group. What needs Python goes into the task queue. The consumer gets batch
// after batch.
//
// No deadlock by construction: blocks are read in order of first use (by windows, where there are
// any), a block that a decoder waits for is read whatever the budget says, with all before it, and
// positions are taken in order, so the first unfinished position can always go on.
//
// Locking: one mutex guards everything that is not atomic. A group whose blocks are there and whose
// slots are open takes no lock: locks are for blocks, batches and foreign rows.

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sample/recipe.h"
#include "read/crc32c.h"
#include "sample/decode.h"
#include "read/disk_lock.h"
#include "imagenet_seq.h"
#include "read/kept.h"
#include "read/file_reader.h"
#include "abi/status.h"

namespace imseq {
namespace {

using Clock = std::chrono::steady_clock;

int64_t nanoseconds_since(Clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
}

// Adds the time from construction to destruction to a counter.
class Timer {
 public:
  explicit Timer(std::atomic<int64_t>* counter) : counter_(counter), begin_(Clock::now()) {}
  ~Timer() { counter_->fetch_add(nanoseconds_since(begin_), std::memory_order_relaxed); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::atomic<int64_t>* counter_;
  Clock::time_point begin_;
};

// Samples that one thread decodes together: more lanes fill the processor better, but each needs
// its share of the cache. Clean samples (of packs) have lanes of their own, their restart intervals.
constexpr int64_t kGroupOfClean = 4;
constexpr int64_t kGroupOfOthers = 8;
static_assert(std::max(kGroupOfClean, kGroupOfOthers) <= IMSEQ_MAX_GROUP);

struct Counters {
  std::atomic<int64_t> read_bytes{0}, read_requests{0}, read_seeks{0}, read_ns{0}, read_wait_ns{0};
  std::atomic<int64_t> read_lock_wait_ns{0}, read_direct_requests{0}, read_lookups{0};
  std::atomic<int64_t> read_cached_bytes{0}, read_kept_bytes{0};
  std::atomic<int64_t> decode_samples{0}, decode_ns{0}, decode_wait_read_ns{0};
  std::atomic<int64_t> decode_wait_batch_ns{0}, foreign_rows{0}, foreign_blocks{0};
  std::atomic<int64_t> batch_count{0}, batch_wait_ns{0};
};

enum class BlockState : uint8_t { waiting, reading, ready, failed };

// What a block has between being read and its last sample's decoding.
struct Loaded {
  Buffer buffer;                   // of this block alone; empty where its bytes are kept memory
  const uint8_t* bytes = nullptr;  // in the buffer or in kept memory
  int64_t size_bytes = 0;
  int64_t reserved_bytes = 0;             // what it counts for in the budget
  bool was_kept = false;                  // nothing was read: it is in kept memory since before
  std::vector<int64_t> offsets, lengths;  // foreign block: its samples
  std::vector<BadRange> bad;              // what the disk could not read
  std::unique_ptr<imseq_error> error;     // failed
};

// What a block that is in memory takes beside its bytes. It counts, as a reader may run through very
// many blocks that are kept.
constexpr int64_t kBlockOverhead = sizeof(Loaded) + 32;

// A set of samples, a bit for each. Decoders look and add at the same time.
class SampleSet {
 public:
  // Makes room for samples below num_samples; not while others look or add.
  void grow(int64_t num_samples) {
    const size_t num_words = static_cast<size_t>(num_samples + 63) / 64;
    if (num_words > words_.size()) words_.resize(num_words);
  }
  bool has(int64_t sample) const {
    return (__atomic_load_n(&words_[sample / 64], __ATOMIC_RELAXED) & bit(sample)) != 0;
  }
  void clear() {
    for (uint64_t& word : words_) __atomic_store_n(&word, uint64_t{0}, __ATOMIC_RELAXED);
  }
  void add(int64_t sample) {
    __atomic_fetch_or(&words_[sample / 64], bit(sample), __ATOMIC_RELAXED);
  }

 private:
  static uint64_t bit(int64_t sample) { return uint64_t{1} << (sample % 64); }

  std::vector<uint64_t> words_;
};

// A plan of a folder has a block for every file, so this is kept small.
struct Block {
  std::atomic<BlockState> state{BlockState::waiting};
  std::atomic<int32_t> remaining{0};  // positions that still need it
  std::unique_ptr<Loaded> loaded;     // from reading on
};

struct Batch {
  std::atomic<int64_t> remaining{0};   // rows not yet filled
  std::unique_ptr<imseq_error> error;  // of its first failed position
  int64_t error_position = 0;
};

// A plan, copied, and how far it has come.
struct Run {
  imseq_plan plan;
  std::vector<int64_t> batch_begin, sample, draw, offset, length, block_offset, block_length,
      block_key, window_begin, path_begin;
  std::vector<int32_t> block, block_file;
  std::vector<uint32_t> checksum;
  std::vector<uint8_t> flags;
  std::string root, paths;

  std::vector<Block> blocks;
  std::vector<Batch> batches;
  std::vector<void*> slot_rows;
  std::atomic<int64_t> next_position{0};
  std::atomic<int64_t> open_batches{0};  // batches below this number have memory
  std::atomic<bool> cancelled{false};

  // Guarded by the engine's mutex.
  std::vector<int32_t> reading_order;  // windows: block of each place; empty: the plan's order
  int64_t next_place = 0;              // in the reading order
  int64_t wanted_end = 0;              // decoders wait for a block before this place
  int64_t known_end = 0;               // places before this one have a final order
  bool looks_up = false;               // a reader finds out the order of the next window
  int64_t foreign_pending = 0;         // foreign blocks asked for and not yet there
  int64_t delivered = 0;               // batches returned by next
  int64_t released = 0;                // slots lent again

  Run(int64_t num_blocks, int64_t num_batches)
      : plan(),
        blocks(static_cast<size_t>(num_blocks)),
        batches(static_cast<size_t>(num_batches)) {}

  uint32_t flags_of(int64_t position) const { return flags.empty() ? 0 : flags[position]; }

  // What stands for a position's sample in its key.
  int64_t drawn(int64_t position) const { return draw.empty() ? sample[position] : draw[position]; }

  // Positions below this one have memory for their rows.
  int64_t open_end() const { return batch_begin[open_batches.load(std::memory_order_acquire)]; }

  bool has_windows() const { return !window_begin.empty(); }

  bool is_read() const { return next_place >= plan.num_blocks; }

  int64_t block_at(int64_t place) const {
    return reading_order.empty() ? place : reading_order[place];
  }

  int64_t key_of(int64_t number) const { return block_key.empty() ? -1 : block_key[number]; }

  // The place by which a block has been read for sure.
  int64_t read_by(int64_t number) const {
    if (!has_windows()) return number + 1;
    return *std::upper_bound(window_begin.begin(), window_begin.end(), number);
  }

  bool block_is_there(int64_t number) const {
    const BlockState state = blocks[number].state.load(std::memory_order_acquire);
    return state == BlockState::ready || state == BlockState::failed;
  }

  int64_t batch_of(int64_t position) const {
    return std::upper_bound(batch_begin.begin(), batch_begin.end(), position) -
           batch_begin.begin() - 1;
  }

  std::string path(int32_t file) const {
    const int64_t begin = path_begin[file], end = path_begin[file + 1];
    std::string path = root;
    if (!path.empty() && path.back() != '/') path += '/';
    return path.append(paths, static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  }
};

// Positions that one thread decodes together: [begin, end).
struct Group {
  int64_t begin = 0, end = 0;
};

struct Ticket {
  std::shared_ptr<Run> run;
  int32_t kind = 0;
  int64_t position = 0;  // row: position; block: index of the block
  bool prefix_done = false;
};

template <class T>
std::vector<T> copied(const T* values, int64_t count) {
  return values == nullptr ? std::vector<T>() : std::vector<T>(values, values + count);
}

bool rises_from_zero(const int64_t* begins, int64_t count) {
  return begins[0] == 0 && std::is_sorted(begins, begins + count + 1);
}

int32_t check_plan(const imseq_plan& plan, imseq_error* error) {
  const auto wrong = [&](const char* what) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "plan: %s", what);
  };
  if (plan.num_positions < 0 || plan.num_batches < 0 || plan.num_blocks < 0 || plan.num_files < 0) {
    return wrong("a count is negative");
  }
  if (plan.batch_begin == nullptr || plan.path_begin == nullptr || plan.root == nullptr) {
    return wrong("batch_begin, path_begin or root is NULL");
  }
  if (plan.num_positions > 0 && (plan.sample == nullptr || plan.block == nullptr ||
                                 plan.offset == nullptr || plan.length == nullptr)) {
    return wrong("a column of the positions is NULL");
  }
  if (plan.num_blocks > 0 && (plan.block_file == nullptr || plan.block_offset == nullptr ||
                              plan.block_length == nullptr)) {
    return wrong("a column of the blocks is NULL");
  }
  for (int64_t i = 0; i < plan.num_positions; ++i) {
    if (plan.block[i] < 0 || plan.block[i] >= plan.num_blocks)
      return wrong("block is out of range");
    if (plan.offset[i] < 0 || plan.length[i] < -1) return wrong("offset or length is negative");
    if (plan.sample[i] < 0) return wrong("sample is negative");
  }
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    if (plan.block_file[i] < -1 || plan.block_file[i] >= plan.num_files) {
      return wrong("block_file is out of range");
    }
    if (plan.block_offset[i] < 0 || plan.block_length[i] < -1) {
      return wrong("block_offset or block_length is negative");
    }
    if (plan.num_windows > 0 && plan.block_file[i] < 0) return wrong("a window has foreign blocks");
  }
  if (plan.num_windows < 0 || (plan.num_windows > 0 && plan.window_begin == nullptr)) {
    return wrong("num_windows is negative, or window_begin is NULL");
  }
  if (plan.num_windows > 0 && (!rises_from_zero(plan.window_begin, plan.num_windows) ||
                               plan.window_begin[plan.num_windows] != plan.num_blocks)) {
    return wrong("window_begin must rise from 0 to num_blocks");
  }
  if (!rises_from_zero(plan.batch_begin, plan.num_batches) ||
      plan.batch_begin[plan.num_batches] != plan.num_positions) {
    return wrong("batch_begin must rise from 0 to num_positions");
  }
  if (!rises_from_zero(plan.path_begin, plan.num_files)) {
    return wrong("path_begin must rise from 0");
  }
  return IMSEQ_OK;
}

}  // namespace
}  // namespace imseq

using namespace imseq;  // the engine is the C struct of the header, so it lives outside the
                        // namespace

struct imseq_engine {
 public:
  explicit imseq_engine(const imseq_engine_config& config);
  void close();

  int32_t prepare(const imseq_plan& plan, imseq_error* error);
  int32_t start(const imseq_plan* plan, void* const* rows, imseq_error* error);
  int32_t next(int64_t timeout_ns, imseq_batch* out, imseq_error* error);
  int32_t release(int32_t slot, void* rows, imseq_error* error);
  void cancel();
  void stats(imseq_stats* out);
  void pending(imseq_pending* out);
  int64_t requests(imseq_request* out, int64_t capacity);
  int32_t take(int64_t timeout_ns, imseq_task* out);
  int32_t finish_row(int64_t ticket, const char* failure, imseq_error* error);
  int32_t finish_block(int64_t ticket, const uint8_t* bytes, int64_t size, const int64_t* offsets,
                       const int64_t* lengths, int64_t num_samples, const char* failure,
                       imseq_error* error);

  const pid_t owner = getpid();

 private:
  // What a reader has in hand.
  struct Reading {
    std::shared_ptr<Run> run;  // nullptr: nothing
    int64_t block = 0;
    Clock::time_point began;
  };

  void start_threads();
  void decode_thread();
  std::shared_ptr<Run> wait_for_run(int64_t* generation);
  void leave_run();
  void drop_prepared(std::unique_lock<std::mutex>& lock);

  bool take_group(Run& run, Group* group);
  int64_t group_end(const Run& run, int64_t begin, int64_t open_end) const;
  bool wait_for_slot(Run& run);
  bool wait_for_block(Run& run, int64_t block);
  void decode_group(const std::shared_ptr<Run>& run, const Group& group, SampleDecoder& decoder);
  int32_t locate(const Run& run, int64_t position, const uint8_t** bytes, int64_t* size,
                 imseq_error* error) const;
  int32_t describe(const Run& run, int64_t position, imseq_sample* out, imseq_error* error);
  bool verifies(const Run& run) const;
  int32_t verify(const Run& run, int64_t position, const uint8_t* bytes, int64_t size,
                 imseq_error* error);
  void done_with_position(const std::shared_ptr<Run>& run, int64_t position, int32_t status,
                          const imseq_error& error);
  uint8_t* row_of(const Run& run, int64_t position) const;
  void push_task(const std::shared_ptr<Run>& run, int32_t kind, int64_t position, bool prefix_done);
  void done_with_block(Run& run, int64_t position);
  void done_with_row(Run& run, int64_t position);
  void fail_row(Run& run, int64_t position, const imseq_error& error);

  void read_thread(int number);
  std::shared_ptr<Run> run_to_read() const;
  bool may_read(const Run& run) const;
  int64_t cost(const Run& run, int64_t block) const;
  bool is_kept(const Run& run, int64_t block) const;
  int64_t begin_block(Run& run);
  void wait_to_read(std::unique_lock<std::mutex>& lock);
  bool begin_request(const Run& run, bool is_whole);
  void look_up_window(Run& run, Reading& reading);
  void read_block(Run& run, int64_t block, FileReader& reader);
  int32_t read_file(Run& run, int64_t block, FileReader& reader, int64_t* length,
                    imseq_error* error);
  int32_t read_into(Run& run, int64_t block, FileReader& reader, int64_t length, uint8_t* memory,
                    imseq_error* error);
  void notice_change(const std::string& path, uint64_t version);
  void count_request(const imseq_request& request);
  void take_buffer(Loaded& loaded, int64_t size_bytes);
  void block_came(Run& run, int64_t block, int64_t size_bytes, int32_t status,
                  const imseq_error& error);
  bool claim_ticket(int64_t ticket, int32_t kind, Ticket* out);

  const imseq_engine_config config_;
  std::vector<uint8_t> table_;
  imseq_recipe recipe_;
  Counters counters_;

  std::mutex mutex_;
  std::condition_variable run_changed_;      // threads without a run wait here
  std::condition_variable slot_opened_;      // decoders
  std::condition_variable block_changed_;    // decoders
  std::condition_variable reading_changed_;  // readers
  std::condition_variable batch_done_;       // next
  std::condition_variable task_added_;       // take
  std::condition_variable thread_left_;      // cancel

  std::shared_ptr<Run> run_;
  std::shared_ptr<Run> prepared_;
  int64_t generation_ = 0;
  int64_t threads_in_run_ = 0;  // decoders
  int64_t num_reading_ = 0;     // readers with a block or a window in hand
  bool ended_ = false;          // the last plan was delivered whole
  bool closed_ = false;
  std::once_flag closing_;
  int64_t block_bytes_ = 0, block_bytes_peak_ = 0;
  int64_t mean_block_bytes_ =
      128 * 1024;  // of blocks of unknown length; ImageNet's mean file to begin
  int64_t last_file_ = -1;
  int64_t last_end_ = -1;
  BufferPool buffers_;
  KeptBlocks kept_;
  DiskTurns disk_;
  std::vector<Reading> reading_;        // of each reader
  std::deque<imseq_request> recorded_;  // where the configuration asks for it
  SampleSet verified_;
  std::unordered_map<std::string, uint64_t> versions_;  // of files with checksums, as last read
  std::deque<Ticket> row_tasks_, block_tasks_;
  std::unordered_map<int64_t, Ticket> taken_;
  int64_t next_ticket_ = 0;
  std::vector<std::thread> threads_;
};

// ---- life ---------------------------------------------------------------------------------------

namespace {

int64_t value_bytes(const imseq_recipe& recipe) {
  return recipe.dtype == IMSEQ_FLOAT32 ? 4 : recipe.dtype == IMSEQ_UINT8 ? 1 : 2;
}

}  // namespace

imseq_engine::imseq_engine(const imseq_engine_config& config)
    : config_(config),
      recipe_(config.recipe),
      kept_(static_cast<uint8_t*>(config.kept), config.kept_bytes, config.kept_keys,
            config.kept_floor_bytes),
      disk_(config.disk_lock == nullptr ? "" : config.disk_lock),
      reading_(static_cast<size_t>(config.num_readers)) {
  const auto* table = static_cast<const uint8_t*>(config.recipe.table);
  if (table != nullptr) {
    table_.assign(table, table + 3 * 256 * value_bytes(config.recipe));
    recipe_.table = table_.data();
  }
  start_threads();
}

void imseq_engine::start_threads() {
  // Signals belong to the host program: Ctrl-C must reach Python's main thread, never one of ours.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 0; i < config_.num_readers; ++i) {
      threads_.emplace_back([this, i] { read_thread(i); });
    }
    for (int i = 0; i < config_.num_decoders; ++i) {
      threads_.emplace_back([this] { decode_thread(); });
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    close();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void imseq_engine::close() {
  std::call_once(closing_, [this] {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
      run_changed_.notify_all();
      reading_changed_.notify_all();
      task_added_.notify_all();
    }
    cancel();
    for (std::thread& thread : threads_) thread.join();
    std::lock_guard lock(mutex_);
    buffers_ = BufferPool();
  });
}

std::shared_ptr<Run> imseq_engine::wait_for_run(int64_t* generation) {
  std::unique_lock lock(mutex_);
  run_changed_.wait(lock,
                    [&] { return closed_ || (run_ != nullptr && generation_ != *generation); });
  if (closed_) return nullptr;
  *generation = generation_;
  ++threads_in_run_;
  return run_;
}

void imseq_engine::leave_run() {
  std::lock_guard lock(mutex_);
  --threads_in_run_;
  thread_left_.notify_all();
}

namespace {

// nullptr: the plan is wrong, or its counts and batches don't fit each other; error says how.
std::shared_ptr<Run> make_run(const imseq_plan& plan, imseq_error* error) {
  if (check_plan(plan, error) != IMSEQ_OK) return nullptr;
  auto run = std::make_shared<Run>(plan.num_blocks, plan.num_batches);
  run->plan = plan;
  run->batch_begin = copied(plan.batch_begin, plan.num_batches + 1);
  run->sample = copied(plan.sample, plan.num_positions);
  run->draw = copied(plan.draw, plan.num_positions);
  run->block = copied(plan.block, plan.num_positions);
  run->offset = copied(plan.offset, plan.num_positions);
  run->length = copied(plan.length, plan.num_positions);
  run->checksum = copied(plan.checksum, plan.num_positions);
  run->flags = copied(plan.flags, plan.num_positions);
  run->block_file = copied(plan.block_file, plan.num_blocks);
  run->block_offset = copied(plan.block_offset, plan.num_blocks);
  run->block_length = copied(plan.block_length, plan.num_blocks);
  run->block_key = copied(plan.block_key, plan.num_blocks);
  run->path_begin = copied(plan.path_begin, plan.num_files + 1);
  run->root = plan.root;
  if (run->path_begin.back() > 0) {
    run->paths.assign(plan.paths, static_cast<size_t>(run->path_begin.back()));
  }
  if (plan.num_windows > 0) {
    run->window_begin = copied(plan.window_begin, plan.num_windows + 1);
    run->reading_order.resize(static_cast<size_t>(plan.num_blocks));
    std::iota(run->reading_order.begin(), run->reading_order.end(), 0);
  } else {
    run->known_end = plan.num_blocks;
  }
  for (int64_t i = 0; i < plan.num_positions; ++i) {
    run->blocks[run->block[i]].remaining.fetch_add(1, std::memory_order_relaxed);
  }
  for (const Block& block : run->blocks) {
    if (block.remaining.load(std::memory_order_relaxed) == 0) {
      (void)fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "plan: a block holds no position");
      return nullptr;
    }
  }
  for (int64_t i = 0; i < plan.num_batches; ++i) {
    const int64_t num_rows = run->batch_begin[i + 1] - run->batch_begin[i];
    if (num_rows > plan.slot_rows) {
      (void)fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                 "plan: batch %lld has %lld rows, its memory %lld", static_cast<long long>(i),
                 static_cast<long long>(num_rows), static_cast<long long>(plan.slot_rows));
      return nullptr;
    }
    run->batches[i].remaining = num_rows;
  }
  return run;
}

}  // namespace

int32_t imseq_engine::prepare(const imseq_plan& plan, imseq_error* error) {
  std::shared_ptr<Run> run = make_run(plan, error);
  if (run == nullptr) return IMSEQ_ERROR_ARGUMENT;
  std::unique_lock lock(mutex_);
  while (prepared_ != nullptr) drop_prepared(lock);
  if (closed_) return IMSEQ_CANCELLED;
  prepared_ = std::move(run);
  reading_changed_.notify_all();
  return IMSEQ_OK;
}

int32_t imseq_engine::start(const imseq_plan* plan, void* const* rows, imseq_error* error) {
  std::shared_ptr<Run> run;
  if (plan != nullptr && (run = make_run(*plan, error)) == nullptr) return IMSEQ_ERROR_ARGUMENT;
  std::unique_lock lock(mutex_);
  if (run != nullptr) drop_prepared(lock);
  if (closed_) return IMSEQ_CANCELLED;
  if (run_ != nullptr && run_->delivered < run_->plan.num_batches) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "start: the former plan has not ended; cancel it first");
  }
  if (run == nullptr) run = std::exchange(prepared_, nullptr);
  if (run == nullptr) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "start: no plan was prepared");
  }
  run->slot_rows.assign(rows, rows + config_.num_slots);
  run->open_batches = std::min<int64_t>(config_.num_slots, run->plan.num_batches);
  if (verifies(*run)) {  // the former plan has ended: no thread looks into the set
    verified_.grow(*std::max_element(run->sample.begin(), run->sample.end()) + 1);
  }
  run_ = std::move(run);
  ended_ = false;
  last_file_ = -1;
  ++generation_;
  run_changed_.notify_all();
  reading_changed_.notify_all();
  return IMSEQ_OK;
}

// Forgets the prepared plan and what was read of it.
void imseq_engine::drop_prepared(std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Run> run = std::exchange(prepared_, nullptr);
  if (run == nullptr) return;
  run->cancelled = true;
  thread_left_.wait(lock, [&] {
    return std::none_of(reading_.begin(), reading_.end(),
                        [&](const Reading& reading) { return reading.run == run; });
  });
  for (const Block& block : run->blocks) {
    if (block.loaded != nullptr) block_bytes_ -= block.loaded->reserved_bytes;
  }
  reading_changed_.notify_all();
}

void imseq_engine::cancel() {
  std::unique_lock lock(mutex_);
  ended_ = false;
  const std::shared_ptr<Run> run = std::exchange(run_, nullptr);
  const std::shared_ptr<Run> prepared = std::exchange(prepared_, nullptr);
  for (const auto& cancelled : {run, prepared}) {
    if (cancelled != nullptr) cancelled->cancelled = true;
  }
  // Tasks nobody took are dropped; those taken keep their run, and so their bytes, alive.
  row_tasks_.clear();
  block_tasks_.clear();
  slot_opened_.notify_all();
  block_changed_.notify_all();
  reading_changed_.notify_all();
  batch_done_.notify_all();
  thread_left_.wait(lock, [&] { return threads_in_run_ == 0 && num_reading_ == 0; });
  block_bytes_ = 0;
}

// ---- the consumer -------------------------------------------------------------------------------

int32_t imseq_engine::next(int64_t timeout_ns, imseq_batch* out, imseq_error* error) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Run> run = run_;
  if (run == nullptr) return ended_ ? IMSEQ_END : IMSEQ_CANCELLED;
  const int64_t number = run->delivered;
  if (number >= run->plan.num_batches) {
    run_ = nullptr;  // the plan's arrays are not kept beside the next ones
    ended_ = true;
    return IMSEQ_END;
  }
  Batch& batch = run->batches[number];
  const auto finished = [&] {
    return run->cancelled || (number < run->open_batches.load(std::memory_order_acquire) &&
                              batch.remaining.load(std::memory_order_acquire) == 0);
  };
  if (!finished()) {
    Timer timer(&counters_.batch_wait_ns);
    if (!batch_done_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), finished)) {
      return IMSEQ_TIMEOUT;
    }
  }
  if (run->cancelled) return IMSEQ_CANCELLED;
  if (batch.error != nullptr) {
    if (error != nullptr) *error = *batch.error;
    return batch.error->code;
  }
  ++run->delivered;
  counters_.batch_count.fetch_add(1, std::memory_order_relaxed);
  out->batch = number;
  out->begin = run->batch_begin[number];
  out->end = run->batch_begin[number + 1];
  out->slot = static_cast<int32_t>(number % config_.num_slots);
  out->reserved = 0;
  return IMSEQ_OK;
}

int32_t imseq_engine::release(int32_t slot, void* rows, imseq_error* error) {
  std::lock_guard lock(mutex_);
  const std::shared_ptr<Run> run = run_;
  if (run == nullptr) return IMSEQ_CANCELLED;
  if (run->released >= run->delivered || slot != run->released % config_.num_slots) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "release: slot %d is not the next to be released", slot);
  }
  run->slot_rows[slot] = rows;
  ++run->released;
  const int64_t open = std::min(run->released + config_.num_slots, run->plan.num_batches);
  run->open_batches.store(open, std::memory_order_release);
  slot_opened_.notify_all();
  return IMSEQ_OK;
}

void imseq_engine::stats(imseq_stats* out) {
  const auto value = [](const std::atomic<int64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  out->read_bytes = value(counters_.read_bytes);
  out->read_requests = value(counters_.read_requests);
  out->read_seeks = value(counters_.read_seeks);
  out->read_ns = value(counters_.read_ns);
  out->read_wait_ns = value(counters_.read_wait_ns);
  out->read_lock_wait_ns = value(counters_.read_lock_wait_ns);
  out->read_direct_requests = value(counters_.read_direct_requests);
  out->read_lookups = value(counters_.read_lookups);
  out->read_cached_bytes = value(counters_.read_cached_bytes);
  out->read_kept_bytes = value(counters_.read_kept_bytes);
  out->decode_samples = value(counters_.decode_samples);
  out->decode_ns = value(counters_.decode_ns);
  out->decode_wait_read_ns = value(counters_.decode_wait_read_ns);
  out->decode_wait_batch_ns = value(counters_.decode_wait_batch_ns);
  out->foreign_rows = value(counters_.foreign_rows);
  out->foreign_blocks = value(counters_.foreign_blocks);
  out->batch_count = value(counters_.batch_count);
  out->batch_wait_ns = value(counters_.batch_wait_ns);
  out->kept_bytes = kept_.used_bytes();
  out->kept_blocks = kept_.num_blocks();
  out->block_budget_bytes = config_.block_budget_bytes;
  std::lock_guard lock(mutex_);
  out->block_bytes = block_bytes_;
  out->block_bytes_peak = block_bytes_peak_;
}

void imseq_engine::pending(imseq_pending* out) {
  *out = {};
  out->age_ns = -1;
  std::lock_guard lock(mutex_);
  for (const Reading& reading : reading_) {
    if (reading.run == nullptr || reading.run->block_file[reading.block] < 0) continue;
    const Run& run = *reading.run;
    const int64_t age_ns = nanoseconds_since(reading.began);
    if (age_ns <= out->age_ns) continue;
    out->age_ns = age_ns;
    out->offset = run.block_offset[reading.block];
    const std::string path = run.path(run.block_file[reading.block]);
    std::snprintf(out->path, sizeof out->path, "%s", path.c_str());
  }
}

int64_t imseq_engine::requests(imseq_request* out, int64_t capacity) {
  std::lock_guard lock(mutex_);
  const int64_t count = std::min(capacity, static_cast<int64_t>(recorded_.size()));
  std::copy_n(recorded_.begin(), count, out);
  recorded_.erase(recorded_.begin(), recorded_.begin() + count);
  return count;
}

// ---- decoding -----------------------------------------------------------------------------------

void imseq_engine::decode_thread() {
  SampleDecoder decoder;
  int64_t generation = 0;
  while (const std::shared_ptr<Run> run = wait_for_run(&generation)) {
    Group group;
    while (!run->cancelled && take_group(*run, &group)) decode_group(run, group, decoder);
    leave_run();
  }
}

// The next positions; false at the end of the plan or when it is cancelled.
bool imseq_engine::take_group(Run& run, Group* group) {
  int64_t begin = run.next_position.load(std::memory_order_relaxed);
  for (;;) {
    if (begin >= run.plan.num_positions) return false;
    const int64_t open_end = run.open_end();
    if (begin >= open_end) {
      if (!wait_for_slot(run)) return false;
      begin = run.next_position.load(std::memory_order_relaxed);
      continue;
    }
    const int64_t end = group_end(run, begin, open_end);
    if (run.next_position.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
      *group = {begin, end};
      return wait_for_block(run, run.block[begin]);
    }
  }
}

// Where the group that starts with begin ends. No thread takes more than its share of what can be
// done now, so that none is idle; and the first batch, which the script waits for, is shared among
// all of them. A position whose block is not there waits alone: it must not hold up others.
int64_t imseq_engine::group_end(const Run& run, int64_t begin, int64_t open_end) const {
  const int64_t horizon = begin < run.batch_begin[1] ? run.batch_begin[1] : open_end;
  const int64_t share = (horizon - begin + config_.num_decoders - 1) / config_.num_decoders;
  const bool clean = (run.flags_of(begin) & IMSEQ_SAMPLE_CLEAN) != 0;
  const int64_t limit = begin + std::min(share, clean ? kGroupOfClean : kGroupOfOthers);
  int64_t end = begin;
  while (end < limit && run.block_is_there(run.block[end])) ++end;
  return std::max(end, begin + 1);
}

// Until the next position has memory, whoever takes it.
bool imseq_engine::wait_for_slot(Run& run) {
  const auto open = [&] {
    const int64_t next = run.next_position.load(std::memory_order_relaxed);
    return run.cancelled || next >= run.plan.num_positions || next < run.open_end();
  };
  Timer timer(&counters_.decode_wait_batch_ns);
  std::unique_lock lock(mutex_);
  slot_opened_.wait(lock, open);
  return !run.cancelled;
}

bool imseq_engine::wait_for_block(Run& run, int64_t number) {
  const auto there = [&] { return run.cancelled || run.block_is_there(number); };
  if (!there()) {
    Timer timer(&counters_.decode_wait_read_ns);
    std::unique_lock lock(mutex_);
    if (const int64_t end = run.read_by(number); end > run.wanted_end) {
      run.wanted_end = end;
      reading_changed_.notify_all();
    }
    block_changed_.wait(lock, there);
  }
  return !run.cancelled;
}

// Where a position's bytes lie; the block must be ready or failed.
int32_t imseq_engine::locate(const Run& run, int64_t position, const uint8_t** bytes, int64_t* size,
                             imseq_error* error) const {
  const Block& block = run.blocks[run.block[position]];
  const int64_t sample = run.sample[position];
  if (block.state.load(std::memory_order_acquire) == BlockState::failed) {
    *error = *block.loaded->error;
    return error->code;
  }
  const Loaded& loaded = *block.loaded;
  const int64_t begin = run.block_offset[run.block[position]];  // of the block in its file
  int64_t offset = run.offset[position], length = run.length[position];
  if (run.block_file[run.block[position]] < 0) {
    const int64_t num_samples = static_cast<int64_t>(loaded.offsets.size());
    if (offset >= num_samples) {
      return fail(error, IMSEQ_ERROR_DATA, sample, -1, 0,
                  "expected at place %lld of a block that has %lld samples",
                  static_cast<long long>(offset), static_cast<long long>(num_samples));
    }
    length = loaded.lengths[offset];
    offset = loaded.offsets[offset];
  } else if (length < 0) {
    length = loaded.size_bytes - offset;
  }
  if (length < 0 || offset < 0 || offset > loaded.size_bytes ||
      length > loaded.size_bytes - offset) {
    return fail(
        error, IMSEQ_ERROR_DATA, sample, offset, 0,
        "expected %lld bytes at offset %lld of a block of %lld bytes: the index does not fit "
        "the data; for a pack run 'imagenet-seq verify'",
        static_cast<long long>(length), static_cast<long long>(offset),
        static_cast<long long>(loaded.size_bytes));
  }
  for (const BadRange& bad : loaded.bad) {
    if (bad.begin >= begin + offset + length || bad.end <= begin + offset) continue;
    return fail(error, IMSEQ_ERROR_READ, sample, bad.begin, bad.os_errno,
                "the disk cannot read bytes %lld to %lld of %s, which belong to this sample; copy "
                "what is readable to another disk",
                static_cast<long long>(bad.begin), static_cast<long long>(bad.end),
                run.path(run.block_file[run.block[position]]).c_str());
  }
  *bytes = loaded.bytes + offset;
  *size = length;
  return IMSEQ_OK;
}

uint8_t* imseq_engine::row_of(const Run& run, int64_t position) const {
  const int64_t batch = run.batch_of(position);
  auto* rows = static_cast<uint8_t*>(run.slot_rows[batch % config_.num_slots]);
  return rows + (position - run.batch_begin[batch]) * config_.row_bytes;
}

bool imseq_engine::verifies(const Run& run) const {
  return config_.verify_checksums != 0 && !run.checksum.empty();
}

// Compares a sample's bytes with their checksum, until they were right once.
int32_t imseq_engine::verify(const Run& run, int64_t position, const uint8_t* bytes, int64_t size,
                             imseq_error* error) {
  const int64_t sample = run.sample[position];
  if (!verifies(run) || verified_.has(sample)) return IMSEQ_OK;
  const uint32_t got = crc32c(0, bytes, static_cast<size_t>(size));
  if (got == run.checksum[position]) {
    verified_.add(sample);
    return IMSEQ_OK;
  }
  const int64_t block = run.block[position];
  if (run.blocks[block].loaded->buffer.get() == nullptr) kept_.discard(run.key_of(block));
  const bool foreign = run.block_file[block] < 0;
  const int64_t offset = run.block_offset[block] + run.offset[position];
  return fail(error, IMSEQ_ERROR_DATA, sample, foreign ? -1 : offset, 0,
              "CRC-32C is %08x, expected %08x (%lld bytes at offset %lld of %s): the data changed "
              "on disk; run 'imagenet-seq verify'",
              got, run.checksum[position], static_cast<long long>(size),
              static_cast<long long>(foreign ? 0 : offset),
              foreign ? "a block" : run.path(run.block_file[block]).c_str());
}

// What the decoder needs to know of a position. IMSEQ_FOREIGN: Python makes its row from the bytes.
int32_t imseq_engine::describe(const Run& run, int64_t position, imseq_sample* out,
                               imseq_error* error) {
  int32_t status = locate(run, position, &out->bytes, &out->size, error);
  if (status == IMSEQ_OK) status = verify(run, position, out->bytes, out->size, error);
  if (status != IMSEQ_OK) return status;
  out->key = {run.plan.seed, run.plan.epoch, run.drawn(position)};
  out->row = row_of(run, position);
  out->flags = run.flags_of(position);
  return config_.rows == IMSEQ_ROWS_FROM_BYTES ? IMSEQ_FOREIGN : IMSEQ_OK;
}

void imseq_engine::decode_group(const std::shared_ptr<Run>& run, const Group& group,
                                SampleDecoder& decoder) {
  std::array<imseq_sample, IMSEQ_MAX_GROUP> samples;
  std::array<int64_t, IMSEQ_MAX_GROUP> positions;
  int num_samples = 0;
  imseq_error error;
  for (int64_t position = group.begin; position < group.end; ++position) {
    const int32_t status = describe(*run, position, &samples[num_samples], &error);
    if (status == IMSEQ_OK && config_.rows != IMSEQ_ROWS_READ) {
      positions[num_samples++] = position;
    } else {
      done_with_position(run, position, status, error);
    }
  }
  if (num_samples == 0) return;
  int32_t first_failure;
  {
    Timer timer(&counters_.decode_ns);
    first_failure = decoder.decode(recipe_, samples.data(), num_samples, nullptr, &error);
  }
  // Counted before the last row of a batch is done, so that who has the batch finds it counted.
  int64_t num_decoded = 0;
  for (int i = 0; i < num_samples; ++i) num_decoded += samples[i].status == IMSEQ_OK;
  counters_.decode_samples.fetch_add(num_decoded, std::memory_order_relaxed);
  for (int i = 0; i < num_samples; ++i) {
    int32_t status = samples[i].status;
    if (status < 0 && std::exchange(first_failure, IMSEQ_OK) == IMSEQ_OK) {
      // The group's error was another sample's: have this one say what is wrong with it.
      status = decoder.decode(recipe_, &samples[i], 1, nullptr, &error);
      if (status == IMSEQ_OK) status = samples[i].status;
    }
    done_with_position(run, positions[i], status, error);
  }
}

// The core has done what it can for a position; below zero: error says why it failed.
void imseq_engine::done_with_position(const std::shared_ptr<Run>& run, int64_t position,
                                      int32_t status, const imseq_error& error) {
  if (status == IMSEQ_FOREIGN) {
    push_task(run, IMSEQ_TASK_ROW, position, false);
    return;
  }
  done_with_block(*run, position);
  if (status != IMSEQ_OK) {
    fail_row(*run, position, error);
  } else if (config_.rows == IMSEQ_ROWS_FINISHED_BY_PYTHON) {
    push_task(run, IMSEQ_TASK_ROW, position, true);
  } else {
    done_with_row(*run, position);
  }
}

// A position no longer needs its block; the last one gives the memory back.
void imseq_engine::done_with_block(Run& run, int64_t position) {
  Block& block = run.blocks[run.block[position]];
  if (block.remaining.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::unique_ptr<Loaded> loaded = std::move(block.loaded);
  std::lock_guard lock(mutex_);
  if (!run.cancelled) block_bytes_ -= loaded->reserved_bytes;
  buffers_.give(std::move(loaded->buffer), config_.block_budget_bytes - block_bytes_);
  reading_changed_.notify_all();
}

void imseq_engine::done_with_row(Run& run, int64_t position) {
  if (run.batches[run.batch_of(position)].remaining.fetch_sub(1, std::memory_order_acq_rel) != 1)
    return;
  std::lock_guard lock(mutex_);
  batch_done_.notify_all();
}

void imseq_engine::fail_row(Run& run, int64_t position, const imseq_error& error) {
  {
    std::lock_guard lock(mutex_);
    Batch& failed = run.batches[run.batch_of(position)];
    // The first in plan order is reported, whichever thread was faster.
    if (failed.error == nullptr || position < failed.error_position) {
      failed.error = std::make_unique<imseq_error>(error);
      failed.error->sample = run.sample[position];
      failed.error_position = position;
    }
  }
  done_with_row(run, position);
}

// ---- reading ------------------------------------------------------------------------------------

void imseq_engine::read_thread(int number) {
  FileReader reader(config_.direct != 0);
  std::unique_lock lock(mutex_);
  while (!closed_) {
    const std::shared_ptr<Run> run = run_to_read();
    if (run == nullptr || !may_read(*run)) {
      disk_.rest();
      wait_to_read(lock);
      continue;
    }
    ++num_reading_;
    reading_[number] = {run, run->block_at(run->next_place), Clock::now()};
    if (run->next_place >= run->known_end) {
      run->looks_up = true;
      lock.unlock();
      look_up_window(*run, reading_[number]);
      lock.lock();
      run->looks_up = false;
    } else {
      const int64_t block = begin_block(*run);
      const bool foreign = run->block_file[block] < 0;
      lock.unlock();
      if (foreign) {
        push_task(run, IMSEQ_TASK_BLOCK, block, false);
      } else {
        read_block(*run, block, reader);
      }
      lock.lock();
    }
    reading_[number] = {};
    --num_reading_;
    thread_left_.notify_all();
    reading_changed_.notify_all();
  }
}

// The plan whose blocks are to be read now: the next one's when all of the present one have been.
// Foreign blocks are made for the present plan only.
std::shared_ptr<Run> imseq_engine::run_to_read() const {
  if (run_ != nullptr && !run_->is_read()) return run_;
  if (prepared_ == nullptr || prepared_->is_read()) return nullptr;
  const int64_t block = prepared_->block_at(prepared_->next_place);
  return prepared_->block_file[block] < 0 ? nullptr : prepared_;
}

bool imseq_engine::may_read(const Run& run) const {
  if (run.looks_up) return false;
  if (run.next_place < run.wanted_end) return true;
  const int64_t block = run.block_at(run.next_place);
  // How large a foreign block will be is not known before it comes, so only as many are asked for
  // as there are threads to make them.
  if (run.block_file[block] < 0 && run.foreign_pending >= config_.num_decoders) return false;
  return block_bytes_ + cost(run, block) <= config_.block_budget_bytes;
}

void imseq_engine::wait_to_read(std::unique_lock<std::mutex>& lock) {
  const auto ready = [&] {
    if (closed_) return true;
    const std::shared_ptr<Run> run = run_to_read();
    return run != nullptr && may_read(*run);
  };
  if (run_to_read() == nullptr) {  // nothing is left to read: nobody waits for anybody
    reading_changed_.wait(lock, [&] { return closed_ || run_to_read() != nullptr; });
    return;
  }
  Timer timer(&counters_.read_wait_ns);
  reading_changed_.wait(lock, ready);
}

// What a block adds to the memory in use; exact where its length is known.
int64_t imseq_engine::cost(const Run& run, int64_t block) const {
  if (is_kept(run, block)) return kBlockOverhead;
  if (run.block_length[block] < 0) return mean_block_bytes_;
  const int64_t room = FileReader::room(run.block_offset[block], run.block_length[block]);
  return Buffer::capacity_for(room) + kBlockOverhead;
}

bool imseq_engine::is_kept(const Run& run, int64_t block) const {
  const uint8_t* bytes;
  int64_t size;
  return kept_.find(run.key_of(block), &bytes, &size);
}

// The next block of the reading order is now the caller's to read.
int64_t imseq_engine::begin_block(Run& run) {
  const int64_t number = run.block_at(run.next_place++);
  Block& block = run.blocks[number];
  block.loaded = std::make_unique<Loaded>();
  block.loaded->reserved_bytes = cost(run, number);
  block_bytes_ += block.loaded->reserved_bytes;
  block_bytes_peak_ = std::max(block_bytes_peak_, block_bytes_);
  block.state = BlockState::reading;
  if (run.block_file[number] < 0) ++run.foreign_pending;
  return number;
}

// Waits for the disk; disk_.end() must follow. Returns whether its lock is held.
bool imseq_engine::begin_request(const Run& run, bool is_whole) {
  Timer timer(&counters_.read_lock_wait_ns);
  return disk_.begin(&run.cancelled, is_whole);
}

// Finds out in which order the files of the next window lie on the disk. The plan names them in the
// order of their inodes, so that looking them up is one sweep; the second one reads them.
void imseq_engine::look_up_window(Run& run, Reading& reading) {
  struct Found {
    FilePlace place;
    int32_t block;
  };
  const int64_t begin = run.known_end, end = run.read_by(run.next_place);
  std::vector<Found> found;
  found.reserve(static_cast<size_t>(end - begin));
  for (int64_t block = begin; block < end && !run.cancelled; ++block) {
    FilePlace place;
    imseq_error unused;
    if (run.block_length[block] < 0 && !is_kept(run, block)) {  // a file, not a range of a shard
      {
        std::lock_guard lock(mutex_);
        reading.block = block;
        reading.began = Clock::now();
      }
      (void)begin_request(run, false);
      {
        Timer timer(&counters_.read_ns);
        // What can't be looked up is reported when it is read.
        (void)look_up(run.path(run.block_file[block]), &place, &unused);
      }
      disk_.end();
      counters_.read_lookups.fetch_add(1, std::memory_order_relaxed);
    }
    found.push_back({place, static_cast<int32_t>(block)});
  }
  std::stable_sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return std::tie(a.place.address, a.place.inode) < std::tie(b.place.address, b.place.inode);
  });
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < found.size(); ++i) run.reading_order[begin + i] = found[i].block;
  run.known_end = end;
}

void imseq_engine::read_block(Run& run, int64_t number, FileReader& reader) {
  Loaded& loaded = *run.blocks[number].loaded;  // this thread's until it is ready
  imseq_error error = {};
  int64_t length = run.block_length[number];
  int32_t status = IMSEQ_OK;
  if (kept_.find(run.key_of(number), &loaded.bytes, &length)) {
    counters_.read_kept_bytes.fetch_add(length, std::memory_order_relaxed);
    loaded.was_kept = true;
  } else {
    status = read_file(run, number, reader, &length, &error);
    if (status == IMSEQ_CANCELLED) return;  // nobody waits for it
  }
  block_came(run, number, length, status, error);
}

// Reads a block from its file, into kept memory where there is room.
int32_t imseq_engine::read_file(Run& run, int64_t number, FileReader& reader, int64_t* length,
                                imseq_error* error) {
  Loaded& loaded = *run.blocks[number].loaded;
  const int64_t offset = run.block_offset[number], key = run.key_of(number);
  const std::string path = run.path(run.block_file[number]);
  int32_t status = reader.open(path, error);
  if (status != IMSEQ_OK) return status;
  if (verifies(run)) notice_change(path, reader.file_version());
  if (*length < 0) *length = std::max<int64_t>(0, reader.file_bytes() - offset);
  const int64_t room = FileReader::room(offset, *length);
  uint8_t* const kept = kept_.claim(key, room);
  try {
    if (kept == nullptr) take_buffer(loaded, room);
    uint8_t* memory = kept != nullptr ? kept : loaded.buffer.get();
    status = read_into(run, number, reader, *length, memory, error);
    if (kept != nullptr && status == IMSEQ_OK && !loaded.bad.empty()) {  // nothing to keep
      take_buffer(loaded, room);
      std::memcpy(loaded.buffer.get(), loaded.bytes, static_cast<size_t>(*length));
      loaded.bytes = loaded.buffer.get();
    }
  } catch (const std::bad_alloc&) {
    status = fail(error, IMSEQ_ERROR_MEMORY, -1, offset, 0,
                  "out of memory for a block of %lld bytes", static_cast<long long>(*length));
  }
  if (kept != nullptr) {
    if (status == IMSEQ_OK && loaded.bad.empty()) {
      kept_.publish(key, loaded.bytes, *length);
    } else {
      kept_.give_up(key);
    }
  }
  return status;
}

// Reads a range of the open file; what the page cache has needs no turn at the disk.
int32_t imseq_engine::read_into(Run& run, int64_t number, FileReader& reader, int64_t length,
                                uint8_t* memory, imseq_error* error) {
  Loaded& loaded = *run.blocks[number].loaded;
  const int64_t offset = run.block_offset[number];
  bool cached, locked = false;
  {
    Timer timer(&counters_.read_ns);
    cached = reader.read_cached(offset, length, memory, &loaded.bytes);
  }
  if (!cached) {
    locked = begin_request(run, reader.is_direct());
    int32_t status = IMSEQ_CANCELLED;
    if (!run.cancelled) {
      Timer timer(&counters_.read_ns);
      status = reader.read(offset, length, memory, &loaded.bytes, &loaded.bad, error);
    }
    disk_.end();
    if (status != IMSEQ_OK) return status;
  }
  count_request({run.plan.epoch, run.block_file[number], offset, length, reader.was_direct(),
                 locked, cached, 0});
  return IMSEQ_OK;
}

// A file that was written or replaced since it was last read: what was found right in it proves
// nothing any more.
void imseq_engine::notice_change(const std::string& path, uint64_t version) {
  std::lock_guard lock(mutex_);
  const auto [found, is_new] = versions_.try_emplace(path, version);
  if (!is_new && std::exchange(found->second, version) != version) verified_.clear();
}

void imseq_engine::count_request(const imseq_request& request) {
  std::lock_guard lock(mutex_);
  if (request.file != last_file_ || request.offset != last_end_) {
    counters_.read_seeks.fetch_add(1, std::memory_order_relaxed);
  }
  last_file_ = request.file;
  last_end_ = request.offset + request.length;
  counters_.read_requests.fetch_add(1, std::memory_order_relaxed);
  counters_.read_direct_requests.fetch_add(request.direct, std::memory_order_relaxed);
  counters_.read_bytes.fetch_add(request.length, std::memory_order_relaxed);
  if (request.cached != 0) {
    counters_.read_cached_bytes.fetch_add(request.length, std::memory_order_relaxed);
  }
  if (config_.record_requests != 0) recorded_.push_back(request);
}

// Throws std::bad_alloc.
void imseq_engine::take_buffer(Loaded& loaded, int64_t size_bytes) {
  std::lock_guard lock(mutex_);
  loaded.buffer = buffers_.get(size_bytes);
}

// Whoever made the block has put its bytes into place; below zero: error says why there are none.
void imseq_engine::block_came(Run& run, int64_t number, int64_t size_bytes, int32_t status,
                              const imseq_error& error) {
  std::lock_guard lock(mutex_);
  if (run.block_file[number] < 0) {
    --run.foreign_pending;
    reading_changed_.notify_all();
  }
  Block& block = run.blocks[number];
  Loaded& loaded = *block.loaded;
  if (status == IMSEQ_OK) {
    loaded.size_bytes = size_bytes;
    if (!run.cancelled) {
      const int64_t memory =
          loaded.buffer.get() == nullptr ? size_bytes : loaded.buffer.capacity_bytes;
      const int64_t in_use = (loaded.was_kept ? 0 : memory) + kBlockOverhead;
      if (run.block_length[number] < 0 && !loaded.was_kept) {
        mean_block_bytes_ += (in_use - mean_block_bytes_) / 16;
      }
      block_bytes_ += in_use - loaded.reserved_bytes;
      block_bytes_peak_ = std::max(block_bytes_peak_, block_bytes_);
      loaded.reserved_bytes = in_use;
    }
  } else {
    loaded.error = std::make_unique<imseq_error>(error);
  }
  block.state.store(status == IMSEQ_OK ? BlockState::ready : BlockState::failed,
                    std::memory_order_release);
  block_changed_.notify_all();
}

// ---- work for Python ----------------------------------------------------------------------------

void imseq_engine::push_task(const std::shared_ptr<Run>& run, int32_t kind, int64_t position,
                             bool prefix_done) {
  std::lock_guard lock(mutex_);
  if (run->cancelled) return;
  // Rows go first: they free blocks, and the next batch may wait for them.
  (kind == IMSEQ_TASK_ROW ? row_tasks_ : block_tasks_)
      .push_back({run, kind, position, prefix_done});
  task_added_.notify_one();
}

int32_t imseq_engine::take(int64_t timeout_ns, imseq_task* out) {
  std::unique_lock lock(mutex_);
  if (!task_added_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [&] {
        return closed_ || !row_tasks_.empty() || !block_tasks_.empty();
      })) {
    return IMSEQ_TIMEOUT;
  }
  if (closed_) return IMSEQ_CANCELLED;
  std::deque<Ticket>& tasks = row_tasks_.empty() ? block_tasks_ : row_tasks_;
  const Ticket task = tasks.front();
  const Run& run = *task.run;
  *out = {};
  out->kind = task.kind;
  out->position = task.position;
  out->prefix_done = task.prefix_done;
  if (task.kind == IMSEQ_TASK_BLOCK) {
    out->sample = run.block_offset[task.position];
  } else {
    out->batch = run.batch_of(task.position);
    out->slot = static_cast<int32_t>(out->batch % config_.num_slots);
    out->row_index = task.position - run.batch_begin[out->batch];
    out->sample = run.sample[task.position];
    out->draw = run.drawn(task.position);
    out->row = row_of(run, task.position);
    imseq_error unused = {};
    if (!task.prefix_done && locate(run, task.position, &out->bytes, &out->size, &unused) < 0) {
      out->bytes = nullptr;  // cannot happen: only located rows become tasks
    }
  }
  out->ticket = next_ticket_++;
  taken_.emplace(out->ticket, task);
  tasks.pop_front();
  return IMSEQ_OK;
}

bool imseq_engine::claim_ticket(int64_t ticket, int32_t kind, Ticket* out) {
  std::lock_guard lock(mutex_);
  const auto found = taken_.find(ticket);
  if (found == taken_.end() || found->second.kind != kind) return false;
  *out = std::move(found->second);
  taken_.erase(found);
  return true;
}

int32_t imseq_engine::finish_row(int64_t ticket, const char* failure, imseq_error* error) {
  Ticket task;
  if (!claim_ticket(ticket, IMSEQ_TASK_ROW, &task)) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "finish_row: no row has ticket %lld",
                static_cast<long long>(ticket));
  }
  Run& run = *task.run;
  if (run.cancelled) return IMSEQ_CANCELLED;
  counters_.foreign_rows.fetch_add(1, std::memory_order_relaxed);
  if (!task.prefix_done) done_with_block(run, task.position);
  if (failure == nullptr) {
    done_with_row(run, task.position);
  } else {
    imseq_error reason = {};
    (void)fail(&reason, IMSEQ_ERROR_SAMPLE, run.sample[task.position], -1, 0, "%s", failure);
    fail_row(run, task.position, reason);
  }
  return IMSEQ_OK;
}

int32_t imseq_engine::finish_block(int64_t ticket, const uint8_t* bytes, int64_t size,
                                   const int64_t* offsets, const int64_t* lengths,
                                   int64_t num_samples, const char* failure, imseq_error* error) {
  Ticket task;
  if (!claim_ticket(ticket, IMSEQ_TASK_BLOCK, &task)) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "finish_block: no block has ticket %lld",
                static_cast<long long>(ticket));
  }
  Run& run = *task.run;
  if (run.cancelled) return IMSEQ_CANCELLED;
  // The ticket is spent: from here on a failure reaches the consumer as the block's.
  imseq_error reason = {};
  int32_t status = IMSEQ_OK;
  if (failure != nullptr) {
    status = fail(&reason, IMSEQ_ERROR_SAMPLE, -1, -1, 0, "%s", failure);
  } else {
    Loaded& loaded = *run.blocks[task.position].loaded;
    try {
      take_buffer(loaded, size);
      loaded.offsets.assign(offsets, offsets + num_samples);
      loaded.lengths.assign(lengths, lengths + num_samples);
      if (size > 0) std::memcpy(loaded.buffer.get(), bytes, static_cast<size_t>(size));
      loaded.bytes = loaded.buffer.get();
      counters_.foreign_blocks.fetch_add(1, std::memory_order_relaxed);
    } catch (const std::bad_alloc&) {
      status = fail(&reason, IMSEQ_ERROR_MEMORY, -1, -1, 0,
                    "out of memory for a block of %lld bytes", static_cast<long long>(size));
    }
  }
  block_came(run, task.position, size, status, reason);
  return IMSEQ_OK;
}

// ---- the C functions ----------------------------------------------------------------------------

namespace {

int32_t check_config(const imseq_engine_config& config, imseq_error* error) {
  const auto wrong = [&](const char* what, int64_t got) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "engine: %s, got %lld", what,
                static_cast<long long>(got));
  };
  if (config.num_decoders < 1 || config.num_decoders > 4096) {
    return wrong("num_decoders must be 1 to 4096", config.num_decoders);
  }
  if (config.num_readers < 1 || config.num_readers > 256) {
    return wrong("num_readers must be 1 to 256", config.num_readers);
  }
  if (config.num_slots < 1 || config.num_slots > 65536) {
    return wrong("num_slots must be 1 to 65536", config.num_slots);
  }
  if (config.row_bytes < 0) return wrong("row_bytes must not be negative", config.row_bytes);
  if (config.block_budget_bytes < 0) {
    return wrong("block_budget_bytes must not be negative", config.block_budget_bytes);
  }
  if (config.kept_bytes < 0 || config.kept_keys < 0 || config.kept_floor_bytes < 0 ||
      (config.kept != nullptr && config.kept_bytes < imseq_kept_table_bytes(config.kept_keys))) {
    return wrong("kept_bytes must hold the table of kept_keys", config.kept_bytes);
  }
  if (config.rows < IMSEQ_ROWS_DECODED || config.rows > IMSEQ_ROWS_READ) {
    return wrong("rows must be 0 to 3", config.rows);
  }
  if (config.rows == IMSEQ_ROWS_FROM_BYTES || config.rows == IMSEQ_ROWS_READ) return IMSEQ_OK;
  if (const int32_t status = check_recipe(config.recipe, error); status != IMSEQ_OK) return status;
  const int64_t need =
      3 * value_bytes(config.recipe) * config.recipe.out_height * config.recipe.out_width;
  if (config.row_bytes != need) return wrong("row_bytes does not fit the recipe", config.row_bytes);
  return IMSEQ_OK;
}

// Runs body on an engine of this process; nothing may leave the C boundary as an exception.
template <class Body>
int32_t guarded(imseq_engine* engine, imseq_error* error, Body body) {
  if (engine == nullptr) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "the engine is NULL");
  }
  if (engine->owner != getpid()) {
    return fail(
        error, IMSEQ_ERROR_FORK, -1, -1, 0,
        "this loader was made in process %d and can't be used in its forked child %d: make the "
        "Loader in the process that iterates it",
        static_cast<int>(engine->owner), static_cast<int>(getpid()));
  }
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "out of memory");
  } catch (const std::exception& exception) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "%s", exception.what());
  }
}

}  // namespace

int32_t imseq_engine_create(const imseq_engine_config* config, imseq_engine** out,
                            imseq_error* error) {
  if (const int32_t status = check_config(*config, error); status != IMSEQ_OK) return status;
  try {
    *out = new imseq_engine(*config);
    return IMSEQ_OK;
  } catch (const std::bad_alloc&) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "out of memory");
  } catch (const std::exception& exception) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "cannot start %d threads: %s",
                config->num_decoders + config->num_readers, exception.what());
  }
}

int32_t imseq_engine_start(imseq_engine* engine, const imseq_plan* plan, void* const* rows,
                           imseq_error* error) {
  return guarded(engine, error, [&] { return engine->start(plan, rows, error); });
}

int32_t imseq_engine_prepare(imseq_engine* engine, const imseq_plan* plan, imseq_error* error) {
  return guarded(engine, error, [&] { return engine->prepare(*plan, error); });
}

int32_t imseq_engine_requests(imseq_engine* engine, imseq_request* out, int64_t capacity,
                              int64_t* count, imseq_error* error) {
  return guarded(engine, error, [&] {
    *count = engine->requests(out, capacity);
    return IMSEQ_OK;
  });
}

int32_t imseq_engine_pending(imseq_engine* engine, imseq_pending* out, imseq_error* error) {
  return guarded(engine, error, [&] {
    engine->pending(out);
    return IMSEQ_OK;
  });
}

int32_t imseq_engine_next(imseq_engine* engine, int64_t timeout_ns, imseq_batch* out,
                          imseq_error* error) {
  return guarded(engine, error, [&] { return engine->next(timeout_ns, out, error); });
}

int32_t imseq_engine_release(imseq_engine* engine, int32_t slot, void* rows, imseq_error* error) {
  return guarded(engine, error, [&] { return engine->release(slot, rows, error); });
}

int32_t imseq_engine_cancel(imseq_engine* engine, imseq_error* error) {
  return guarded(engine, error, [&] {
    engine->cancel();
    return IMSEQ_OK;
  });
}

int32_t imseq_engine_stats(imseq_engine* engine, imseq_stats* out, imseq_error* error) {
  return guarded(engine, error, [&] {
    engine->stats(out);
    return IMSEQ_OK;
  });
}

void imseq_engine_destroy(imseq_engine* engine) {
  // In a forked child the threads do not exist and a mutex may be held for ever: forget, touch
  // nothing.
  if (engine == nullptr || engine->owner != getpid()) return;
  engine->close();
  delete engine;
}

int32_t imseq_engine_close(imseq_engine* engine, imseq_error* error) {
  return guarded(engine, error, [&] {
    engine->close();
    return IMSEQ_OK;
  });
}

int32_t imseq_engine_take(imseq_engine* engine, int64_t timeout_ns, imseq_task* out,
                          imseq_error* error) {
  return guarded(engine, error, [&] { return engine->take(timeout_ns, out); });
}

int32_t imseq_engine_finish_row(imseq_engine* engine, int64_t ticket, const char* failure,
                                imseq_error* error) {
  return guarded(engine, error, [&] { return engine->finish_row(ticket, failure, error); });
}

int32_t imseq_engine_finish_block(imseq_engine* engine, int64_t ticket, const uint8_t* bytes,
                                  int64_t size, const int64_t* offsets, const int64_t* lengths,
                                  int64_t num_samples, const char* failure, imseq_error* error) {
  return guarded(engine, error, [&] {
    return engine->finish_block(ticket, bytes, size, offsets, lengths, num_samples, failure, error);
  });
}
