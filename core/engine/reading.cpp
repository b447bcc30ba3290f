#include <algorithm>
#include <cstring>
#include <new>
#include <tuple>

#include "abi/status.h"
#include "engine/engine.h"

namespace imseq {

namespace {

// The memory of a block beside its bytes. It counts, because a reader may run through very many
// blocks that are kept.
constexpr int64_t kBlockOverhead = sizeof(Loaded) + 32;

// What a block of known length reserves at most, so that sums don't overflow. A length beyond it is
// damaged, which shows when the file is opened.
constexpr int64_t kMaxBlockBytes = int64_t{1} << 40;

}  // namespace

void Engine::read_thread(int number) {
  FileReader reader(config_.direct != 0);
  std::unique_lock lock(mutex_);
  while (!closed_) {
    const std::shared_ptr<Run> run = run_to_read();
    if (run == nullptr || !may_read(*run)) {
      disk_.rest();
      int64_t idle_ns = 0;  // nothing is left to read, which is not counted as waiting
      Timer timer(run == nullptr ? &idle_ns : &counters_.read_wait_ns);
      reading_changed_.wait(lock);
      continue;
    }
    ++num_reading_;
    reading_[number] = {run, run->block_at(run->next_place), now_ns()};
    try {
      read_next(run, reading_[number], reader, lock);
    } catch (const std::bad_alloc&) {
      if (!lock.owns_lock()) lock.lock();
      fail_run(*run);
    }
    reading_[number] = {};
    --num_reading_;
    thread_left_.notify_all();
    reading_changed_.notify_all();
  }
}

// Looks up a window or reads a block, without the lock.
void Engine::read_next(const std::shared_ptr<Run>& run, Reading& reading, FileReader& reader,
                       std::unique_lock<std::mutex>& lock) {
  if (run->next_place >= run->known_end) {
    run->looks_up = true;
    lock.unlock();
    look_up_window(*run, reading);
    lock.lock();
    run->looks_up = false;
    return;
  }
  const int64_t block = begin_block(*run);
  lock.unlock();
  if (run->is_python_block(block)) {
    push_task(run, IMSEQ_TASK_BLOCK, block, false);
  } else {
    read_block(*run, block, reader);
  }
  lock.lock();
}

// The plan to read from: the prepared one when all blocks of the present one are read. Python
// blocks are made for the present plan only.
std::shared_ptr<Run> Engine::run_to_read() const {
  if (run_ != nullptr && !run_->is_read()) return run_;
  if (prepared_ == nullptr || prepared_->is_read()) return nullptr;
  const int64_t block = prepared_->block_at(prepared_->next_place);
  return prepared_->is_python_block(block) ? nullptr : prepared_;
}

bool Engine::may_read(const Run& run) const {
  if (run.looks_up) return false;
  if (run.next_place < run.wanted_end) return true;
  const int64_t block = run.block_at(run.next_place);
  // The size of a python block is unknown until it comes, so only as many are asked for at a time
  // as there are threads to make them.
  if (run.is_python_block(block) && run.python_pending >= config_.num_decoders) return false;
  return block_bytes_ + cost(run, block) <= config_.block_budget_bytes;
}

// The memory a block will take: exact where its length is known, else the mean.
int64_t Engine::cost(const Run& run, int64_t block) const {
  if (is_kept(run, block)) return kBlockOverhead;
  if (run.block_length[block] < 0) return mean_block_bytes_;
  const int64_t room = FileReader::room(run.block_offset[block], run.block_length[block]);
  return Buffer::capacity_for(std::min(room, kMaxBlockBytes)) + kBlockOverhead;
}

bool Engine::is_kept(const Run& run, int64_t block) const {
  const uint8_t* bytes;
  int64_t size;
  return kept_.find(run.key_of(block), &bytes, &size);
}

// Takes the next block of the reading order; the caller must read it.
int64_t Engine::begin_block(Run& run) {
  const int64_t number = run.block_at(run.next_place++);
  Block& block = run.blocks[number];
  block.loaded = std::make_unique<Loaded>();
  block.loaded->reserved_bytes = cost(run, number);
  block.loaded->generation = verified_.generation();
  block_bytes_ += block.loaded->reserved_bytes;
  block_bytes_peak_ = std::max(block_bytes_peak_, block_bytes_);
  block.state = BlockState::reading;
  if (run.is_python_block(number)) ++run.python_pending;
  return number;
}

DiskRequest Engine::begin_request(const Run& run, bool is_whole) {
  Timer timer(&counters_.read_lock_wait_ns);
  return DiskRequest(&disk_, &run.cancelled, is_whole);
}

// Sorts the files of the next window by their place on the disk. The plan lists them by inode, so
// looking them up is one sweep over the disk; reading them is a second one.
void Engine::look_up_window(Run& run, Reading& reading) {
  const int64_t begin = run.known_end, end = run.read_by(run.next_place);
  std::vector<std::tuple<int64_t, uint64_t, int64_t>> found;  // address, inode and block
  found.reserve(static_cast<size_t>(end - begin));
  for (int64_t block = begin; block < end && !run.cancelled; ++block) {
    FilePlace place;
    imseq_error unused;
    if (run.block_length[block] < 0 && !is_kept(run, block)) {  // a file, not a range of a shard
      {
        std::lock_guard lock(mutex_);
        reading.block = block;
        reading.began_ns = now_ns();
      }
      const DiskRequest request = begin_request(run, false);
      Timer timer(&counters_.read_ns);
      // A failure is reported when the file is read.
      (void)look_up(run.path_of_block(block), &place, &unused);
      add(&counters_.read_lookups, 1);
    }
    found.emplace_back(place.address, place.inode, block);
  }
  std::sort(found.begin(), found.end());
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < found.size(); ++i) {
    run.reading_order[begin + i] = static_cast<int32_t>(std::get<2>(found[i]));
  }
  run.known_end = end;
}

void Engine::read_block(Run& run, int64_t number, FileReader& reader) {
  Loaded& loaded = *run.blocks[number].loaded;  // this thread's alone until the block is ready
  imseq_error error = {};
  int64_t length = run.block_length[number];
  int32_t status = IMSEQ_OK;
  if (kept_.find(run.key_of(number), &loaded.bytes, &length)) {
    add(&counters_.read_kept_bytes, length);
    loaded.was_kept = true;
  } else {
    status = read_file(run, number, reader, &length, &error);
    if (status == IMSEQ_CANCELLED) return;  // nobody waits for the block
  }
  block_came(run, number, length, status, error);
}

// Reads a block from its file, into kept memory where there is room.
int32_t Engine::read_file(Run& run, int64_t number, FileReader& reader, int64_t* length,
                          imseq_error* error) {
  Loaded& loaded = *run.blocks[number].loaded;
  const int64_t offset = run.block_offset[number], key = run.key_of(number);
  const std::string path = run.path_of_block(number);
  int32_t status = reader.open(path, error);
  if (status != IMSEQ_OK) return status;
  if (verifies(run)) loaded.generation = verified_.generation_of(path, reader.file_version());
  if (*length < 0) *length = std::max<int64_t>(0, reader.file_bytes() - offset);
  status = reader.check_range(offset, *length, error);
  if (status != IMSEQ_OK) return status;
  const int64_t room = FileReader::room(offset, *length);
  uint8_t* const kept = kept_.claim(key, room);
  try {
    if (kept == nullptr) take_buffer(loaded, room);
    uint8_t* memory = kept != nullptr ? kept : loaded.buffer.get();
    status = read_into(run, number, reader, *length, memory, error);
    if (kept != nullptr && status == IMSEQ_OK && !loaded.bad.empty()) {  // must not be kept
      take_buffer(loaded, room);
      std::memcpy(loaded.buffer.get(), loaded.bytes, static_cast<size_t>(*length));
      loaded.bytes = loaded.buffer.get();
    }
  } catch (const std::bad_alloc&) {
    status = fail(error, IMSEQ_ERROR_MEMORY, -1, offset, 0,
                  "out of memory for a block of %lld bytes", static_cast<long long>(*length));
  }
  if (kept != nullptr && status == IMSEQ_OK && loaded.bad.empty()) {
    kept_.publish(key, loaded.bytes, *length);
  } else if (kept != nullptr) {
    kept_.give_up(key);
  }
  return status;
}

// Reads a range of the open file. What lies in the page cache needs no turn at the disk.
int32_t Engine::read_into(Run& run, int64_t number, FileReader& reader, int64_t length,
                          uint8_t* memory, imseq_error* error) {
  Loaded& loaded = *run.blocks[number].loaded;
  const int64_t offset = run.block_offset[number];
  bool cached, locked = false;
  {
    Timer timer(&counters_.read_ns);
    cached = reader.read_cached(offset, length, memory, &loaded.bytes);
  }
  if (!cached) {
    const DiskRequest request = begin_request(run, reader.is_direct());
    if (run.cancelled) return IMSEQ_CANCELLED;
    locked = request.has_lock();
    Timer timer(&counters_.read_ns);
    const int32_t status = reader.read(offset, length, memory, &loaded.bytes, &loaded.bad, error);
    if (status != IMSEQ_OK) return status;
  }
  count_request({run.plan.epoch, run.block_file[number], offset, length, reader.was_direct(),
                 locked, cached, 0});
  return IMSEQ_OK;
}

void Engine::count_request(const imseq_request& request) {
  std::lock_guard lock(mutex_);
  add(&counters_.read_seeks, request.file != last_file_ || request.offset != last_end_);
  last_file_ = request.file;
  last_end_ = request.offset + request.length;
  add(&counters_.read_requests, 1);
  add(&counters_.read_direct_requests, request.direct);
  add(&counters_.read_bytes, request.length);
  if (request.cached != 0) add(&counters_.read_cached_bytes, request.length);
  if (config_.record_requests != 0) recorded_.push_back(request);
}

// Throws std::bad_alloc.
void Engine::take_buffer(Loaded& loaded, int64_t size_bytes) {
  std::lock_guard lock(mutex_);
  loaded.buffer = buffers_.get(size_bytes);
}

// A block's bytes are in place, or `status` is below zero and error says why there are none.
void Engine::block_came(Run& run, int64_t number, int64_t size_bytes, int32_t status,
                        const imseq_error& error) {
  std::lock_guard lock(mutex_);
  if (run.is_python_block(number)) {
    --run.python_pending;
    reading_changed_.notify_all();
  }
  Block& block = run.blocks[number];
  Loaded& loaded = *block.loaded;
  const bool is_new = status == IMSEQ_OK && !loaded.was_kept;
  if (status == IMSEQ_OK) {
    loaded.size_bytes = size_bytes;
  } else {
    loaded.error = std::make_unique<imseq_error>(error);
  }
  if (!run.cancelled) {
    int64_t in_use = loaded.buffer.capacity_bytes + kBlockOverhead;
    if (is_new && loaded.buffer.get() == nullptr) in_use += size_bytes;  // new in kept memory
    if (is_new && run.block_length[number] < 0) {
      mean_block_bytes_ += (in_use - mean_block_bytes_) / 16;
    }
    block_bytes_ += in_use - loaded.reserved_bytes;
    block_bytes_peak_ = std::max(block_bytes_peak_, block_bytes_);
    loaded.reserved_bytes = in_use;
  }
  block.state.store(status == IMSEQ_OK ? BlockState::ready : BlockState::failed,
                    std::memory_order_release);
  block_changed_.notify_all();
}

}  // namespace imseq
