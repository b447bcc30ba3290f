// The engine without Python: order, back-pressure, failures, cancellation, fork. Samples are tiny
// JPEGs of one colour. Either every row is handed out as bytes, to be compared with the files, or
// the engine decodes, several samples at a time.

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <sys/uio.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "imagenet_seq.h"
#include "read/crc32c.h"
#include "read/disk_lock.h"

namespace {

// Allocations that the engine's threads have left; the next one fails. Below zero: none fails.
std::atomic<int64_t> num_allocations_left{-1};
thread_local bool is_thread_of_test = false;

}  // namespace

void* operator new(size_t size, const std::nothrow_t&) noexcept {
  const bool fails = !is_thread_of_test && num_allocations_left >= 0 && num_allocations_left-- == 0;
  return fails ? nullptr : std::malloc(std::max<size_t>(size, 1));
}

void* operator new(size_t size) {
  void* const memory = operator new(size, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

#if defined(__linux__)

// Bytes of a file that the disk cannot read; pread() and preadv2() below look here.
struct {
  std::atomic<uint64_t> inode{0};  // 0: the disk is sound
  std::atomic<int64_t> begin{0}, end{0};
} bad_sector;

// A disk that answers only while `answers` is true; nothing of it lies in the page cache.
struct {
  std::atomic<bool> is_used{false}, answers{true};
  std::atomic<int> num_requests{0};
} slow_disk;

bool is_on_bad_sector(int file, size_t size, off_t offset) {
  struct stat info;
  if (bad_sector.inode == 0 || ::fstat(file, &info) != 0 || info.st_ino != bad_sector.inode) {
    return false;
  }
  return offset < bad_sector.end && offset + static_cast<int64_t>(size) > bad_sector.begin;
}

}  // namespace

extern "C" ssize_t pread(int file, void* bytes, size_t size, off_t offset) {
  ++slow_disk.num_requests;
  while (!slow_disk.answers) usleep(100);
  if (is_on_bad_sector(file, size, offset)) {
    errno = EIO;
    return -1;
  }
  return ::syscall(SYS_pread64, file, bytes, size, offset);
}

// The engine calls it with RWF_NOWAIT. While the disk is bad or slow the page cache is empty.
extern "C" ssize_t preadv2(int file, const iovec* ranges, int count, off_t offset, int flags) {
  if (bad_sector.inode != 0 || slow_disk.is_used) {
    errno = EAGAIN;
    return -1;
  }
  return ::syscall(SYS_preadv2, file, ranges, count, offset, 0, flags);
}

namespace {

#endif

constexpr int kSidePx = 8;
constexpr int64_t kSampleBytes = 154;
constexpr int64_t kRowBytes = 3 * kSidePx * kSidePx;  // of both kinds: a sample fits in a row
constexpr int64_t kSecond = 1'000'000'000;

// A grey JPEG of 8 x 8 pixels whose comment is the sample's number, and whose colour follows from
// it. Every eleventh is not a JPEG, so the core can't decode it.
std::vector<uint8_t> sample_bytes(int64_t number) {
  std::vector<uint8_t> bytes = {0xFF, 0xD8, 0xFF, 0xFE, 0, 10};
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<uint8_t>(number >> (8 * i)));
  bytes.insert(bytes.end(), {0xFF, 0xDB, 0, 67, 0, 8});  // one step of DC is one step of grey
  bytes.insert(bytes.end(), 63, 1);
  bytes.insert(bytes.end(), {0xFF, 0xC0, 0, 11, 8, 0, kSidePx, 0, kSidePx, 1, 1, 0x11, 0});
  for (const uint8_t table : {0x00, 0x10}) {  // one code: DC of seven bits, or end of block
    bytes.insert(bytes.end(), {0xFF, 0xC4, 0, 20, table, 1});
    bytes.insert(bytes.end(), 15, 0);
    bytes.push_back(table == 0 ? 7 : 0);
  }
  const auto bits = static_cast<uint8_t>(number * 37 & 127);
  bytes.insert(bytes.end(), {0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0, bits, 0x7F, 0xFF, 0xD9});
  if (number % 11 == 5) bytes[0] = 0;
  return bytes;
}

bool is_python_row(int64_t number) { return number % 11 == 5; }

uint8_t colour_of(int64_t number) {
  if (is_python_row(number)) return 7;  // as the threads that play Python paint it
  const int bits = static_cast<int>(number * 37 & 127);
  return static_cast<uint8_t>(128 + (bits >= 64 ? bits : bits - 127));
}

// Files of samples of one size.
class Dataset {
 public:
  Dataset(int64_t num_files, int64_t samples_per_file)
      : num_files_(num_files), per_file_(samples_per_file) {
    char pattern[] = "/tmp/imseq_engine_XXXXXX";
    root_ = mkdtemp(pattern);
    for (int64_t file = 0; file < num_files; ++file) {
      std::FILE* out = std::fopen(path(file).c_str(), "wb");
      for (int64_t i = 0; i < samples_per_file; ++i) {
        const std::vector<uint8_t> bytes = sample_bytes(file * samples_per_file + i);
        std::fwrite(bytes.data(), 1, bytes.size(), out);
      }
      std::fclose(out);
    }
  }
  ~Dataset() { std::filesystem::remove_all(root_); }

  std::string path(int64_t file) const { return root_ + "/f" + std::to_string(file); }
  const std::string& root() const { return root_; }
  int64_t size() const { return num_files_ * per_file_; }
  int64_t num_files() const { return num_files_; }
  int64_t per_file() const { return per_file_; }

 private:
  int64_t num_files_, per_file_;
  std::string root_;
};

// A plan that reads each file as one block, with the samples of two neighbouring blocks
// interleaved.
struct Plan {
  std::vector<int64_t> batch_begin, sample, offset, length, block_offset, block_length, path_begin;
  std::vector<int64_t> block_key, window_begin;
  std::vector<int32_t> block, block_file;
  std::vector<uint32_t> checksum;
  std::vector<uint8_t> flags;
  std::string paths;
  imseq_plan native = {};

  Plan(const Dataset& data, int64_t batch_size, bool python_blocks = false) {
    path_begin.push_back(0);
    for (int64_t file = 0; file < data.num_files(); ++file) {
      paths += "f" + std::to_string(file);
      path_begin.push_back(static_cast<int64_t>(paths.size()));
      block_file.push_back(python_blocks ? -1 : static_cast<int32_t>(file));
      block_offset.push_back(python_blocks ? file : 0);
      block_length.push_back(python_blocks ? -1 : data.per_file() * kSampleBytes);
      block_key.push_back(python_blocks ? -1 : file);
    }
    for (int64_t pair = 0; pair < data.num_files(); pair += 2) {
      for (int64_t i = 0; i < data.per_file(); ++i) {
        for (int64_t file = pair; file < std::min(pair + 2, data.num_files()); ++file) {
          sample.push_back(file * data.per_file() + i);
          block.push_back(static_cast<int32_t>(file));
          offset.push_back(python_blocks ? i : i * kSampleBytes);
          length.push_back(kSampleBytes);
          const std::vector<uint8_t> bytes = sample_bytes(sample.back());
          checksum.push_back(imseq::crc32c(0, bytes.data(), bytes.size()));
          flags.push_back(sample.back() % 5 < 2 ? IMSEQ_SAMPLE_CLEAN : 0);
        }
      }
    }
    for (int64_t begin = 0; begin < data.size(); begin += batch_size) batch_begin.push_back(begin);
    batch_begin.push_back(data.size());
    native.num_positions = data.size();
    native.num_batches = static_cast<int64_t>(batch_begin.size()) - 1;
    native.num_blocks = native.num_files = data.num_files();
    native.slot_rows = batch_size;
    native.batch_begin = batch_begin.data();
    native.sample = sample.data();
    native.block = block.data();
    native.offset = offset.data();
    native.length = length.data();
    native.checksum = checksum.data();
    native.flags = flags.data();
    native.block_file = block_file.data();
    native.block_offset = block_offset.data();
    native.block_length = block_length.data();
    native.root = data.root().c_str();
    native.paths = paths.data();
    native.path_begin = path_begin.data();
    native.block_key = block_key.data();
  }

  // Files of unknown length, read in windows of three.
  void use_windows() {
    std::fill(block_length.begin(), block_length.end(), -1);
    for (int64_t begin = 0; begin < native.num_blocks; begin += 3) window_begin.push_back(begin);
    window_begin.push_back(native.num_blocks);
    native.window_begin = window_begin.data();
    native.num_windows = static_cast<int64_t>(window_begin.size()) - 1;
  }
};

// An engine, its slots and the threads that play Python.
class Harness {
 public:
  Harness(const Dataset& data, int decoders, int slots, int64_t batch_size, int64_t budget,
          int32_t rows = IMSEQ_ROWS_FROM_BYTES, imseq_engine_config config = {})
      : data_(data), rows_(rows), memory_(slots, std::vector<uint8_t>(batch_size * kRowBytes)) {
    config.num_decoders = decoders;
    if (config.num_readers == 0) config.num_readers = 2;
    config.num_slots = slots;
    config.rows = rows;
    config.verify_checksums = 1;
    config.recipe.geometry = IMSEQ_GEOMETRY_FIXED_CROP;
    config.recipe.out_height = config.recipe.fixed_height = kSidePx;
    config.recipe.out_width = config.recipe.fixed_width = kSidePx;
    config.recipe.filter = IMSEQ_FILTER_BILINEAR;
    config.row_bytes = kRowBytes;
    config.block_budget_bytes = budget;
    CHECK(imseq_engine_create(&config, &engine, &error) == IMSEQ_OK);
    for (int i = 0; i < 2; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Harness() {
    CHECK(imseq_engine_close(engine, nullptr) == IMSEQ_OK);
    for (std::thread& thread : threads_) thread.join();
    imseq_engine_destroy(engine);
  }

  int32_t start(const Plan& plan) { return start(&plan.native); }
  int32_t start_prepared() { return start(nullptr); }

  int32_t prepare(const Plan& plan) { return imseq_engine_prepare(engine, &plan.native, &error); }

  void deliver(const Plan& plan) {
    for (int64_t b = 0; b < plan.native.num_batches; ++b) CHECK(step(plan, b) == IMSEQ_OK);
    CHECK(step(plan, -1) == IMSEQ_END);
  }

  // The blocks that were read since the last call; each block of a Dataset is a file.
  std::vector<int64_t> files_read() {
    std::vector<imseq_request> requests(10000);
    int64_t count = 0;
    CHECK(imseq_engine_requests(engine, requests.data(), static_cast<int64_t>(requests.size()),
                                &count, &error) == IMSEQ_OK);
    std::vector<int64_t> files;
    for (int64_t i = 0; i < count; ++i) files.push_back(requests[i].file);
    return files;
  }

  // Takes one batch, compares it with the plan, lends its memory again.
  int32_t step(const Plan& plan, int64_t expected_batch) {
    const int32_t status = receive(plan, expected_batch);
    if (status == IMSEQ_OK) lend(expected_batch);
    return status;
  }

  int32_t receive(const Plan& plan, int64_t expected_batch) {
    imseq_batch batch = {};
    const int32_t status = imseq_engine_next(engine, 20 * kSecond, &batch, &error);
    if (status != IMSEQ_OK) return status;
    CHECK(batch.batch == expected_batch);
    CHECK(batch.begin == plan.batch_begin[expected_batch]);
    for (int64_t p = batch.begin; p < batch.end; ++p) {
      const std::vector<uint8_t> want = expected_row(plan.sample[p]);
      CHECK(std::memcmp(row(batch.slot, p - batch.begin), want.data(), want.size()) == 0);
    }
    return status;
  }

  void lend(int64_t batch) {
    const auto slot = static_cast<int32_t>(batch % static_cast<int64_t>(memory_.size()));
    CHECK(imseq_engine_release(engine, slot, memory_[slot].data(), &error) == IMSEQ_OK);
  }

  uint8_t* row(int64_t slot, int64_t index) { return memory_[slot].data() + index * kRowBytes; }

  imseq_stats stats() const {
    imseq_stats stats = {};
    CHECK(imseq_engine_stats(engine, &stats, nullptr) == IMSEQ_OK);
    return stats;
  }

  imseq_engine* engine = nullptr;
  imseq_error error = {};
  std::atomic<int64_t> fail_sample{-1};
  std::atomic<bool> slow{false};
  std::atomic<bool> hold_block_0{false};

 private:
  int32_t start(const imseq_plan* plan) {
    std::vector<void*> rows;
    for (auto& slot : memory_) {
      std::fill(slot.begin(), slot.end(), uint8_t{0xEE});
      rows.push_back(slot.data());
    }
    return imseq_engine_start(engine, plan, rows.data(), &error);
  }

  std::vector<uint8_t> expected_row(int64_t sample) const {
    if (rows_ == IMSEQ_ROWS_READ) return std::vector<uint8_t>(kRowBytes, 0xEE);  // not touched
    if (rows_ == IMSEQ_ROWS_FROM_BYTES) return sample_bytes(sample);
    return std::vector<uint8_t>(kRowBytes, colour_of(sample));
  }

  void serve() {
    is_thread_of_test = true;
    imseq_task task = {};
    while (imseq_engine_take(engine, 60 * kSecond, &task, nullptr) == IMSEQ_OK) {
      if (task.kind == IMSEQ_TASK_BLOCK) {
        if (slow) usleep(300);
        while (task.sample == 0 && hold_block_0) usleep(100);
        std::vector<uint8_t> bytes;
        std::vector<int64_t> offsets, lengths;
        for (int64_t i = 0; i < data_.per_file(); ++i) {
          const std::vector<uint8_t> one = sample_bytes(task.sample * data_.per_file() + i);
          offsets.push_back(static_cast<int64_t>(bytes.size()));
          lengths.push_back(static_cast<int64_t>(one.size()));
          bytes.insert(bytes.end(), one.begin(), one.end());
        }
        const int32_t status = imseq_engine_finish_block(
            engine, task.ticket, bytes.data(), static_cast<int64_t>(bytes.size()), offsets.data(),
            lengths.data(), data_.per_file(), nullptr, nullptr);
        CHECK(status == IMSEQ_OK || status == IMSEQ_CANCELLED);
        continue;
      }
      if (slow) usleep(500);
      const bool broken = task.sample == fail_sample;
      if (rows_ == IMSEQ_ROWS_DECODED) {
        CHECK(is_python_row(task.sample));
        std::memset(task.row, colour_of(task.sample), kRowBytes);
      } else if (!broken) {
        std::memcpy(task.row, task.bytes, static_cast<size_t>(std::min(task.size, kRowBytes)));
      }
      const int32_t status = imseq_engine_finish_row(
          engine, task.ticket, broken ? "broken on purpose" : nullptr, nullptr);
      CHECK(status == IMSEQ_OK || status == IMSEQ_CANCELLED);
    }
  }

  const Dataset& data_;
  const int32_t rows_;
  std::vector<std::vector<uint8_t>> memory_;
  std::vector<std::thread> threads_;
};

void whole_epochs_arrive_in_order() {
  const Dataset data(7, 53);
  for (const bool python_blocks : {false, true}) {
    for (const int decoders : {1, 8}) {
      for (const int slots : {1, 3}) {
        for (const int64_t budget : {int64_t{0}, int64_t{1} << 20}) {
          const Plan plan(data, 16, python_blocks);
          Harness harness(data, decoders, slots, 16, budget);
          for (int epoch = 0; epoch < 2; ++epoch) {
            CHECK(harness.start(plan) == IMSEQ_OK);
            for (int64_t b = 0; b < plan.native.num_batches; ++b) {
              CHECK(harness.step(plan, b) == IMSEQ_OK);
            }
            CHECK(harness.step(plan, -1) == IMSEQ_END);
          }
          const imseq_stats stats = harness.stats();
          CHECK(stats.batch_count == 2 * plan.native.num_batches);
          CHECK(stats.python_rows == 2 * data.size());
          CHECK(stats.python_blocks == (python_blocks ? 2 * data.num_files() : 0));
          CHECK(stats.read_bytes == (python_blocks ? 0 : 2 * data.size() * kSampleBytes));
          CHECK(stats.block_bytes == 0);
          if (budget == 0 && !python_blocks) {
            // The plan needs two blocks at once; each reader may be one ahead of that.
            // A block counts with its memory: 16 KB, and a little for the engine itself.
            CHECK(data.per_file() * kSampleBytes < (16 << 10) - 4096);
            CHECK(stats.block_bytes_peak <= 4 * ((16 << 10) + 512));
          }
        }
      }
    }
  }
}

void failures_come_when_their_batch_does() {
  const Dataset data(4, 40);
  const auto expect = [&](Harness& harness, const Plan& plan, int64_t position, int32_t status) {
    CHECK(harness.start(plan) == IMSEQ_OK);
    const int64_t failing = position / 8;
    for (int64_t b = 0; b < failing; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
    CHECK(harness.step(plan, failing) == status);
    CHECK(harness.error.sample == plan.sample[position]);
    CHECK(harness.step(plan, failing) == status);  // and stays
    CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
  };
  {
    Plan plan(data, 8);
    Harness harness(data, 4, 2, 8, 1 << 20);
    harness.fail_sample = plan.sample[61];
    expect(harness, plan, 61, IMSEQ_ERROR_SAMPLE);
    CHECK(std::strcmp(harness.error.message, "broken on purpose") == 0);
  }
  {
    Plan plan(data, 8);
    plan.checksum[99] ^= 1;
    Harness harness(data, 4, 2, 8, 1 << 20);
    expect(harness, plan, 99, IMSEQ_ERROR_DATA);
  }
  {
    Plan plan(data, 8);
    plan.length[33] = 41 * kSampleBytes;  // beyond the block
    Harness harness(data, 4, 2, 8, 1 << 20);
    expect(harness, plan, 33, IMSEQ_ERROR_DATA);
  }
  for (const int64_t length : {int64_t{1} << 40, int64_t{1} << 61}) {
    Plan plan(data, 8);
    plan.block_length[1] = length;  // no memory is taken for what the file does not have
    Harness harness(data, 4, 2, 8, 1 << 20);
    expect(harness, plan, 1, IMSEQ_ERROR_DATA);
    CHECK(std::strstr(harness.error.message, data.path(1).c_str()) != nullptr);
    CHECK(std::strstr(harness.error.message, "truncated") != nullptr);
    CHECK(harness.stats().block_bytes_peak < int64_t{1} << 50);
  }
  {
    Plan plan(data, 8);
    plan.paths[5] = 'x';  // the third file does not exist
    Harness harness(data, 4, 2, 8, 1 << 20);
    expect(harness, plan, 80, IMSEQ_ERROR_READ);
    CHECK(harness.error.os_errno == ENOENT);
  }
  {
    Plan plan(data, 8);
    CHECK(truncate(data.path(3).c_str(), 100) == 0);
    Harness harness(data, 4, 2, 8, 1 << 20);
    expect(harness, plan, 81, IMSEQ_ERROR_DATA);
  }
}

int64_t num_python_rows(const Plan& plan) {
  return std::count_if(plan.sample.begin(), plan.sample.end(), is_python_row);
}

// Groups of clean and other samples, with python rows among them, across batches of any size.
void groups_arrive_in_order() {
  const Dataset data(5, 61);
  for (const bool python_blocks : {false, true}) {
    for (const int decoders : {1, 3, 16}) {
      for (const int64_t batch_size : {1, 3, 32}) {
        for (const int slots : {1, 4}) {
          const Plan plan(data, batch_size, python_blocks);
          Harness harness(data, decoders, slots, batch_size, 1 << 14, IMSEQ_ROWS_DECODED);
          CHECK(harness.start(plan) == IMSEQ_OK);
          for (int64_t b = 0; b < plan.native.num_batches; ++b) {
            CHECK(harness.step(plan, b) == IMSEQ_OK);
          }
          CHECK(harness.step(plan, -1) == IMSEQ_END);
          const imseq_stats stats = harness.stats();
          CHECK(stats.python_rows == num_python_rows(plan));
          CHECK(stats.decode_samples == data.size() - num_python_rows(plan));
          CHECK(stats.decode_ns > 0);
          CHECK(stats.block_bytes == 0);
        }
      }
    }
  }
}

void memory_may_be_lent_late() {
  const Dataset data(5, 61);
  const Plan plan(data, 6);
  const int64_t num_slots = 3;
  Harness harness(data, 4, num_slots, 6, 1 << 14, IMSEQ_ROWS_DECODED);
  CHECK(harness.start(plan) == IMSEQ_OK);
  for (int64_t b = 0; b < plan.native.num_batches; ++b) {
    CHECK(harness.receive(plan, b) == IMSEQ_OK);
    if (b < num_slots - 1) continue;  // from then on a batch's memory is all that is lent
    if (b % 7 == 0) usleep(2000);     // all threads wait
    harness.lend(b - (num_slots - 1));
  }
  CHECK(harness.receive(plan, -1) == IMSEQ_END);
}

void a_late_block_holds_up_its_own_samples_only() {
  const Dataset data(9, 1);
  const Plan plan(data, 9, true);
  Harness harness(data, 2, 1, 9, 1 << 20, IMSEQ_ROWS_DECODED);
  harness.hold_block_0 = true;
  CHECK(harness.start(plan) == IMSEQ_OK);
  const int64_t others = data.size() - 1;
  for (int i = 0; i < 5000; ++i) {
    const imseq_stats stats = harness.stats();
    if (stats.decode_samples + stats.python_rows == others) break;
    usleep(1000);
  }
  const imseq_stats stats = harness.stats();
  CHECK(stats.decode_samples + stats.python_rows == others);
  imseq_batch batch = {};
  CHECK(imseq_engine_next(harness.engine, 0, &batch, nullptr) == IMSEQ_TIMEOUT);
  harness.hold_block_0 = false;
  CHECK(harness.step(plan, 0) == IMSEQ_OK);
}

void failures_inside_groups() {
  const Dataset data(4, 40);
  for (int64_t position = 56; position < 72; ++position) {
    for (const int64_t second : {position + 1, position + 9}) {
      Plan plan(data, 8);
      plan.checksum[position] ^= 1;
      plan.length[second] = 41 * kSampleBytes;
      Harness harness(data, 2, 3, 8, 1 << 20, IMSEQ_ROWS_DECODED);
      CHECK(harness.start(plan) == IMSEQ_OK);
      for (int64_t b = 0; b < position / 8; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
      CHECK(harness.step(plan, position / 8) == IMSEQ_ERROR_DATA);
      CHECK(harness.error.sample == plan.sample[position]);  // the first in plan order
      CHECK(std::strstr(harness.error.message, "CRC-32C") != nullptr);
    }
  }
}

// After cancel no thread of the core touches lent memory, whatever it was decoding.
void cancel_in_the_middle_of_groups() {
  const Dataset data(6, 50);
  const Plan plan(data, 30);
  const int64_t num_slots = 4;
  Harness harness(data, 4, num_slots, 30, 1 << 20, IMSEQ_ROWS_DECODED);
  for (int round = 0; round < 60; ++round) {
    CHECK(harness.start(plan) == IMSEQ_OK);
    for (int i = 0; i < round * 10; ++i) std::this_thread::yield();
    CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
    const auto each_row_of_the_core = [&](auto action) {
      for (int64_t p = 0; p < num_slots * 30; ++p) {
        if (!is_python_row(plan.sample[p])) action(harness.row(p / 30, p % 30));
      }
    };
    each_row_of_the_core([](uint8_t* row) { std::memset(row, 0xEE, kRowBytes); });
    usleep(300);
    each_row_of_the_core([](const uint8_t* row) {
      CHECK(std::all_of(row, row + kRowBytes, [](uint8_t byte) { return byte == 0xEE; }));
    });
    usleep(1000);  // threads that play Python may still write to rows they hold
  }
  CHECK(harness.start(plan) == IMSEQ_OK);
  for (int64_t b = 0; b < plan.native.num_batches; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
}

// Wrong checksums: of the later half at first, then of all. The former half was right once.
void checksums_are_compared_until_they_were_right() {
  const Dataset data(2, 100);
  Plan plan(data, 20);
  const int64_t half = data.size() / 2, num_batches = plan.native.num_batches;
  Harness harness(data, 3, 3, 20, 1 << 20, IMSEQ_ROWS_DECODED);
  const auto spoil = [&](int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end; ++position) plan.checksum[position] ^= 1;
  };
  spoil(half, data.size());
  for (int epoch = 0; epoch < 3; ++epoch) {  // what failed is compared again
    CHECK(harness.start(plan) == IMSEQ_OK);
    for (int64_t b = 0; b < num_batches / 2; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
    CHECK(harness.step(plan, num_batches / 2) == IMSEQ_ERROR_DATA);
    CHECK(harness.error.sample == plan.sample[half]);
    CHECK(std::strstr(harness.error.message, "CRC-32C") != nullptr);
    CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
    if (epoch == 0) spoil(0, half);
  }
  spoil(half, data.size());
  CHECK(harness.start(plan) == IMSEQ_OK);
  for (int64_t b = 0; b < num_batches; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
  CHECK(harness.stats().decode_samples > 0);
}

// Memory that a thread of the engine can't have ends the plan, and not the process.
void a_failed_allocation_is_an_error() {
  const Dataset data(6, 50);
  Plan files(data, 10), windows(data, 10), blocks(data, 10, true);
  windows.use_windows();
  imseq_engine_config config = {};
  config.record_requests = 1;
  for (const Plan* plan : {&files, &windows, &blocks}) {
    int64_t num_failed = 0, allowed = 0;
    for (bool has_failed = true; has_failed || allowed < 50; ++allowed) {
      Harness harness(data, 2, 2, 10, 1 << 20, IMSEQ_ROWS_DECODED, config);
      num_allocations_left = allowed;
      CHECK(harness.start(*plan) == IMSEQ_OK);
      int32_t status = IMSEQ_OK;
      for (int64_t b = 0; b < plan->native.num_batches && status == IMSEQ_OK; ++b) {
        status = harness.step(*plan, b);
      }
      has_failed = num_allocations_left.exchange(-1) < 0;
      num_failed += status == IMSEQ_ERROR_MEMORY;
      CHECK(status == IMSEQ_OK || (has_failed && status == IMSEQ_ERROR_MEMORY));
      CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
      usleep(1000);  // threads that play Python may still write to rows they hold
      CHECK(harness.start(*plan) == IMSEQ_OK);
      harness.deliver(*plan);
      CHECK(harness.stats().block_bytes == 0);
    }
    CHECK(num_failed > 20);
  }
}

// A file changes while blocks of its old content wait to be decoded. That their checksums are right
// says nothing about the new content.
void a_changed_file_is_verified_again() {
  const Dataset data(2, 50);
  const Plan plan(data, 50);
  imseq_engine_config config = {};
  config.record_requests = 1;
  Harness harness(data, 1, 1, 50, 1 << 20, IMSEQ_ROWS_DECODED, config);
  const auto wait_for_requests = [&](size_t num_requests) {
    for (size_t count = 0; count < num_requests; usleep(100)) count += harness.files_read().size();
  };
  CHECK(harness.start(plan) == IMSEQ_OK);
  wait_for_requests(2);
  const int64_t changed = plan.sample[70];  // of the second batch, which has no slot yet
  const std::string path = data.path(changed / data.per_file());
  const int file = ::open(path.c_str(), O_WRONLY);
  const uint8_t byte = 0xAA;
  CHECK(::pwrite(file, &byte, 1, changed % data.per_file() * kSampleBytes + 8) == 1);
  const timespec times[2] = {{1, 0}, {1, 0}};
  CHECK(::futimens(file, times) == 0);
  ::close(file);
  CHECK(harness.prepare(plan) == IMSEQ_OK);
  wait_for_requests(2);
  harness.deliver(plan);
  CHECK(harness.start_prepared() == IMSEQ_OK);
  CHECK(harness.step(plan, 0) == IMSEQ_OK);
  CHECK(harness.step(plan, 1) == IMSEQ_ERROR_DATA);
  CHECK(harness.error.sample == changed);
}

// A file that is cut short while an epoch reads it is an error, whatever lies in the page cache.
void a_file_cut_short_while_it_is_read() {
  const Dataset data(2, 9000);
  const Plan plan(data, 100);
  Harness harness(data, 2, 2, 100, int64_t{1} << 26);
  CHECK(harness.start(plan) == IMSEQ_OK);
  CHECK(harness.step(plan, 0) == IMSEQ_OK);
  CHECK(truncate(data.path(0).c_str(), 0) == 0 && truncate(data.path(1).c_str(), 0) == 0);
  // What was read is a copy.
  for (int64_t b = 1; b < plan.native.num_batches; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
  CHECK(harness.step(plan, -1) == IMSEQ_END);
  CHECK(harness.start(plan) == IMSEQ_OK);
  CHECK(harness.step(plan, 0) == IMSEQ_ERROR_DATA);
  CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
}

// The next plan is read while the present one is delivered; then it begins, or another one does, or
// nothing. Meanwhile another thread asks for counters and pending requests.
void prepared_plans_start_or_are_dropped() {
  const Dataset data(8, 40);
  Plan first(data, 16), second(data, 10), third(data, 16);
  third.use_windows();
  const Plan* const plans[] = {&first, &second, &third};
  for (const int64_t budget : {int64_t{0}, 3 * data.per_file() * kSampleBytes, int64_t{1} << 20}) {
    imseq_engine_config config = {};
    config.num_readers = 4;
    config.record_requests = 1;
    Harness harness(data, 4, 3, 16, budget, IMSEQ_ROWS_DECODED, config);
    std::atomic<bool> done{false};
    std::thread observer([&] {
      while (!done) {
        imseq_pending pending = {};
        CHECK(imseq_engine_pending(harness.engine, &pending, nullptr) == IMSEQ_OK);
        CHECK(harness.stats().block_bytes >= 0);
        usleep(200);
      }
    });
    for (int round = 0; round < 60; ++round) {
      const Plan& present = *plans[round % 3];
      const Plan& ahead = *plans[round / 3 % 3];
      const Plan& other = *plans[round / 9 % 3];
      CHECK(harness.start(present) == IMSEQ_OK);
      if (round % 5 != 0) CHECK(harness.prepare(ahead) == IMSEQ_OK);
      if (round % 5 == 1) CHECK(harness.prepare(other) == IMSEQ_OK);
      for (int i = 0; i < round * 5; ++i) std::this_thread::yield();
      if (round % 5 == 2) {  // in the middle
        CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
        CHECK(harness.start_prepared() == IMSEQ_ERROR_ARGUMENT);
        usleep(1000);  // rows that the threads hold are written to until they are finished
      } else {
        harness.deliver(present);
        if (round % 5 == 1 || round % 5 == 3) {
          CHECK(harness.start_prepared() == IMSEQ_OK);
          harness.deliver(round % 5 == 1 ? other : ahead);
        }
      }
    }
    CHECK(harness.start(first) == IMSEQ_OK);  // drops what the last round prepared
    harness.deliver(first);
    CHECK(harness.stats().block_bytes == 0);
    done = true;
    observer.join();
  }
}

void nothing_is_read_twice() {
  const Dataset data(9, 20);
  const Plan plan(data, 16);
  const int64_t num_ahead = 4;  // blocks that there is room for
  imseq_engine_config config = {};
  config.num_readers = 1;
  config.record_requests = 1;
  CHECK(data.per_file() * kSampleBytes <= 4096);  // in memory 16 KB, and a little for the engine
  Harness harness(data, 3, 2, 16, num_ahead * ((16 << 10) + 512), IMSEQ_ROWS_READ, config);
  std::vector<int64_t> files;
  CHECK(harness.start(plan) == IMSEQ_OK);
  for (int64_t epoch = 0; epoch < 5; ++epoch) {
    CHECK(harness.prepare(plan) == IMSEQ_OK);
    harness.deliver(plan);
    const int64_t expected = data.num_files() * (epoch + 1) + num_ahead;
    for (int i = 0; i < 5000 && static_cast<int64_t>(files.size()) < expected; ++i) {
      const std::vector<int64_t> more = harness.files_read();
      files.insert(files.end(), more.begin(), more.end());
      usleep(1000);
    }
    CHECK(static_cast<int64_t>(files.size()) == expected);
    CHECK(harness.start_prepared() == IMSEQ_OK);
  }
  for (size_t i = 0; i < files.size(); ++i) {
    CHECK(files[i] == static_cast<int64_t>(i) % data.num_files());
  }
}

// Blocks are read and verified; rows are left as they are.
void rows_may_be_only_read() {
  const Dataset data(5, 40);
  Plan plan(data, 16);
  Harness harness(data, 2, 2, 16, 1 << 20, IMSEQ_ROWS_READ);
  CHECK(harness.start(plan) == IMSEQ_OK);
  harness.deliver(plan);
  const imseq_stats stats = harness.stats();
  CHECK(stats.decode_samples == 0 && stats.python_rows == 0);
  CHECK(stats.read_bytes == data.size() * kSampleBytes);
  Harness other(data, 2, 2, 16, 1 << 20, IMSEQ_ROWS_READ);
  plan.checksum[20] ^= 1;  // checksums are compared as ever
  CHECK(other.start(plan) == IMSEQ_OK);
  CHECK(other.step(plan, 0) == IMSEQ_OK);
  CHECK(other.step(plan, 1) == IMSEQ_ERROR_DATA);
  CHECK(other.error.sample == plan.sample[20]);
}

// Zeroed memory for kept blocks, as a memfd would be.
class KeptMemory {
 public:
  KeptMemory(int64_t num_keys, int64_t arena_bytes)
      : num_keys_(num_keys), size_bytes_(imseq_kept_table_bytes(num_keys) + arena_bytes) {
    CHECK(::posix_memalign(&memory_, 4096, static_cast<size_t>(size_bytes_)) == 0);
    std::memset(memory_, 0, static_cast<size_t>(size_bytes_));
  }
  ~KeptMemory() { std::free(memory_); }
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  imseq_engine_config config() const {
    imseq_engine_config config = {};
    config.kept = memory_;
    config.kept_bytes = size_bytes_;
    config.kept_keys = num_keys_;
    return config;
  }

 private:
  int64_t num_keys_, size_bytes_;
  void* memory_ = nullptr;
};

void engines_share_kept_blocks() {
  const Dataset data(12, 60);
  const Plan plan(data, 16);
  const int64_t room_bytes = (data.per_file() * kSampleBytes + 4095) / 4096 * 4096;
  for (const int64_t num_kept : {12, 5}) {
    const KeptMemory memory(data.num_files(), num_kept * room_bytes);
    std::atomic<int64_t> read_bytes{0};
    const auto run = [&] {
      Harness harness(data, 2, 3, 16, 1 << 16, IMSEQ_ROWS_DECODED, memory.config());
      for (int epoch = 0; epoch < 4; ++epoch) {
        CHECK((epoch == 3 ? harness.start_prepared() : harness.start(plan)) == IMSEQ_OK);
        if (epoch == 2) CHECK(harness.prepare(plan) == IMSEQ_OK);
        harness.deliver(plan);
      }
      const imseq_stats stats = harness.stats();
      CHECK(stats.kept_blocks == num_kept);
      CHECK(stats.block_bytes == 0);
      CHECK(stats.read_bytes + stats.read_kept_bytes == 4 * data.size() * kSampleBytes);
      read_bytes += stats.read_bytes;
    };
    std::thread first(run), second(run);
    first.join();
    second.join();
    // An engine that wants a block while the other one reads it reads it, too: once more at most.
    const int64_t block_bytes = data.per_file() * kSampleBytes;
    const int64_t num_read = read_bytes / block_bytes - 8 * (12 - num_kept);
    CHECK(num_read >= num_kept && num_read <= 2 * num_kept);
  }
}

#if defined(__linux__)
void a_bad_sector_fails_the_samples_on_it() {
  const Dataset data(2, 200);
  const Plan plan(data, 20);
  const KeptMemory memory(data.num_files(), 1 << 20);
  Harness harness(data, 2, 3, 20, 1 << 20, IMSEQ_ROWS_DECODED, memory.config());
  struct stat info;
  CHECK(::stat(data.path(1).c_str(), &info) == 0);
  bad_sector.begin = 2 * 4096 + 10;
  bad_sector.end = bad_sector.begin + 1;
  bad_sector.inode = info.st_ino;
  // The page is lost, and with it the sample that reaches into it.
  const int64_t first_lost = data.per_file() + 2 * 4096 / kSampleBytes;
  const auto found = std::find(plan.sample.begin(), plan.sample.end(), first_lost);
  const int64_t failing = (found - plan.sample.begin()) / 20;
  for (int round = 0; round < 2; ++round) {
    CHECK(harness.start(plan) == IMSEQ_OK);
    for (int64_t b = 0; b < failing; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
    CHECK(harness.step(plan, failing) == IMSEQ_ERROR_READ);
    CHECK(harness.error.sample == first_lost);
    CHECK(harness.error.offset == 2 * 4096);
    CHECK(harness.error.os_errno == EIO);
    CHECK(std::strstr(harness.error.message, data.path(1).c_str()) != nullptr);
    CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
    CHECK(harness.stats().kept_blocks == 1);  // what has holes is not kept
    usleep(1000);
  }
  bad_sector.inode = 0;  // repaired
  CHECK(harness.start(plan) == IMSEQ_OK);
  harness.deliver(plan);
  CHECK(harness.stats().kept_blocks == 2);
}
#endif

#if defined(__linux__)
bool is_free(const std::string& disk) {
  const std::atomic<bool> cancelled{false};
  return imseq::DiskLock(disk, 0).acquire(&cancelled);
}

// However an epoch ends, another process can lock the disk at once.
void an_epoch_that_ended_holds_no_disk() {
  const Dataset data(6, 50);
  const Plan plan(data, 10);
  const std::string disk = data.root() + "/disk";
  imseq_engine_config config = {};
  config.disk_lock = disk.c_str();
  slow_disk.is_used = true;
  const auto end_while_reading = [&](auto end) {
    Harness harness(data, 2, 2, 10, 1 << 20, IMSEQ_ROWS_DECODED, config);
    slow_disk.answers = false;
    slow_disk.num_requests = 0;
    CHECK(harness.start(plan) == IMSEQ_OK);
    while (slow_disk.num_requests == 0) usleep(100);
    CHECK(!is_free(disk));
    std::thread ending([&] { CHECK(end(harness.engine, nullptr) == IMSEQ_OK); });
    usleep(20000);
    slow_disk.answers = true;
    ending.join();
    CHECK(is_free(disk));
  };
  end_while_reading(imseq_engine_close);
  end_while_reading(imseq_engine_cancel);
  for (int round = 0; round < 40; ++round) {
    Plan other(data, 10);
    other.length[round * 7] = 51 * kSampleBytes;  // beyond the block
    Harness harness(data, 2, 2, 10, 1 << 20, IMSEQ_ROWS_DECODED, config);
    CHECK(harness.start(plan) == IMSEQ_OK);
    harness.deliver(plan);
    CHECK(is_free(disk));
    CHECK(harness.start(other) == IMSEQ_OK);
    if (round % 2 == 0) CHECK(harness.prepare(plan) == IMSEQ_OK);
    int32_t status = IMSEQ_OK;
    for (int64_t b = 0; status == IMSEQ_OK; ++b) status = harness.step(other, b);
    CHECK(status == IMSEQ_ERROR_DATA);
    CHECK(imseq_engine_close(harness.engine, nullptr) == IMSEQ_OK);
    CHECK(is_free(disk));
  }
  slow_disk.is_used = false;
}
#endif

void cancelled_engines_start_again() {
  const Dataset data(6, 50);
  const Plan plan(data, 10);
  Harness harness(data, 4, 2, 10, 4096);
  harness.slow = true;
  for (int64_t stop_after = 0; stop_after < 6; ++stop_after) {
    CHECK(harness.start(plan) == IMSEQ_OK);
    for (int64_t b = 0; b < stop_after; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
    CHECK(harness.start(plan) == IMSEQ_ERROR_ARGUMENT);  // one plan at a time
    // The threads write to the rows they hold until these are finished. Python keeps the memory for
    // as long; here they are given time.
    CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
    imseq_batch batch = {};
    CHECK(imseq_engine_next(harness.engine, kSecond, &batch, nullptr) == IMSEQ_CANCELLED);
    usleep(5000);
  }
  harness.slow = false;
  CHECK(harness.start(plan) == IMSEQ_OK);
  for (int64_t b = 0; b < plan.native.num_batches; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
}

void closed_engines_refuse_and_do_not_hang() {
  const Dataset data(6, 50);
  const Plan plan(data, 10);
  for (int round = 0; round < 20; ++round) {
    Harness harness(data, 4, 2, 10, 4096);
    CHECK(harness.start(plan) == IMSEQ_OK);
    for (int i = 0; i < round * 10; ++i) std::this_thread::yield();
    std::thread other([&] { CHECK(imseq_engine_close(harness.engine, nullptr) == IMSEQ_OK); });
    int32_t status = IMSEQ_OK;
    for (int64_t b = 0; status == IMSEQ_OK && b < plan.native.num_batches; ++b) {
      imseq_batch batch = {};
      status = imseq_engine_next(harness.engine, 20 * kSecond, &batch, nullptr);
      if (status == IMSEQ_OK && b == round) {
        CHECK(imseq_engine_close(harness.engine, nullptr) == IMSEQ_OK);
      }
      if (status == IMSEQ_OK) {
        status =
            imseq_engine_release(harness.engine, batch.slot, harness.row(batch.slot, 0), nullptr);
      }
    }
    CHECK(status == IMSEQ_CANCELLED);
    other.join();
    CHECK(harness.start(plan) == IMSEQ_CANCELLED);
    imseq_task task = {};
    CHECK(imseq_engine_take(harness.engine, kSecond, &task, nullptr) == IMSEQ_CANCELLED);
  }
}

// A batch without samples needs only its slot.
void an_empty_batch_comes_when_its_slot_opens() {
  const Dataset data(2, 20);
  Plan plan(data, 40);
  plan.batch_begin = {0, 40, 40};
  plan.native.batch_begin = plan.batch_begin.data();
  plan.native.num_batches = 2;
  Harness harness(data, 2, 1, 40, 1 << 20);
  CHECK(harness.start(plan) == IMSEQ_OK);
  CHECK(harness.receive(plan, 0) == IMSEQ_OK);
  std::atomic<bool> has_come{false};
  std::thread consumer([&] {
    CHECK(harness.receive(plan, 1) == IMSEQ_OK);
    has_come = true;
  });
  usleep(50000);  // it waits
  CHECK(!has_come);
  harness.lend(0);
  for (int i = 0; i < 2000 && !has_come; ++i) usleep(1000);
  CHECK(has_come);
  consumer.join();
}

void the_longest_time_out_does_not_pass() {
  const Dataset data(2, 20);
  const Plan plan(data, 10, true);
  Harness harness(data, 1, 1, 10, 0);
  harness.hold_block_0 = true;
  CHECK(harness.start(plan) == IMSEQ_OK);
  std::thread releasing([&] {
    usleep(20000);
    harness.hold_block_0 = false;
  });
  imseq_batch batch = {};
  CHECK(imseq_engine_next(harness.engine, INT64_MIN, &batch, nullptr) == IMSEQ_TIMEOUT);
  CHECK(imseq_engine_next(harness.engine, INT64_MAX, &batch, nullptr) == IMSEQ_OK);
  releasing.join();
  Harness idle(data, 1, 1, 10, 0);
  std::thread closing([&] {
    usleep(20000);
    CHECK(imseq_engine_close(idle.engine, nullptr) == IMSEQ_OK);
  });
  imseq_task task = {};
  CHECK(imseq_engine_take(idle.engine, INT64_MAX, &task, nullptr) == IMSEQ_CANCELLED);
  closing.join();
}

void time_out_and_slow_consumer() {
  const Dataset data(2, 20);
  const Plan plan(data, 10);
  imseq_engine_config config = {};
  config.num_decoders = config.num_readers = config.num_slots = 1;
  config.rows = IMSEQ_ROWS_FROM_BYTES;
  config.row_bytes = kRowBytes;
  imseq_engine* engine = nullptr;
  CHECK(imseq_engine_create(&config, &engine, nullptr) == IMSEQ_OK);
  std::vector<uint8_t> rows(10 * kRowBytes);
  void* slots[] = {rows.data()};
  CHECK(imseq_engine_start(engine, &plan.native, slots, nullptr) == IMSEQ_OK);
  imseq_batch batch = {};
  CHECK(imseq_engine_next(engine, 1'000'000, &batch, nullptr) ==
        IMSEQ_TIMEOUT);  // nobody fills rows
  CHECK(imseq_engine_release(engine, 0, rows.data(), nullptr) == IMSEQ_ERROR_ARGUMENT);
  imseq_task task = {};
  CHECK(imseq_engine_take(engine, kSecond, &task, nullptr) == IMSEQ_OK);
  CHECK(imseq_engine_finish_row(engine, task.ticket + 1, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_finish_row(engine, task.ticket, nullptr, nullptr) == IMSEQ_OK);
  CHECK(imseq_engine_finish_row(engine, task.ticket, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  imseq_engine_destroy(engine);  // with rows outstanding
}

void wrong_plans_and_configurations_are_refused() {
  const Dataset data(2, 20);
  Harness harness(data, 1, 1, 10, 0);
  const auto refused = [&](auto change) {
    Plan plan(data, 10);
    change(plan);
    CHECK(harness.start(plan) == IMSEQ_ERROR_ARGUMENT);
  };
  refused([](Plan& plan) { plan.block[3] = 2; });
  refused([](Plan& plan) { plan.block[3] = -1; });
  refused([](Plan& plan) { plan.offset[3] = -5; });
  refused([](Plan& plan) { plan.length[3] = -2; });
  for (const int64_t large : {(int64_t{1} << 62) - 99, INT64_MAX}) {
    refused([&](Plan& plan) { plan.offset[3] = large; });
    refused([&](Plan& plan) { plan.length[3] = large; });
    refused([&](Plan& plan) { plan.block_offset[1] = large; });
    refused([&](Plan& plan) {
      plan.block_offset[1] = 100;
      plan.block_length[1] = large;
    });
  }
  refused([](Plan& plan) { plan.native.paths = nullptr; });
  refused([](Plan& plan) { plan.sample[3] = -1; });
  refused([](Plan& plan) { plan.batch_begin[1] = 35; });
  refused([](Plan& plan) { plan.batch_begin.back() = 41; });
  refused([](Plan& plan) { plan.block_file[1] = 2; });
  refused([](Plan& plan) { plan.path_begin[1] = 100; });
  refused([](Plan& plan) { std::fill(plan.block.begin(), plan.block.end(), 0); });
  refused([](Plan& plan) { plan.native.sample = nullptr; });
  refused([](Plan& plan) { plan.native.slot_rows = 9; });
  imseq_engine* engine = nullptr;
  imseq_engine_config config = {};
  CHECK(imseq_engine_create(&config, &engine, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_create(nullptr, &engine, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_prepare(harness.engine, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_start(harness.engine, nullptr, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_next(harness.engine, 0, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_take(harness.engine, 0, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_stats(harness.engine, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_pending(harness.engine, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(imseq_engine_requests(harness.engine, nullptr, 0, nullptr, nullptr) ==
        IMSEQ_ERROR_ARGUMENT);
  config.num_decoders = config.num_readers = config.num_slots = 1;
  config.rows = 4;
  CHECK(imseq_engine_create(&config, &engine, nullptr) == IMSEQ_ERROR_ARGUMENT);
  config.rows = IMSEQ_ROWS_READ;
  CHECK(imseq_engine_create(&config, nullptr, nullptr) == IMSEQ_ERROR_ARGUMENT);
}

void forked_children_are_refused() {
  const Dataset data(2, 20);
  const Plan plan(data, 10);
  Harness harness(data, 2, 1, 10, 0);
  CHECK(harness.start(plan) == IMSEQ_OK);
  const pid_t child = fork();
  if (child == 0) {
    imseq_batch batch = {};
    imseq_error error = {};
    const bool refused =
        imseq_engine_next(harness.engine, kSecond, &batch, &error) == IMSEQ_ERROR_FORK &&
        imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_ERROR_FORK;
    imseq_engine_destroy(harness.engine);  // must return and touch nothing
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  for (int64_t b = 0; b < plan.native.num_batches; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
}

}  // namespace

int main() {
  is_thread_of_test = true;
  whole_epochs_arrive_in_order();
  failures_come_when_their_batch_does();
  groups_arrive_in_order();
  memory_may_be_lent_late();
  a_late_block_holds_up_its_own_samples_only();
  failures_inside_groups();
  cancel_in_the_middle_of_groups();
  checksums_are_compared_until_they_were_right();
  a_failed_allocation_is_an_error();
  a_changed_file_is_verified_again();
  a_file_cut_short_while_it_is_read();
  prepared_plans_start_or_are_dropped();
  nothing_is_read_twice();
  rows_may_be_only_read();
  engines_share_kept_blocks();
#if defined(__linux__)
  a_bad_sector_fails_the_samples_on_it();
  an_epoch_that_ended_holds_no_disk();
#endif
  cancelled_engines_start_again();
  closed_engines_refuse_and_do_not_hang();
  an_empty_batch_comes_when_its_slot_opens();
  the_longest_time_out_does_not_pass();
  time_out_and_slow_consumer();
  wrong_plans_and_configurations_are_refused();
  forked_children_are_refused();
  std::printf(failures == 0 ? "engine: ok\n" : "engine: %d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
