#include "engine/engine.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

#include "abi/status.h"
#include "sample/draw.h"

namespace imseq {

namespace {

int64_t value_bytes(const imseq_recipe& recipe) {
  return recipe.dtype == IMSEQ_FLOAT32 ? 4 : recipe.dtype == IMSEQ_UINT8 ? 1 : 2;
}

}  // namespace

int32_t check_config(const imseq_engine_config& config, imseq_error* error) {
  const auto wrong = [&](const char* what, int64_t got) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "engine: %s, got %lld", what,
                static_cast<long long>(got));
  };
  const auto is_count = [](int32_t value, int32_t most) { return value >= 1 && value <= most; };
  const int32_t num_decoders = config.num_decoders, num_readers = config.num_readers;
  const int32_t num_slots = config.num_slots;
  if (!is_count(num_decoders, 4096)) return wrong("num_decoders must be 1 to 4096", num_decoders);
  if (!is_count(num_readers, 256)) return wrong("num_readers must be 1 to 256", num_readers);
  if (!is_count(num_slots, 65536)) return wrong("num_slots must be 1 to 65536", num_slots);
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
  const imseq_recipe& recipe = config.recipe;
  if (const int32_t status = check_recipe(recipe, error); status != IMSEQ_OK) return status;
  const int64_t need = 3 * value_bytes(recipe) * recipe.out_height * recipe.out_width;
  if (config.row_bytes != need) return wrong("row_bytes does not fit the recipe", config.row_bytes);
  return IMSEQ_OK;
}

Engine::Engine(const imseq_engine_config& config)
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

void Engine::start_threads() {
  // Signals belong to the host program: Ctrl-C must reach Python's main thread, never a thread of
  // the core.
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

void Engine::close() {
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

int32_t Engine::prepare(const imseq_plan& plan, imseq_error* error) {
  std::shared_ptr<Run> run = make_run(plan, error);
  if (run == nullptr) return IMSEQ_ERROR_ARGUMENT;
  std::unique_lock lock(mutex_);
  while (prepared_ != nullptr) drop_prepared(lock);
  if (closed_) return IMSEQ_CANCELLED;
  prepared_ = std::move(run);
  reading_changed_.notify_all();
  return IMSEQ_OK;
}

int32_t Engine::start(const imseq_plan* plan, void* const* rows, imseq_error* error) {
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
void Engine::drop_prepared(std::unique_lock<std::mutex>& lock) {
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

void Engine::cancel() {
  std::unique_lock lock(mutex_);
  ended_ = false;
  const std::shared_ptr<Run> run = std::exchange(run_, nullptr);
  const std::shared_ptr<Run> prepared = std::exchange(prepared_, nullptr);
  for (const auto& cancelled : {run, prepared}) {
    if (cancelled != nullptr) cancelled->cancelled = true;
  }
  // Tasks that nobody took are dropped. A task that was taken keeps its run and its bytes alive.
  row_tasks_.clear();
  block_tasks_.clear();
  wake_all();
  thread_left_.wait(lock, [&] { return threads_in_run_ == 0 && num_reading_ == 0; });
  block_bytes_ = 0;
  disk_.rest();  // readers of a closed engine end without it
}

void Engine::wake_all() {
  slot_opened_.notify_all();
  block_changed_.notify_all();
  reading_changed_.notify_all();
  batch_done_.notify_all();
}

// Ends a plan for which a thread could not allocate; the mutex is held.
void Engine::fail_run(Run& run) {
  run.out_of_memory = true;
  run.cancelled = true;
  wake_all();
}

int32_t Engine::next(int64_t timeout_ns, imseq_batch* out, imseq_error* error) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Run> run = run_;
  if (run == nullptr) return ended_ ? IMSEQ_END : IMSEQ_CANCELLED;
  const int64_t number = run->delivered;
  if (number >= run->plan.num_batches) {
    run_ = nullptr;  // frees the plan's arrays before the next plan comes
    ended_ = true;
    disk_.rest();  // the last reader may not have come to it
    return IMSEQ_END;
  }
  Batch& batch = run->batches[number];
  const auto finished = [&] {
    return run->cancelled || (number < run->open_batches.load(std::memory_order_acquire) &&
                              batch.remaining.load(std::memory_order_acquire) == 0);
  };
  if (!finished()) {
    Timer timer(&counters_.batch_wait_ns);
    if (!batch_done_.wait_for(lock, time_out(timeout_ns), finished)) return IMSEQ_TIMEOUT;
  }
  if (run->out_of_memory) return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "out of memory");
  if (run->cancelled) return IMSEQ_CANCELLED;
  if (batch.error != nullptr) {
    if (error != nullptr) *error = *batch.error;
    return batch.error->code;
  }
  ++run->delivered;
  add(&counters_.batch_count, 1);
  *out = {number, run->batch_begin[number], run->batch_begin[number + 1],
          static_cast<int32_t>(number % config_.num_slots), 0};
  return IMSEQ_OK;
}

int32_t Engine::release(int32_t slot, void* rows, imseq_error* error) {
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
  batch_done_.notify_all();  // a batch without rows is done when its slot opens
  return IMSEQ_OK;
}

void Engine::push_task(const std::shared_ptr<Run>& run, int32_t kind, int64_t position,
                       bool prefix_done) {
  std::lock_guard lock(mutex_);
  if (run->cancelled) return;
  // Rows go first: they free blocks, and the consumer may be waiting for them.
  (kind == IMSEQ_TASK_ROW ? row_tasks_ : block_tasks_)
      .push_back({run, kind, position, prefix_done});
  task_added_.notify_one();
}

int32_t Engine::take(int64_t timeout_ns, imseq_task* out) {
  std::unique_lock lock(mutex_);
  if (!task_added_.wait_for(lock, time_out(timeout_ns), [&] {
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
    if (!task.prefix_done) {
      [[maybe_unused]] const int32_t status =
          locate(run, task.position, &out->bytes, &out->size, nullptr);
      assert(status == IMSEQ_OK);  // describe() located it before it became a task
    }
  }
  out->ticket = next_ticket_++;
  taken_.emplace(out->ticket, task);
  tasks.pop_front();
  return IMSEQ_OK;
}

int32_t Engine::claim_ticket(int64_t ticket, int32_t kind, Ticket* out, imseq_error* error) {
  std::lock_guard lock(mutex_);
  const auto found = taken_.find(ticket);
  if (found == taken_.end() || found->second.kind != kind) {
    const char* what = kind == IMSEQ_TASK_ROW ? "finish_row: no row" : "finish_block: no block";
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "%s has ticket %lld", what,
                static_cast<long long>(ticket));
  }
  *out = std::move(found->second);
  taken_.erase(found);
  return out->run->cancelled ? IMSEQ_CANCELLED : IMSEQ_OK;
}

int32_t Engine::finish_row(int64_t ticket, const char* failure, imseq_error* error) {
  Ticket task;
  const int32_t claimed = claim_ticket(ticket, IMSEQ_TASK_ROW, &task, error);
  if (claimed != IMSEQ_OK) return claimed;
  Run& run = *task.run;
  add(&counters_.python_rows, 1);
  run_or_fail(run, [&] {
    if (!task.prefix_done) done_with_block(run, task.position);
    if (failure == nullptr) {
      done_with_row(run, task.position);
    } else {
      imseq_error reason = {};
      (void)fail(&reason, IMSEQ_ERROR_SAMPLE, run.sample[task.position], -1, 0, "%s", failure);
      fail_row(run, task.position, reason);
    }
  });
  return IMSEQ_OK;
}

int32_t Engine::finish_block(int64_t ticket, const uint8_t* bytes, int64_t size,
                             const int64_t* offsets, const int64_t* lengths, int64_t num_samples,
                             const char* failure, imseq_error* error) {
  if (size < 0 || num_samples < 0 || (failure == nullptr && size > 0 && bytes == nullptr) ||
      (failure == nullptr && num_samples > 0 && (offsets == nullptr || lengths == nullptr))) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "finish_block: expected bytes, offsets and lengths, got NULL or a negative size");
  }
  Ticket task;
  int32_t status = claim_ticket(ticket, IMSEQ_TASK_BLOCK, &task, error);
  if (status != IMSEQ_OK) return status;
  // The ticket is used up: from here on the consumer gets any failure as the block's.
  Run& run = *task.run;
  imseq_error reason = {};
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
      add(&counters_.python_blocks, 1);
    } catch (const std::bad_alloc&) {
      status = fail(&reason, IMSEQ_ERROR_MEMORY, -1, -1, 0,
                    "out of memory for a block of %lld bytes", static_cast<long long>(size));
    }
  }
  run_or_fail(run, [&] { block_came(run, task.position, size, status, reason); });
  return IMSEQ_OK;
}

void Engine::stats(imseq_stats* out) {
  static_assert(sizeof(imseq_stats) % sizeof(int64_t) == 0);  // it has no other fields
  const auto* counters = reinterpret_cast<const int64_t*>(&counters_);
  auto* values = reinterpret_cast<int64_t*>(out);
  for (size_t i = 0; i < sizeof(imseq_stats) / sizeof(int64_t); ++i) {
    values[i] = __atomic_load_n(&counters[i], __ATOMIC_RELAXED);
  }
  out->kept_bytes = kept_.used_bytes();
  out->kept_blocks = kept_.num_blocks();
  out->block_budget_bytes = config_.block_budget_bytes;
  std::lock_guard lock(mutex_);
  out->block_bytes = block_bytes_;
  out->block_bytes_peak = block_bytes_peak_;
}

void Engine::pending(imseq_pending* out) {
  *out = {};
  out->age_ns = -1;
  std::lock_guard lock(mutex_);
  for (const Reading& reading : reading_) {
    if (reading.run == nullptr || reading.run->is_python_block(reading.block)) continue;
    const Run& run = *reading.run;
    const int64_t age_ns = now_ns() - reading.began_ns;
    if (age_ns <= out->age_ns) continue;
    out->age_ns = age_ns;
    out->offset = run.block_offset[reading.block];
    std::snprintf(out->path, sizeof out->path, "%s", run.path_of_block(reading.block).c_str());
  }
}

int64_t Engine::requests(imseq_request* out, int64_t capacity) {
  std::lock_guard lock(mutex_);
  const int64_t count = std::min(capacity, static_cast<int64_t>(recorded_.size()));
  std::copy_n(recorded_.begin(), count, out);
  recorded_.erase(recorded_.begin(), recorded_.begin() + count);
  return count;
}

}  // namespace imseq
