// FileReader on a bad disk: pread is replaced by one with bad sectors, short reads and interrupts,
// and every request is recorded. Bytes always come from a real file.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "read/buffers.h"
#include "read/file_reader.h"
#if defined(__linux__)
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "imagenet_seq.h"

namespace {

using imseq::BadRange;
using imseq::Buffer;
using imseq::BufferPool;
using imseq::FileReader;
using imseq::kPageBytes;

constexpr int64_t kMegabyte = 1 << 20;
constexpr int64_t kFileBytes = 3 * kMegabyte + 777;

struct Request {
  int64_t offset, size_bytes;
  bool operator==(const Request&) const = default;
};

// The disk under the reader; disk_pread() reads from it.
struct Disk {
  struct Fault {
    int64_t begin, end;
    int os_errno;
    int num_times;  // -1: always
  };
  std::vector<Fault> faults;
  int64_t most_bytes = INT64_MAX;  // of one answer
  bool refuses_direct = false;
  std::vector<Request> requests;
};
Disk disk;

ssize_t disk_pread(int file, void* bytes, size_t size, off_t offset) {
  disk.requests.push_back({offset, static_cast<int64_t>(size)});
#if defined(O_DIRECT)
  if ((::fcntl(file, F_GETFL) & O_DIRECT) != 0) {
    CHECK(offset % kPageBytes == 0);
    CHECK(size % kPageBytes == 0);
    CHECK(reinterpret_cast<uintptr_t>(bytes) % kPageBytes == 0);
    if (disk.refuses_direct) {
      errno = EINVAL;
      return -1;
    }
  }
#endif
  for (Disk::Fault& fault : disk.faults) {
    const bool is_hit = offset < fault.end && offset + static_cast<int64_t>(size) > fault.begin;
    if (!is_hit || fault.num_times == 0) continue;
    if (fault.num_times > 0) --fault.num_times;
    errno = fault.os_errno;
    return -1;
  }
  return std::min<int64_t>(::pread(file, bytes, size, offset), disk.most_bytes);
}

uint8_t byte_at(int64_t offset) { return static_cast<uint8_t>((offset * 2654435761) >> 13 | 1); }

std::string folder;

std::string make_file(const char* name, int64_t size_bytes) {
  std::vector<uint8_t> bytes(static_cast<size_t>(size_bytes));
  for (int64_t i = 0; i < size_bytes; ++i) bytes[i] = byte_at(i);
  const std::string path = folder + "/" + name;
  std::FILE* file = std::fopen(path.c_str(), "wb");
  CHECK(std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
  CHECK(std::fflush(file) == 0 && ::fsync(::fileno(file)) == 0);
  std::fclose(file);
  return path;
}

bool folder_has_direct() {
#if defined(O_DIRECT)
  const int file = ::open((folder + "/file").c_str(), O_RDONLY | O_DIRECT);
  if (file >= 0) ::close(file);
  return file >= 0;
#else
  return true;
#endif
}

// One read into memory of exactly the size it needs, so that sanitizers see an overrun.
struct Result {
  int32_t status = IMSEQ_OK;
  imseq_error error = {};
  std::vector<BadRange> bad;
  std::vector<uint8_t> bytes;
};

Result read(FileReader& reader, int64_t offset, int64_t length) {
  Result result;
  const auto room = static_cast<size_t>(FileReader::room(offset, length));
  void* memory = nullptr;
  CHECK(::posix_memalign(&memory, kPageBytes, room) == 0);
  std::memset(memory, 0xA5, room);
  const uint8_t* bytes = nullptr;
  result.status = reader.read(offset, length, static_cast<uint8_t*>(memory), &bytes, &result.bad,
                              &result.error);
  if (result.status == IMSEQ_OK) result.bytes.assign(bytes, bytes + length);
  std::free(memory);
  return result;
}

// The bytes are the file's, except for zeros in ranges that are bad.
bool is_right(const Result& result, int64_t offset) {
  for (size_t i = 0; i < result.bytes.size(); ++i) {
    const int64_t at = offset + static_cast<int64_t>(i);
    const bool is_bad = std::any_of(result.bad.begin(), result.bad.end(), [&](const BadRange& bad) {
      return at >= bad.begin && at < bad.end;
    });
    if (result.bytes[i] != (is_bad ? 0 : byte_at(at))) return false;
  }
  return true;
}

void test_ranges_are_read_as_they_are() {
  const std::string path = folder + "/file";
  for (const bool direct : {false, true}) {
    FileReader reader(direct);
    for (const int64_t offset : {0, 1, 4095, 4096, 5000, 1048576, 2000000}) {
      for (const int64_t length :
           {int64_t{0}, int64_t{1}, int64_t{4096}, int64_t{70001}, kFileBytes - offset}) {
        CHECK(reader.open(path, nullptr) == IMSEQ_OK);
        CHECK(reader.file_bytes() == kFileBytes);
        const Result result = read(reader, offset, length);
        CHECK(result.status == IMSEQ_OK && result.bad.empty());
        CHECK(result.bytes.size() == static_cast<size_t>(length) && is_right(result, offset));
      }
    }
    CHECK(reader.was_direct() == (direct && folder_has_direct()));
  }
}

void test_direct_is_one_request() {
  FileReader reader(true, disk_pread);
  CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
  if (!folder_has_direct()) return;
  disk = {};
  CHECK(is_right(read(reader, 5000, 2 * kMegabyte), 5000));
  CHECK(disk.requests == (std::vector<Request>{{4096, 2 * kMegabyte + 4096}}));
  disk = {};
  CHECK(is_right(read(reader, kFileBytes - 10, 10), kFileBytes - 10));
  CHECK(disk.requests == (std::vector<Request>{{3 * kMegabyte, 4096}}));
}

void test_buffered_is_read_in_megabytes() {
  FileReader reader(false, disk_pread);
  CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
  disk = {};
  CHECK(is_right(read(reader, 5000, 2 * kMegabyte), 5000));
  CHECK(disk.requests ==
        (std::vector<Request>{
            {4096, kMegabyte - 4096}, {kMegabyte, kMegabyte}, {2 * kMegabyte, 8192}}));
  CHECK(!reader.was_direct());
}

void test_what_the_page_cache_has_is_read_without_the_disk() {
  FileReader reader(false, [](int, void*, size_t, off_t) -> ssize_t {
    CHECK(false);  // the disk was asked
    return 0;
  });
  CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
  std::vector<uint8_t> copy(static_cast<size_t>(kFileBytes));
  std::FILE* file = std::fopen((folder + "/file").c_str(), "rb");
  CHECK(std::fread(copy.data(), 1, copy.size(), file) == copy.size());  // now it is there
  std::fclose(file);
  void* memory = nullptr;
  const auto room = static_cast<size_t>(FileReader::room(5000, 2 * kMegabyte));
  CHECK(::posix_memalign(&memory, kPageBytes, room) == 0);
  const uint8_t* bytes = nullptr;
  if (reader.read_cached(5000, 2 * kMegabyte, static_cast<uint8_t*>(memory), &bytes)) {
    CHECK(std::memcmp(bytes, copy.data() + 5000, 2 * kMegabyte) == 0);
    CHECK(!reader.read_cached(kFileBytes - 10, 20, static_cast<uint8_t*>(memory), &bytes));
  } else {
    std::printf("read: this file system can't say what is in the page cache\n");
  }
  std::free(memory);
}

void test_short_answers_and_interrupts() {
  for (const bool direct : {false, true}) {
    for (const int64_t most_bytes : {5000, 4096, 100001}) {
      FileReader reader(direct, disk_pread);
      CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
      disk = {};
      disk.most_bytes = most_bytes;
      disk.faults = {{0, kFileBytes, EINTR, 3}};
      const Result result = read(reader, 777, 300000);
      CHECK(result.status == IMSEQ_OK && is_right(result, 777));
      CHECK(disk.requests.size() > 300000 / 100001 + 3);
      CHECK(is_right(read(reader, kFileBytes - 20000, 20000), kFileBytes - 20000));
    }
  }
}

void test_where_o_direct_is_refused_the_page_cache_is_used() {
  const std::string other = make_file("other", 100);
  FileReader reader(true, disk_pread);
  disk = {};
  disk.refuses_direct = true;
  CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
  const Result result = read(reader, 5000, 2 * kMegabyte);
  CHECK(result.status == IMSEQ_OK && is_right(result, 5000));
#if defined(O_DIRECT)
  CHECK(!reader.was_direct());
  disk = {};
  CHECK(reader.open(other, nullptr) == IMSEQ_OK);
  CHECK(is_right(read(reader, 0, 100), 0));
  CHECK(!reader.was_direct());  // for good
#endif
#if defined(__linux__)
  FileReader refused_at_open(true);
  CHECK(refused_at_open.open("/proc/version", nullptr) == IMSEQ_OK);
  const Result version = read(refused_at_open, 0, 5);
  CHECK(version.status == IMSEQ_OK && std::memcmp(version.bytes.data(), "Linux", 5) == 0);
  CHECK(!refused_at_open.was_direct());
#endif
}

void test_what_the_disk_reads_the_second_time_is_good() {
  for (const bool direct : {false, true}) {
    FileReader reader(direct, disk_pread);
    CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
    disk = {};
    disk.faults = {{1500000, 1500512, EIO, 1}};
    const Result result = read(reader, 1000, 2000000);
    CHECK(result.status == IMSEQ_OK && result.bad.empty() && is_right(result, 1000));
    CHECK(disk.requests.size() == (reader.was_direct() ? 2 : 3));  // in large pieces
  }
}

void test_bad_sectors_cost_their_pages_and_no_more() {
  for (const bool direct : {false, true}) {
    for (const int os_errno : {EIO, ENODATA}) {
      FileReader reader(direct, disk_pread);
      CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
      disk = {};
      disk.faults = {{500, 1000, os_errno, -1},          // the range's first page
                     {1503232, 1503744, os_errno, -1},   // one page
                     {2097000, 2097664, os_errno, -1},   // two, on both sides of a megabyte
                     {2999900, 3000100, os_errno, -1}};  // its last, and what lies behind
      const Result result = read(reader, 700, 3000000 - 700);
      CHECK(result.status == IMSEQ_OK && is_right(result, 700));
      CHECK(result.bad.size() == 5);
      if (result.bad.size() != 5) continue;
      const int64_t expected[][2] = {{700, 4096},
                                     {1503232, 1507328},
                                     {2093056, 2097152},
                                     {2097152, 2101248},
                                     {2998272, 3000000}};
      for (size_t i = 0; i < 5; ++i) {
        CHECK(result.bad[i].begin == expected[i][0] && result.bad[i].end == expected[i][1]);
        CHECK(result.bad[i].os_errno == os_errno);
      }
    }
  }
}

void test_a_dead_disk_is_given_up_soon() {
  for (const bool direct : {false, true}) {
    FileReader reader(direct, disk_pread);
    CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
    disk = {};
    disk.faults = {{1000000, kFileBytes, EIO, -1}};
    const Result result = read(reader, 10000, 3000000);
    CHECK(result.status == IMSEQ_ERROR_READ && result.error.os_errno == EIO);
    CHECK(result.bad.empty());
    CHECK(result.error.offset == 1000000 / 4096 * 4096);
    CHECK(std::strstr(result.error.message, "/file") != nullptr);
    CHECK(disk.requests.size() < 100);
  }
}

void test_other_refusals_are_errors_at_once() {
  FileReader reader(false, disk_pread);
  CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
  disk = {};
  disk.faults = {{kMegabyte + 5, kMegabyte + 6, ESTALE, -1}};
  const Result result = read(reader, 0, 2 * kMegabyte);
  CHECK(result.status == IMSEQ_ERROR_READ && result.error.os_errno == ESTALE);
  CHECK(result.error.offset == kMegabyte && disk.requests.size() == 2);
}

void test_a_file_that_became_shorter_is_an_error() {
  for (const bool direct : {false, true}) {
    for (const int64_t left : {0, 4096, 300000, 499999}) {
      const std::string path = make_file("shrinking", 500000);
      FileReader reader(direct);
      CHECK(reader.open(path, nullptr) == IMSEQ_OK);
      CHECK(::truncate(path.c_str(), left) == 0);
      const Result result = read(reader, 3000, 497000);
      CHECK(result.status == IMSEQ_ERROR_DATA && result.error.offset == left);
      CHECK(std::strstr(result.error.message, "truncated") != nullptr);
      CHECK(reader.open(path, nullptr) == IMSEQ_OK && reader.file_bytes() == left);
      const Result behind_its_end = read(reader, 499999, 1);
      CHECK(behind_its_end.status == IMSEQ_ERROR_DATA && behind_its_end.error.offset == left);
    }
  }
}

// Offsets and lengths whose sum overflows, or comes near to it.
void test_a_range_beyond_any_file_is_refused() {
  FileReader reader(false, disk_pread);
  CHECK(reader.open(folder + "/file", nullptr) == IMSEQ_OK);
  const Buffer memory(kPageBytes);
  const uint8_t* bytes = nullptr;
  std::vector<BadRange> bad;
  disk = {};
  for (const int64_t large : {(int64_t{1} << 62) - 10, int64_t{1} << 62, INT64_MAX - 10}) {
    imseq_error error = {};
    CHECK(reader.check_range(large, 100, &error) == IMSEQ_ERROR_DATA);
    CHECK(error.offset == kFileBytes && std::strstr(error.message, "truncated") != nullptr);
    CHECK(reader.check_range(100, large, nullptr) == IMSEQ_ERROR_DATA);
    CHECK(reader.check_range(large, large, nullptr) == IMSEQ_ERROR_DATA);
    CHECK(reader.read(large, 100, memory.get(), &bytes, &bad, nullptr) == IMSEQ_ERROR_ARGUMENT);
    CHECK(!reader.read_cached(large, 100, memory.get(), &bytes));
  }
  CHECK(reader.read(-1, 100, memory.get(), &bytes, &bad, nullptr) == IMSEQ_ERROR_ARGUMENT);
  CHECK(disk.requests.empty());
  CHECK(reader.check_range(kFileBytes - 10, 10, nullptr) == IMSEQ_OK);
  CHECK(reader.check_range(kFileBytes - 10, 11, nullptr) == IMSEQ_ERROR_DATA);
  CHECK(reader.check_range(kFileBytes + 1, 0, nullptr) == IMSEQ_ERROR_DATA);
}

void test_a_replaced_file_is_read_as_it_was_opened() {
  const std::string path = make_file("replaced", 500000);
  const std::string newer = folder + "/newer";
  std::FILE* file = std::fopen(newer.c_str(), "wb");
  std::fputs("something else", file);
  std::fclose(file);
  FileReader reader(true);
  CHECK(reader.open(path, nullptr) == IMSEQ_OK);
  CHECK(std::rename(newer.c_str(), path.c_str()) == 0);
  CHECK(reader.open(path, nullptr) == IMSEQ_OK && reader.file_bytes() == 500000);
  const Result result = read(reader, 3000, 497000);
  CHECK(result.status == IMSEQ_OK && is_right(result, 3000));
}

void test_what_is_no_file() {
  imseq_error error = {};
  FileReader reader(true);
  CHECK(reader.open(folder + "/missing", &error) == IMSEQ_ERROR_READ && error.os_errno == ENOENT);
  CHECK(std::strstr(error.message, "/missing") != nullptr);
  CHECK(reader.open(folder, &error) == IMSEQ_ERROR_DATA);
  int64_t size_bytes, address;
  CHECK(imseq_look_up((folder + "/missing").c_str(), &size_bytes, &address, &error) ==
        IMSEQ_ERROR_READ);
  CHECK(error.os_errno == ENOENT);
  CHECK(imseq_look_up(folder.c_str(), &size_bytes, &address, &error) == IMSEQ_ERROR_DATA);
  CHECK(imseq_look_up(nullptr, &size_bytes, &address, &error) == IMSEQ_ERROR_ARGUMENT);
}

void test_look_up() {
  const std::string file = folder + "/file";
  const std::string second = make_file("second", 12345);
  int64_t size_bytes, first_address, second_address;
  CHECK(imseq_look_up(file.c_str(), &size_bytes, &first_address, nullptr) == IMSEQ_OK);
  CHECK(size_bytes == kFileBytes && first_address >= -1);
  CHECK(imseq_look_up(second.c_str(), &size_bytes, &second_address, nullptr) == IMSEQ_OK);
  CHECK(size_bytes == 12345);
  // If the file system tells addresses, they differ.
  CHECK((first_address == second_address) == (first_address == -1));
#if defined(__linux__)
  struct statfs system;
  CHECK(::statfs(folder.c_str(), &system) == 0);
  if (system.f_type == EXT4_SUPER_MAGIC) CHECK(first_address > 0 && second_address > 0);
#endif
}

void test_preallocate() {
  const std::string path = folder + "/growing";
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT, 0600);
  imseq_error error = {};
  CHECK(imseq_preallocate(file, 3 * kMegabyte, &error) == IMSEQ_OK);
  CHECK(imseq_preallocate(file, 0, &error) == IMSEQ_OK);
  struct stat info;
  CHECK(::fstat(file, &info) == 0 && info.st_size == 0);
  CHECK(imseq_preallocate(file, -1, &error) == IMSEQ_ERROR_ARGUMENT);
  ::close(file);
#if defined(__linux__)
  CHECK(info.st_blocks == 0 || info.st_blocks * 512 >= 3 * kMegabyte);
  CHECK(imseq_preallocate(file, kMegabyte, &error) == IMSEQ_ERROR_READ && error.os_errno == EBADF);
#endif
}

void test_buffers() {
  for (const int64_t size_bytes : {int64_t{1}, kPageBytes, kMegabyte + 1, 16 * kMegabyte + 5}) {
    const Buffer buffer(size_bytes);
    CHECK(buffer.capacity_bytes >= size_bytes);
    CHECK(buffer.capacity_bytes < size_bytes + 2 * 65536);
    CHECK(reinterpret_cast<uintptr_t>(buffer.get()) % kPageBytes == 0);
    std::memset(buffer.get(), 1, static_cast<size_t>(buffer.capacity_bytes));
  }
  BufferPool pool;
  Buffer buffer = pool.get(kMegabyte);
  const uint8_t* const bytes = buffer.get();
  pool.give(std::move(buffer), 2 * kMegabyte);
  Buffer small = pool.get(1000);  // a buffer much larger than needed is left for others
  CHECK(small.get() != bytes);
  CHECK(pool.get(kMegabyte - 1000).get() == bytes);
  pool.give(std::move(small), 0);
  CHECK(pool.get(1000).get() != nullptr);
}

}  // namespace

int main() {
  char pattern[] = "/tmp/imseq_read_XXXXXX";
  folder = ::mkdtemp(pattern);
  make_file("file", kFileBytes);
  test_ranges_are_read_as_they_are();
  test_direct_is_one_request();
  test_buffered_is_read_in_megabytes();
  test_what_the_page_cache_has_is_read_without_the_disk();
  test_short_answers_and_interrupts();
  test_where_o_direct_is_refused_the_page_cache_is_used();
  test_what_the_disk_reads_the_second_time_is_good();
  test_bad_sectors_cost_their_pages_and_no_more();
  test_a_dead_disk_is_given_up_soon();
  test_other_refusals_are_errors_at_once();
  test_a_file_that_became_shorter_is_an_error();
  test_a_range_beyond_any_file_is_refused();
  test_a_replaced_file_is_read_as_it_was_opened();
  test_what_is_no_file();
  test_look_up();
  test_preallocate();
  test_buffers();
  for (const char* name : {"file", "other", "shrinking", "replaced", "second", "growing"}) {
    ::unlink((folder + "/" + name).c_str());
  }
  ::rmdir(folder.c_str());
  std::printf(failures == 0 ? "read: ok\n" : "read: %d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
