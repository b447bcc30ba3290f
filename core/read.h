// The read stage's hands: files read in whole ranges, and the memory blocks lie in.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "imagenet_seq.h"

namespace imseq {

// Memory of one block. Grows by replacement only.
struct Buffer {
  std::unique_ptr<uint8_t[]> bytes;
  int64_t capacity_bytes = 0;
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

// Reads ranges of files; keeps the file read last open, since blocks of one shard follow each
// other. One per thread.
class FileReader {
 public:
  FileReader() = default;
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Opens path (unless it is open) and finds out its size.
  [[nodiscard]] int32_t open(const std::string& path, imseq_error* error);
  [[nodiscard]] int64_t file_bytes() const { return file_bytes_; }
  // Reads [offset, offset + length) of the open file whole; a file that ends early is
  // IMSEQ_ERROR_DATA.
  [[nodiscard]] int32_t read(int64_t offset, int64_t length, uint8_t* out, imseq_error* error);

 private:
  void close();

  std::string path_;
  int fd_ = -1;
  int64_t file_bytes_ = 0;
};

}  // namespace imseq
