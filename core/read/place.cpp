#include "read/place.h"

#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/fiemap.h>
#include <linux/fs.h>
#endif

#include "read/file_reader.h"

namespace imseq {

namespace {

#if defined(__linux__)
int64_t first_address(int fd) {
  alignas(fiemap) uint8_t memory[sizeof(fiemap) + sizeof(fiemap_extent)] = {};
  auto* map = reinterpret_cast<fiemap*>(memory);
  map->fm_length = FIEMAP_MAX_OFFSET;
  map->fm_extent_count = 1;
  if (::ioctl(fd, FS_IOC_FIEMAP, map) != 0 || map->fm_mapped_extents == 0) return -1;
  const fiemap_extent& first = map->fm_extents[0];
  // Data that is still in memory has no address yet.
  if ((first.fe_flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC)) != 0) return -1;
  return static_cast<int64_t>(first.fe_physical);
}
#else
int64_t first_address(int) { return -1; }
#endif

}  // namespace

int32_t look_up(const std::string& path, FilePlace* out, imseq_error* error) {
  bool direct = false;
  int fd;
  int32_t status = open_file(path, &direct, &fd, error);
  if (status != IMSEQ_OK) return status;
  struct stat info;
  status = stat_file(fd, path, &info, error);
  if (status == IMSEQ_OK) *out = {info.st_size, first_address(fd), info.st_ino};
  ::close(fd);
  return status;
}

}  // namespace imseq
