// The read stage's hands: files read in whole ranges, and the memory blocks lie in.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "imagenet_seq.h"

namespace imseq {

// What O_DIRECT wants offsets, lengths and memory aligned to. Disks with 512-byte sectors would do
// with less, but a page is what all take.
inline constexpr int64_t kPageBytes = 4096;

// Memory of one block, aligned to kPageBytes. Grows by replacement only.
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc.
  explicit Buffer(int64_t size_bytes);

  uint8_t* get() const { return bytes_.get(); }
  // What a new one for so many bytes takes.
  static int64_t capacity_for(int64_t size_bytes);

  int64_t capacity_bytes = 0;

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<uint8_t[], Free> bytes_;
};

// Buffers between two uses. Reuse matters: a fresh allocation of this size costs a page fault for
// every 4 KB. Not thread-safe.
class BufferPool {
 public:
  // A buffer of at least size_bytes. Throws std::bad_alloc.
  [[nodiscard]] Buffer get(int64_t size_bytes);
  // Keeps the buffer as long as all unused ones take keep_bytes at most.
  void give(Buffer buffer, int64_t keep_bytes);

 private:
  std::vector<Buffer> free_;
  int64_t free_bytes_ = 0;
};

// A range of a file that the disk could not read, in bytes of the file.
struct BadRange {
  int64_t begin = 0;
  int64_t end = 0;
  int32_t os_errno = 0;
};

// Reads ranges of files; keeps the file read last open, since blocks of one shard follow each
// other. One per thread.
class FileReader {
 public:
  using Pread = ssize_t (*)(int, void*, size_t, off_t);

  // direct: past the page cache (O_DIRECT; F_NOCACHE on macOS), as far as the file system allows;
  // from the first file on that it does not, through the page cache for good. Tests put a disk with
  // bad sectors in the place of pread.
  explicit FileReader(bool direct, Pread pread = ::pread) : pread_(pread), direct_(direct) {}
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Opens path (unless it is open) and finds out its size.
  [[nodiscard]] int32_t open(const std::string& path, imseq_error* error);
  [[nodiscard]] int64_t file_bytes() const { return file_bytes_; }
  // A number that is another one when the file was written to, or is another file.
  [[nodiscard]] uint64_t file_version() const { return file_version_; }

  // Bytes of memory that read() needs for a range: the pages it lies in.
  static int64_t room(int64_t offset, int64_t length);
  // Reads [offset, offset + length) of the open file whole into memory of room() bytes aligned to
  // kPageBytes. *bytes: where the range begins in it. A file that ends early is IMSEQ_ERROR_DATA.
  // What the disk can't read is tried again, in ever smaller pieces; a few pages that stay bad are
  // added to *bad, their bytes are zero, and the status is IMSEQ_OK.
  [[nodiscard]] int32_t read(int64_t offset, int64_t length, uint8_t* memory, const uint8_t** bytes,
                             std::vector<BadRange>* bad, imseq_error* error);
  // The same for what is in the page cache already, without going to the disk. False: some of it is
  // not, or this system can't tell.
  [[nodiscard]] bool read_cached(int64_t offset, int64_t length, uint8_t* memory,
                                 const uint8_t** bytes);
  // Whether requests go past the page cache, as far as is known.
  [[nodiscard]] bool is_direct() const { return direct_; }
  // Whether the last request went past the page cache.
  [[nodiscard]] bool was_direct() const { return was_direct_; }

 private:
  void close();
  void use_page_cache();
  void advise(int64_t begin, int64_t end);
  int fill(int64_t begin, int64_t end, uint8_t* memory, int64_t* reached);
  int salvage(int64_t begin, int64_t end, uint8_t* memory, int64_t piece_bytes, int64_t* reached,
              std::vector<BadRange>* bad_pages);
  int32_t refused(int os_errno, int64_t begin, int64_t end, int64_t reached,
                  const std::vector<BadRange>& bad_pages, imseq_error* error) const;

  const Pread pread_;
  bool direct_;
  bool was_direct_ = false;
  bool advised_ = false;
  bool can_ask_cache_ = true;
  std::string path_;
  int fd_ = -1;
  int64_t file_bytes_ = 0;
  uint64_t file_version_ = 0;
};

// Where a file lies.
struct FilePlace {
  int64_t size_bytes = 0;
  // Physical byte of its first extent, of use for sorting only; -1 where the file system does not
  // say, or has not decided yet.
  int64_t address = -1;
  // Stands in for the address where there is none: inodes are given out about in the order of a
  // file system's blocks.
  uint64_t inode = 0;
};
[[nodiscard]] int32_t look_up(const std::string& path, FilePlace* out, imseq_error* error);

}  // namespace imseq
