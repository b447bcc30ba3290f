#include "engine/run.h"

#include <numeric>

#include "abi/status.h"

namespace imseq {

namespace {

// length -1: up to the end.
bool is_range_of_plan(int64_t offset, int64_t length) {
  return is_range(offset, length == -1 ? 0 : length);
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
  if (has_null({plan.batch_begin, plan.path_begin, plan.root})) {
    return wrong("batch_begin, path_begin or root is NULL");
  }
  if (plan.num_positions > 0 && has_null({plan.sample, plan.block, plan.offset, plan.length})) {
    return wrong("a column of the positions is NULL");
  }
  if (plan.num_blocks > 0 && has_null({plan.block_file, plan.block_offset, plan.block_length})) {
    return wrong("a column of the blocks is NULL");
  }
  for (int64_t i = 0; i < plan.num_positions; ++i) {
    if (plan.block[i] < 0 || plan.block[i] >= plan.num_blocks)
      return wrong("block is out of range");
    if (!is_range_of_plan(plan.offset[i], plan.length[i])) {
      return wrong("offset or length is out of range");
    }
    if (plan.sample[i] < 0) return wrong("sample is negative");
  }
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    if (plan.block_file[i] < -1 || plan.block_file[i] >= plan.num_files) {
      return wrong("block_file is out of range");
    }
    if (!is_range_of_plan(plan.block_offset[i], plan.block_length[i])) {
      return wrong("block_offset or block_length is out of range");
    }
    if (plan.num_windows > 0 && plan.block_file[i] < 0) return wrong("a window has python blocks");
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
  for (int64_t i = 0; i < plan.num_batches; ++i) {
    const int64_t num_rows = plan.batch_begin[i + 1] - plan.batch_begin[i];
    if (num_rows <= plan.slot_rows) continue;
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "plan: batch %lld has %lld rows, its memory %lld", static_cast<long long>(i),
                static_cast<long long>(num_rows), static_cast<long long>(plan.slot_rows));
  }
  if (!rises_from_zero(plan.path_begin, plan.num_files))
    return wrong("path_begin must rise from 0");
  if (plan.path_begin[plan.num_files] > 0 && plan.paths == nullptr) return wrong("paths is NULL");
  return IMSEQ_OK;
}

}  // namespace

std::shared_ptr<Run> make_run(const imseq_plan& plan, imseq_error* error) {
  if (check_plan(plan, error) != IMSEQ_OK) return nullptr;
  auto run = std::make_shared<Run>(plan);
  if (plan.num_windows > 0) {
    run->window_begin = copied(plan.window_begin, plan.num_windows + 1);
    run->reading_order.resize(static_cast<size_t>(plan.num_blocks));
    std::iota(run->reading_order.begin(), run->reading_order.end(), 0);
    run->known_end = 0;
  }
  for (int64_t i = 0; i < plan.num_positions; ++i) {
    run->blocks[run->block[i]].remaining.fetch_add(1, std::memory_order_relaxed);
  }
  const auto is_empty = [](const Block& block) { return block.remaining == 0; };
  if (std::any_of(run->blocks.begin(), run->blocks.end(), is_empty)) {
    (void)fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "plan: a block holds no position");
    return nullptr;
  }
  for (int64_t i = 0; i < plan.num_batches; ++i) {
    run->batches[i].remaining = run->batch_begin[i + 1] - run->batch_begin[i];
  }
  return run;
}

}  // namespace imseq
