// The C functions that need no engine: whatever allocation fails, no exception leaves them, and
// NULL is refused.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "imagenet_seq.h"
#include "small_jpeg.h"

namespace {

// Allocations of this thread that still succeed; negative: all.
thread_local int allocations_left = -1;

void* allocate(size_t size, size_t alignment) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<size_t>(alignment));
}
void* operator new(size_t size, const std::nothrow_t&) noexcept try {
  return allocate(size, alignof(std::max_align_t));
} catch (const std::bad_alloc&) {
  return nullptr;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

// Calls it with memory for no allocation, for one, for two ..., until that is enough; returns the
// status it then has.
template <typename Call>
int32_t with_ever_more_memory(const char* function, const Call& call) {
  for (int allowed = 0;; ++allowed) {
    imseq_error error = {};
    int32_t status = 0;
    bool threw = false;
    allocations_left = allowed;
    try {
      status = call(&error);
    } catch (...) {
      threw = true;
    }
    const bool was_enough = allocations_left > 0;
    allocations_left = -1;
    if (threw) std::printf("%s threw with memory for %d allocations\n", function, allowed);
    CHECK(!threw);
    if (was_enough || (!threw && status != IMSEQ_ERROR_MEMORY)) return status;
    CHECK(threw || error.code == IMSEQ_ERROR_MEMORY);
  }
}

imseq_recipe recipe() {
  imseq_recipe recipe = {};
  recipe.geometry = IMSEQ_GEOMETRY_RESIZE_CROP;
  recipe.out_height = recipe.out_width = recipe.crop_height = recipe.crop_width = 8;
  recipe.resize_height = 9;
  recipe.filter = IMSEQ_FILTER_BILINEAR;
  return recipe;
}

void test_no_exception_leaves() {
  const imseq_recipe small = recipe();
  const imseq_key key = {};
  std::vector<uint8_t> row(3 * 8 * 8), out(4096), tables(IMSEQ_TABLES_BYTES);
  std::vector<uint64_t> counts(4 * 256);
  imseq_header header;
  imseq_view view;
  int64_t size_bytes, address;
  size_t out_size;
  const uint8_t* const bytes = kImage.data();
  const size_t size = kImage.size();
  const auto check = [](const char* function, int32_t expected, const auto& call) {
    CHECK(with_ever_more_memory(function, call) == expected);
  };
  check("imseq_use_cpu", IMSEQ_ERROR_ARGUMENT,
        [](imseq_error* error) { return imseq_use_cpu("none that there is", error); });
  check("imseq_use_cpu", IMSEQ_OK,
        [](imseq_error* error) { return imseq_use_cpu(imseq_cpu(), error); });
  check("imseq_read_header", IMSEQ_OK,
        [&](imseq_error* error) { return imseq_read_header(bytes, size, &header, error); });
  check("imseq_draw", IMSEQ_OK,
        [&](imseq_error* error) { return imseq_draw(&small, &key, 26, 19, &view, error); });
  check("imseq_decode", IMSEQ_OK, [&](imseq_error* error) {
    return imseq_decode(&small, &key, bytes, size, 0, row.data(), error);
  });
  check("imseq_decode_group", IMSEQ_OK, [&](imseq_error* error) {
    imseq_sample sample = {key, bytes, static_cast<int64_t>(size), row.data(), 0, 0};
    return imseq_decode_group(&small, &sample, 1, nullptr, error);
  });
  check("imseq_apply", IMSEQ_OK, [&](imseq_error* error) {
    return imseq_apply(&small, &key, out.data(), 26, 19, row.data(), error);
  });
  check("imseq_look_up", IMSEQ_OK, [&](imseq_error* error) {
    return imseq_look_up("/proc/self/exe", &size_bytes, &address, error);
  });
  check("imseq_count_symbols", IMSEQ_OK, [&](imseq_error* error) {
    return imseq_count_symbols(bytes, size, 8, counts.data(), error);
  });
  check("imseq_fit_tables", IMSEQ_OK,
        [&](imseq_error* error) { return imseq_fit_tables(counts.data(), tables.data(), error); });
  check("imseq_transcode", IMSEQ_OK, [&](imseq_error* error) {
    return imseq_transcode(bytes, size, 8, 0, tables.data(), out.data(), out.size(), &out_size,
                           &header, error);
  });
  CHECK(header.restart_interval == 8 && header.supported == 1);
}

void test_null_is_refused() {
  const imseq_recipe small = recipe();
  const imseq_key key = {};
  imseq_view view;
  imseq_error error;
  uint8_t byte = 0;
  int64_t number = 0;
  const auto check = [&](int32_t status) { CHECK(status == IMSEQ_ERROR_ARGUMENT); };
  check(imseq_use_cpu(nullptr, &error));
  check(imseq_read_header(nullptr, 1, nullptr, &error));
  check(imseq_draw(nullptr, &key, 1, 1, &view, &error));
  check(imseq_draw(&small, nullptr, 1, 1, &view, &error));
  check(imseq_draw(&small, &key, 1, 1, nullptr, &error));
  check(imseq_decode(&small, &key, nullptr, 1, 0, &byte, &error));
  check(imseq_decode(&small, &key, &byte, 1, 0, nullptr, &error));
  check(imseq_decode_group(&small, nullptr, 1, nullptr, &error));
  check(imseq_apply(&small, &key, nullptr, 1, 1, &byte, &error));
  check(imseq_look_up(nullptr, &number, &number, &error));
  check(imseq_look_up("/", nullptr, &number, &error));
}

}  // namespace

int main() {
  test_no_exception_leaves();
  test_null_is_refused();
  if (failures > 0) std::printf("%d checks failed\n", failures.load());
  return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
