// The engine without Python: order, back-pressure, failures, cancellation, fork. Rows are handed
// out as bytes, so that what arrives in a batch can be compared with what lies in the files.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../core/crc32c.h"
#include "../../core/imagenet_seq.h"

namespace {

std::atomic<int> failures{0};

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                               \
    }                                                                           \
  } while (0)

constexpr int64_t kRowBytes = 64;
constexpr int64_t kSecond = 1'000'000'000;

// Files of samples of 64 bytes each, in which every byte tells the sample.
class Dataset {
 public:
  Dataset(int64_t num_files, int64_t samples_per_file)
      : num_files_(num_files), per_file_(samples_per_file) {
    char pattern[] = "/tmp/imseq_engine_XXXXXX";
    root_ = mkdtemp(pattern);
    for (int64_t file = 0; file < num_files; ++file) {
      std::FILE* out = std::fopen(path(file).c_str(), "wb");
      for (int64_t i = 0; i < samples_per_file; ++i) {
        const std::vector<uint8_t> bytes = sample(file * samples_per_file + i);
        std::fwrite(bytes.data(), 1, bytes.size(), out);
      }
      std::fclose(out);
    }
  }
  ~Dataset() {
    for (int64_t file = 0; file < num_files_; ++file) std::remove(path(file).c_str());
    rmdir(root_.c_str());
  }

  static std::vector<uint8_t> sample(int64_t number) {
    std::vector<uint8_t> bytes(kRowBytes, static_cast<uint8_t>(number * 37));
    std::memcpy(bytes.data(), &number, sizeof(number));
    return bytes;
  }
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
  std::vector<int32_t> block, block_file;
  std::vector<uint32_t> checksum;
  std::string paths;
  imseq_plan native = {};

  Plan(const Dataset& data, int64_t batch_size, bool foreign = false) {
    path_begin.push_back(0);
    for (int64_t file = 0; file < data.num_files(); ++file) {
      paths += "f" + std::to_string(file);
      path_begin.push_back(static_cast<int64_t>(paths.size()));
      block_file.push_back(foreign ? -1 : static_cast<int32_t>(file));
      block_offset.push_back(foreign ? file : 0);
      block_length.push_back(foreign ? -1 : data.per_file() * kRowBytes);
    }
    for (int64_t pair = 0; pair < data.num_files(); pair += 2) {
      for (int64_t i = 0; i < data.per_file(); ++i) {
        for (int64_t file = pair; file < std::min(pair + 2, data.num_files()); ++file) {
          sample.push_back(file * data.per_file() + i);
          block.push_back(static_cast<int32_t>(file));
          offset.push_back(foreign ? i : i * kRowBytes);
          length.push_back(kRowBytes);
          const std::vector<uint8_t> bytes = Dataset::sample(sample.back());
          checksum.push_back(imseq::crc32c(0, bytes.data(), bytes.size()));
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
    native.block_file = block_file.data();
    native.block_offset = block_offset.data();
    native.block_length = block_length.data();
    native.root = data.root().c_str();
    native.paths = paths.data();
    native.path_begin = path_begin.data();
  }
};

// An engine, its slots and the threads that play Python.
class Harness {
 public:
  Harness(const Dataset& data, int decoders, int slots, int64_t batch_size, int64_t budget)
      : data_(data), memory_(slots, std::vector<uint8_t>(batch_size * kRowBytes)) {
    imseq_engine_config config = {};
    config.num_decoders = decoders;
    config.num_readers = 2;
    config.num_slots = slots;
    config.rows = IMSEQ_ROWS_FROM_BYTES;
    config.verify_checksums = 1;
    config.row_bytes = kRowBytes;
    config.block_budget_bytes = budget;
    CHECK(imseq_engine_create(&config, &engine, &error) == IMSEQ_OK);
    for (int i = 0; i < 2; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Harness() {
    CHECK(imseq_engine_close_tasks(engine, nullptr) == IMSEQ_OK);
    for (std::thread& thread : threads_) thread.join();
    imseq_engine_destroy(engine);
  }

  int32_t start(const Plan& plan) {
    std::vector<void*> rows;
    for (auto& slot : memory_) {
      std::fill(slot.begin(), slot.end(), uint8_t{0xEE});
      rows.push_back(slot.data());
    }
    return imseq_engine_start(engine, &plan.native, rows.data(), &error);
  }

  // Takes one batch, compares it with the plan, lends its memory again.
  int32_t step(const Plan& plan, int64_t expected_batch) {
    imseq_batch batch = {};
    const int32_t status = imseq_engine_next(engine, 20 * kSecond, &batch, &error);
    if (status != IMSEQ_OK) return status;
    CHECK(batch.batch == expected_batch);
    CHECK(batch.begin == plan.batch_begin[expected_batch]);
    for (int64_t p = batch.begin; p < batch.end; ++p) {
      const std::vector<uint8_t> want = Dataset::sample(plan.sample[p]);
      const uint8_t* got = memory_[batch.slot].data() + (p - batch.begin) * kRowBytes;
      CHECK(std::memcmp(got, want.data(), kRowBytes) == 0);
    }
    CHECK(imseq_engine_release(engine, batch.slot, memory_[batch.slot].data(), &error) == IMSEQ_OK);
    return status;
  }

  imseq_engine* engine = nullptr;
  imseq_error error = {};
  std::atomic<int64_t> fail_sample{-1};
  std::atomic<bool> slow{false};

 private:
  void serve() {
    imseq_task task = {};
    while (imseq_engine_take(engine, 60 * kSecond, &task, nullptr) == IMSEQ_OK) {
      if (task.kind == IMSEQ_TASK_BLOCK) {
        std::vector<uint8_t> bytes;
        std::vector<int64_t> offsets, lengths;
        for (int64_t i = 0; i < data_.per_file(); ++i) {
          const std::vector<uint8_t> one = Dataset::sample(task.sample * data_.per_file() + i);
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
      const int64_t copied = task.size < kRowBytes ? task.size : kRowBytes;
      if (!broken) std::memcpy(task.row, task.bytes, static_cast<size_t>(copied));
      const int32_t status = imseq_engine_finish_row(
          engine, task.ticket, broken ? "broken on purpose" : nullptr, nullptr);
      CHECK(status == IMSEQ_OK || status == IMSEQ_CANCELLED);
    }
  }

  const Dataset& data_;
  std::vector<std::vector<uint8_t>> memory_;
  std::vector<std::thread> threads_;
};

void whole_epochs_arrive_in_order() {
  const Dataset data(7, 53);
  for (const bool foreign : {false, true}) {
    for (const int decoders : {1, 8}) {
      for (const int slots : {1, 3}) {
        for (const int64_t budget : {int64_t{0}, int64_t{1} << 20}) {
          const Plan plan(data, 16, foreign);
          Harness harness(data, decoders, slots, 16, budget);
          for (int epoch = 0; epoch < 2; ++epoch) {
            CHECK(harness.start(plan) == IMSEQ_OK);
            for (int64_t b = 0; b < plan.native.num_batches; ++b) {
              CHECK(harness.step(plan, b) == IMSEQ_OK);
            }
            CHECK(harness.step(plan, -1) == IMSEQ_END);
          }
          imseq_stats stats = {};
          CHECK(imseq_engine_stats(harness.engine, &stats, nullptr) == IMSEQ_OK);
          CHECK(stats.batch_count == 2 * plan.native.num_batches);
          CHECK(stats.foreign_rows == 2 * data.size());
          CHECK(stats.foreign_blocks == (foreign ? 2 * data.num_files() : 0));
          CHECK(stats.read_bytes == (foreign ? 0 : 2 * data.size() * kRowBytes));
          CHECK(stats.block_bytes == 0);
          if (budget == 0 && !foreign) {
            // The plan needs two blocks at once; each reader may be one ahead of that.
            CHECK(stats.block_bytes_peak <= 4 * data.per_file() * kRowBytes);
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
    plan.length[33] = 41 * kRowBytes;  // beyond the block
    Harness harness(data, 4, 2, 8, 1 << 20);
    expect(harness, plan, 33, IMSEQ_ERROR_DATA);
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

void cancelled_engines_start_again() {
  const Dataset data(6, 50);
  const Plan plan(data, 10);
  Harness harness(data, 4, 2, 10, 4096);
  harness.slow = true;
  for (int64_t stop_after = 0; stop_after < 6; ++stop_after) {
    CHECK(harness.start(plan) == IMSEQ_OK);
    for (int64_t b = 0; b < stop_after; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
    CHECK(harness.start(plan) == IMSEQ_ERROR_ARGUMENT);  // one plan at a time
    // Rows held by the threads are written to until they are finished; give them time, as Python
    // does by keeping the memory.
    CHECK(imseq_engine_cancel(harness.engine, nullptr) == IMSEQ_OK);
    imseq_batch batch = {};
    CHECK(imseq_engine_next(harness.engine, kSecond, &batch, nullptr) == IMSEQ_CANCELLED);
    usleep(5000);
  }
  harness.slow = false;
  CHECK(harness.start(plan) == IMSEQ_OK);
  for (int64_t b = 0; b < plan.native.num_batches; ++b) CHECK(harness.step(plan, b) == IMSEQ_OK);
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
  config.num_decoders = config.num_readers = config.num_slots = 1;
  config.rows = 3;
  CHECK(imseq_engine_create(&config, &engine, nullptr) == IMSEQ_ERROR_ARGUMENT);
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
  whole_epochs_arrive_in_order();
  failures_come_when_their_batch_does();
  cancelled_engines_start_again();
  time_out_and_slow_consumer();
  wrong_plans_and_configurations_are_refused();
  forked_children_are_refused();
  std::printf(failures == 0 ? "engine: ok\n" : "engine: %d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
