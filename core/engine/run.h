// A plan while it is executed: a copy of its arrays, and the state of its blocks and batches.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "imagenet_seq.h"
#include "read/buffers.h"
#include "read/file_reader.h"

namespace imseq {

enum class BlockState : uint8_t { waiting, reading, ready, failed };

// A block's bytes, from reading to its last sample's decoding.
struct Loaded {
  Buffer buffer;                   // of this block alone; empty where its bytes are kept memory
  const uint8_t* bytes = nullptr;  // in the buffer or in kept memory
  int64_t size_bytes = 0;
  int64_t reserved_bytes = 0;             // what it counts for in the budget
  int64_t generation = 0;                 // of verified samples: see VerifiedSamples
  bool was_kept = false;                  // it was in kept memory: nothing was read
  std::vector<int64_t> offsets, lengths;  // python block: its samples
  std::vector<BadRange> bad;              // what the disk could not read
  std::unique_ptr<imseq_error> error;     // failed
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

template <class T>
std::vector<T> copied(const T* values, int64_t count) {
  return values == nullptr ? std::vector<T>() : std::vector<T>(values, values + count);
}

struct Run {
  const imseq_plan plan;  // for its numbers; its arrays are the caller's
  const std::vector<int64_t> batch_begin = copied(plan.batch_begin, plan.num_batches + 1);
  const std::vector<int64_t> sample = copied(plan.sample, plan.num_positions);
  const std::vector<int64_t> draw = copied(plan.draw, plan.num_positions);
  const std::vector<int32_t> block = copied(plan.block, plan.num_positions);
  const std::vector<int64_t> offset = copied(plan.offset, plan.num_positions);
  const std::vector<int64_t> length = copied(plan.length, plan.num_positions);
  const std::vector<uint32_t> checksum = copied(plan.checksum, plan.num_positions);
  const std::vector<uint8_t> flags = copied(plan.flags, plan.num_positions);
  const std::vector<int32_t> block_file = copied(plan.block_file, plan.num_blocks);
  const std::vector<int64_t> block_offset = copied(plan.block_offset, plan.num_blocks);
  const std::vector<int64_t> block_length = copied(plan.block_length, plan.num_blocks);
  const std::vector<int64_t> block_key = copied(plan.block_key, plan.num_blocks);
  const std::vector<int64_t> path_begin = copied(plan.path_begin, plan.num_files + 1);
  const std::vector<char> paths = copied(plan.paths, path_begin.back());
  const std::string root = plan.root;
  std::vector<int64_t> window_begin;

  std::vector<Block> blocks = std::vector<Block>(static_cast<size_t>(plan.num_blocks));
  std::vector<Batch> batches = std::vector<Batch>(static_cast<size_t>(plan.num_batches));
  std::vector<void*> slot_rows;
  std::atomic<int64_t> next_position{0};
  std::atomic<int64_t> open_batches{0};    // batches below this number have memory
  std::atomic<bool> cancelled{false};      // also where out_of_memory
  std::atomic<bool> out_of_memory{false};  // next reports it

  // Guarded by the engine's mutex.
  std::vector<int32_t> reading_order;   // with windows: block of each place; else the plan's order
  int64_t next_place = 0;               // in the reading order
  int64_t wanted_end = 0;               // decoders wait for a block before this place
  int64_t known_end = plan.num_blocks;  // places before this one have a final order
  bool looks_up = false;                // a reader is finding out the order of the next window
  int64_t python_pending = 0;           // python blocks asked for and not yet there
  int64_t delivered = 0;                // batches returned by next
  int64_t released = 0;                 // slots lent again

  explicit Run(const imseq_plan& copy) : plan(copy) {}

  uint32_t flags_of(int64_t position) const { return flags.empty() ? 0 : flags[position]; }

  // What stands for a position's sample in its key.
  int64_t drawn(int64_t position) const { return draw.empty() ? sample[position] : draw[position]; }

  // Positions below this one have memory for their rows.
  int64_t open_end() const { return batch_begin[open_batches.load(std::memory_order_acquire)]; }

  bool is_read() const { return cancelled || next_place >= plan.num_blocks; }

  bool is_python_block(int64_t number) const { return block_file[number] < 0; }

  int64_t block_at(int64_t place) const {
    return reading_order.empty() ? place : reading_order[place];
  }

  int64_t key_of(int64_t number) const { return block_key.empty() ? -1 : block_key[number]; }

  // When all places before this one are read, the block is.
  int64_t read_by(int64_t number) const {
    if (window_begin.empty()) return number + 1;
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

  std::string path_of_block(int64_t number) const {
    const int32_t file = block_file[number];
    const int64_t begin = path_begin[file], end = path_begin[file + 1];
    std::string path = root;
    if (!path.empty() && path.back() != '/') path += '/';
    return path.append(paths.data() + begin, static_cast<size_t>(end - begin));
  }
};

// Copies a plan. nullptr: it contradicts itself; error says how.
std::shared_ptr<Run> make_run(const imseq_plan& plan, imseq_error* error);

}  // namespace imseq
