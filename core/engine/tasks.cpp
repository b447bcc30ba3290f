#include <cassert>
#include <cstring>
#include <new>
#include <utility>

#include "abi/status.h"
#include "engine/engine.h"

namespace imseq {

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

}  // namespace imseq
