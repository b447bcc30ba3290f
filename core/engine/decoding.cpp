#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "abi/status.h"
#include "engine/engine.h"
#include "read/crc32c.h"
#include "sample/decode.h"

namespace imseq {

namespace {

// Samples that one thread decodes together. More of them use the processor better, but each needs
// its share of the cache. A clean sample (of a pack) needs fewer beside it: its restart intervals
// are decoded together, too.
constexpr int64_t kGroupOfClean = 4;
constexpr int64_t kGroupOfOthers = 8;
static_assert(std::max(kGroupOfClean, kGroupOfOthers) <= IMSEQ_MAX_GROUP);

}  // namespace

void Engine::decode_thread() {
  std::optional<SampleDecoder> decoder;
  int64_t generation = 0;  // of the last run
  for (;;) {
    std::shared_ptr<Run> run;
    std::unique_lock lock(mutex_);
    run_changed_.wait(lock,
                      [&] { return closed_ || (run_ != nullptr && generation_ != generation); });
    if (closed_) return;
    run = run_;
    generation = generation_;
    ++threads_in_run_;
    lock.unlock();
    run_or_fail(*run, [&] {
      if (!decoder) decoder.emplace();
      Group group;
      while (!run->cancelled && take_group(*run, &group)) decode_group(run, group, *decoder);
    });
    lock.lock();
    --threads_in_run_;
    thread_left_.notify_all();
  }
}

// Takes the next positions. False: the plan has ended or was cancelled.
bool Engine::take_group(Run& run, Group* group) {
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

// Where the group that starts at begin ends. A thread takes at most its share of the positions that
// can be decoded now, so that no thread is idle; the first batch, which the script waits for, is
// shared among all. A position whose block is not there yet forms a group alone, so that it holds
// up no other.
int64_t Engine::group_end(const Run& run, int64_t begin, int64_t open_end) const {
  const int64_t horizon = begin < run.batch_begin[1] ? run.batch_begin[1] : open_end;
  const int64_t share = divide_up(horizon - begin, config_.num_decoders);
  const bool clean = (run.flags_of(begin) & IMSEQ_SAMPLE_CLEAN) != 0;
  const int64_t limit = begin + std::min(share, clean ? kGroupOfClean : kGroupOfOthers);
  int64_t end = begin;
  while (end < limit && run.block_is_there(run.block[end])) ++end;
  return std::max(end, begin + 1);
}

// Waits until the next position has memory; another thread may take that position.
bool Engine::wait_for_slot(Run& run) {
  const auto open = [&] {
    const int64_t next = run.next_position.load(std::memory_order_relaxed);
    return run.cancelled || next >= run.plan.num_positions || next < run.open_end();
  };
  Timer timer(&counters_.decode_wait_batch_ns);
  std::unique_lock lock(mutex_);
  slot_opened_.wait(lock, open);
  return !run.cancelled;
}

bool Engine::wait_for_block(Run& run, int64_t number) {
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

// Finds a position's bytes. Its block must be ready or failed.
int32_t Engine::locate(const Run& run, int64_t position, const uint8_t** bytes, int64_t* size,
                       imseq_error* error) const {
  const int64_t number = run.block[position], sample = run.sample[position];
  const Block& block = run.blocks[number];
  if (block.state.load(std::memory_order_acquire) == BlockState::failed) {
    *error = *block.loaded->error;
    return error->code;
  }
  const Loaded& loaded = *block.loaded;
  const int64_t begin = run.block_offset[number];  // of the block in its file
  int64_t offset = run.offset[position], length = run.length[position];
  if (run.is_python_block(number)) {
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
                run.path_of_block(number).c_str());
  }
  *bytes = loaded.bytes + offset;
  *size = length;
  return IMSEQ_OK;
}

uint8_t* Engine::row_of(const Run& run, int64_t position) const {
  const int64_t batch = run.batch_of(position);
  auto* rows = static_cast<uint8_t*>(run.slot_rows[batch % config_.num_slots]);
  return rows + (position - run.batch_begin[batch]) * config_.row_bytes;
}

// Compares a sample's bytes with its checksum, unless they matched before.
int32_t Engine::verify(const Run& run, int64_t position, const uint8_t* bytes, int64_t size,
                       imseq_error* error) {
  if (!verifies(run)) return IMSEQ_OK;
  const int64_t sample = run.sample[position], block = run.block[position];
  const Loaded& loaded = *run.blocks[block].loaded;
  if (verified_.has(sample, loaded.generation)) return IMSEQ_OK;
  const uint32_t got = crc32c(0, bytes, static_cast<size_t>(size));
  if (got == run.checksum[position]) {
    verified_.add(sample, loaded.generation);
    return IMSEQ_OK;
  }
  if (loaded.buffer.get() == nullptr) kept_.discard(run.key_of(block));
  const bool is_python = run.is_python_block(block);
  const int64_t offset = run.block_offset[block] + run.offset[position];
  return fail(error, IMSEQ_ERROR_DATA, sample, is_python ? -1 : offset, 0,
              "CRC-32C is %08x, expected %08x (%lld bytes at offset %lld of %s): the data changed "
              "on disk; run 'imagenet-seq verify'",
              got, run.checksum[position], static_cast<long long>(size),
              static_cast<long long>(is_python ? 0 : offset),
              is_python ? "a block" : run.path_of_block(block).c_str());
}

// Fills in what the decoder needs. IMSEQ_NOT_DECODED: Python makes the row from the bytes.
int32_t Engine::describe(const Run& run, int64_t position, imseq_sample* out, imseq_error* error) {
  int32_t status = locate(run, position, &out->bytes, &out->size, error);
  if (status == IMSEQ_OK) status = verify(run, position, out->bytes, out->size, error);
  if (status != IMSEQ_OK) return status;
  out->key = {run.plan.seed, run.plan.epoch, run.drawn(position)};
  out->row = row_of(run, position);
  out->flags = run.flags_of(position);
  return config_.rows == IMSEQ_ROWS_FROM_BYTES ? IMSEQ_NOT_DECODED : IMSEQ_OK;
}

void Engine::decode_group(const std::shared_ptr<Run>& run, const Group& group,
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
  // Counted before the rows are done: whoever gets the batch finds its samples counted.
  int64_t num_decoded = 0;
  for (int i = 0; i < num_samples; ++i) num_decoded += samples[i].status == IMSEQ_OK;
  add(&counters_.decode_samples, num_decoded);
  for (int i = 0; i < num_samples; ++i) {
    int32_t status = samples[i].status;
    if (status < 0 && std::exchange(first_failure, IMSEQ_OK) == IMSEQ_OK) {
      // `error` is about the group's first failure: decode this sample alone for its own error.
      status = decoder.decode(recipe_, &samples[i], 1, nullptr, &error);
      if (status == IMSEQ_OK) status = samples[i].status;
    }
    done_with_position(run, positions[i], status, error);
  }
}

// The core has finished a position with `status`; below zero, error says why it failed.
void Engine::done_with_position(const std::shared_ptr<Run>& run, int64_t position, int32_t status,
                                const imseq_error& error) {
  if (status == IMSEQ_NOT_DECODED) {
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

// A position no longer needs its block; the block's last position frees its memory.
void Engine::done_with_block(Run& run, int64_t position) {
  Block& block = run.blocks[run.block[position]];
  if (block.remaining.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::unique_ptr<Loaded> loaded = std::move(block.loaded);
  std::lock_guard lock(mutex_);
  if (!run.cancelled) block_bytes_ -= loaded->reserved_bytes;
  buffers_.give(std::move(loaded->buffer), config_.block_budget_bytes - block_bytes_);
  reading_changed_.notify_all();
}

void Engine::done_with_row(Run& run, int64_t position) {
  if (run.batches[run.batch_of(position)].remaining.fetch_sub(1, std::memory_order_acq_rel) != 1)
    return;
  std::lock_guard lock(mutex_);
  batch_done_.notify_all();
}

void Engine::fail_row(Run& run, int64_t position, const imseq_error& error) {
  {
    std::lock_guard lock(mutex_);
    Batch& failed = run.batches[run.batch_of(position)];
    // Report the first failure in plan order, whichever thread finished first.
    if (failed.error == nullptr || position < failed.error_position) {
      failed.error = std::make_unique<imseq_error>(error);
      failed.error->sample = run.sample[position];
      failed.error_position = position;
    }
  }
  done_with_row(run, position);
}

}  // namespace imseq
