// FileReader reads byte ranges of files, past the page cache or through it.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "imagenet_seq.h"

namespace imseq {

// No file is larger, and sums of offsets and lengths up to this don't overflow.
inline constexpr int64_t kMaxFileBytes = int64_t{1} << 62;

// Whether [offset, offset + length) may be a range of a file.
inline bool is_range(int64_t offset, int64_t length) {
  return offset >= 0 && length >= 0 && length <= kMaxFileBytes && offset <= kMaxFileBytes - length;
}

// Bytes of a file that the disk could not read.
struct BadRange {
  int64_t begin = 0;
  int64_t end = 0;
  int32_t os_errno = 0;
};

// Keeps the last file open, because the next block is often of the same shard. One per thread.
class FileReader {
 public:
  using Pread = ssize_t (*)(int, void*, size_t, off_t);

  // direct: read past the page cache (O_DIRECT; F_NOCACHE on macOS), until the first file whose
  // file system refuses it; from then on through the page cache. Tests replace pread by a disk with
  // bad sectors.
  explicit FileReader(bool direct, Pread pread = ::pread) : pread_(pread), direct_(direct) {}
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Opens path, unless it is open, and finds out its size and version.
  [[nodiscard]] int32_t open(const std::string& path, imseq_error* error);
  [[nodiscard]] int64_t file_bytes() const { return file_bytes_; }
  // Changes when the file is written to or replaced.
  [[nodiscard]] uint64_t file_version() const { return file_version_; }

  // IMSEQ_ERROR_DATA if the open file ends before the range does. To be called before memory is
  // taken: the length may be damaged.
  [[nodiscard]] int32_t check_range(int64_t offset, int64_t length, imseq_error* error) const;
  // The memory that read() needs for a range (is_range): the pages it lies in.
  static int64_t room(int64_t offset, int64_t length);
  // Reads [offset, offset + length) of the open file into memory of room() bytes, aligned to
  // kPageBytes. *bytes: where the range begins in that memory. A file that ends early is
  // IMSEQ_ERROR_DATA. What the disk can't read is tried again, in smaller and smaller pieces; if
  // only a few pages stay bad, they are added to *bad, their bytes are zero, and the status is
  // IMSEQ_OK.
  [[nodiscard]] int32_t read(int64_t offset, int64_t length, uint8_t* memory, const uint8_t** bytes,
                             std::vector<BadRange>* bad, imseq_error* error);
  // The same for a range that lies in the page cache, without asking the disk. False: some of it
  // does not, or the system can't tell.
  [[nodiscard]] bool read_cached(int64_t offset, int64_t length, uint8_t* memory,
                                 const uint8_t** bytes);
  // Whether the next request will go past the page cache, as far as is known.
  [[nodiscard]] bool is_direct() const { return direct_; }
  // Whether the last request went past the page cache.
  [[nodiscard]] bool was_direct() const { return was_direct_; }

 private:
  void close();
  void advise(int64_t begin, int64_t end);
  int fill(int64_t begin, int64_t end, uint8_t* memory, int64_t* reached);
  int salvage(int64_t begin, int64_t end, uint8_t* memory, int64_t piece_bytes, int64_t* reached,
              std::vector<BadRange>* bad_pages);
  int32_t truncated(int64_t file_end, int64_t offset, int64_t length, imseq_error* error) const;
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

// Where a file lies on its disk.
struct FilePlace {
  int64_t size_bytes = 0;
  // Physical byte address of the first extent, only for sorting; -1 where the file system does not
  // tell, or has not allocated it yet.
  int64_t address = -1;
  // Sorts files that have no address: file systems hand out inodes roughly in disk order.
  uint64_t inode = 0;
};

[[nodiscard]] int32_t look_up(const std::string& path, FilePlace* out, imseq_error* error);

}  // namespace imseq
