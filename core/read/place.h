// Where files lie on their disk.
#pragma once

#include <cstdint>
#include <string>

#include "imagenet_seq.h"

namespace imseq {

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
