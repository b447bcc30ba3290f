#include "read/file_reader.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#if defined(__linux__)
#include <linux/fiemap.h>
#include <linux/fs.h>
#endif

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>

#include "abi/status.h"
#include "cpu/memory.h"
#include "read/buffers.h"

namespace imseq {

namespace {

constexpr int64_t kDirectRequest = int64_t{1} << 30;  // Linux cuts one read() just below 2 GB
// Larger requests gain nothing in the page cache: the kernel splits them at about this size.
constexpr int64_t kBufferedRequest = int64_t{1} << 20;
constexpr int64_t kSalvagePiece = int64_t{128} << 10;
// More bad pages in one range mean a bad disk instead of a bad sector, and the drive may take
// several seconds for each.
constexpr size_t kMaxBadPages = 32;

// The errors for a place that can't be read: EIO; ENODATA, which is Linux's "critical medium error"
// with O_DIRECT; EILSEQ and EBADMSG for wrong checksums (T10 and dm-integrity; ext4 and XFS).
bool is_bad_sector(int os_errno) {
  return os_errno == EIO || os_errno == ENODATA || os_errno == EILSEQ || os_errno == EBADMSG;
}

uint64_t version_of(const struct stat& info) {
#if defined(__APPLE__)
  const auto& changed = info.st_mtimespec;
#else
  const auto& changed = info.st_mtim;
#endif
  uint64_t version = 0;
  for (const int64_t word :
       {static_cast<int64_t>(info.st_dev), static_cast<int64_t>(info.st_ino),
        static_cast<int64_t>(info.st_size), static_cast<int64_t>(changed.tv_sec),
        static_cast<int64_t>(changed.tv_nsec)}) {
    version = (version ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15;
    version ^= version >> 29;
  }
  return version;
}

// *direct turns false where the file system refuses O_DIRECT.
int32_t open_file(const std::string& path, bool* direct, int* fd, imseq_error* error) {
  int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;  // opening a FIFO must not block
#if defined(O_DIRECT)
  if (*direct) flags |= O_DIRECT;
#endif
  do {
    *fd = ::open(path.c_str(), flags);
  } while (*fd < 0 && errno == EINTR);
  if (*fd < 0 && errno == EINVAL && *direct) {
    *direct = false;
    return open_file(path, direct, fd, error);
  }
  if (*fd < 0) return fail(error, IMSEQ_ERROR_READ, -1, -1, errno, "cannot open %s", path.c_str());
#if defined(F_NOCACHE)
  if (*direct) ::fcntl(*fd, F_NOCACHE, 1);
#endif
  return IMSEQ_OK;
}

int32_t stat_file(int fd, const std::string& path, struct stat* out, imseq_error* error) {
  if (::fstat(fd, out) != 0) {
    return fail(error, IMSEQ_ERROR_READ, -1, -1, errno, "cannot stat %s", path.c_str());
  }
  if (!S_ISREG(out->st_mode)) {
    return fail(error, IMSEQ_ERROR_DATA, -1, -1, 0, "%s is not a regular file", path.c_str());
  }
  return IMSEQ_OK;
}

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

FileReader::~FileReader() { close(); }

void FileReader::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  path_.clear();
}

int32_t FileReader::open(const std::string& path, imseq_error* error) {
  int32_t status = IMSEQ_OK;
  if (fd_ < 0 || path != path_) {
    close();
    status = open_file(path, &direct_, &fd_, error);
    if (status != IMSEQ_OK) return status;
    path_ = path;
    advised_ = false;
  }
  struct stat info;
  status = stat_file(fd_, path_, &info, error);
  if (status != IMSEQ_OK) return status;
  file_bytes_ = info.st_size;
  file_version_ = version_of(info);
  return IMSEQ_OK;
}

// The kernel's read-ahead reads too little or too much of a block, depending on a system setting.
// With FADV_RANDOM the kernel reads exactly what is asked for. Small files that are read as a whole
// keep the kernel's read-ahead.
void FileReader::advise(int64_t begin, int64_t end) {
  if (advised_ || (begin == 0 && end >= file_bytes_ && end <= kBufferedRequest)) return;
  advised_ = true;
#if defined(POSIX_FADV_RANDOM)
  ::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
#endif
}

int32_t FileReader::check_range(int64_t offset, int64_t length, imseq_error* error) const {
  if (is_range(offset, length) && offset + length <= file_bytes_) return IMSEQ_OK;
  return truncated(file_bytes_, offset, length, error);
}

int64_t FileReader::room(int64_t offset, int64_t length) {
  assert(is_range(offset, length));
  return round_up(offset + length, kPageBytes) - round_down(offset, kPageBytes);
}

int32_t FileReader::read(int64_t offset, int64_t length, uint8_t* memory, const uint8_t** bytes,
                         std::vector<BadRange>* bad, imseq_error* error) {
  if (!is_range(offset, length)) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, offset, 0, "%s: no file has such a range",
                path_.c_str());
  }
  const int64_t begin = round_down(offset, kPageBytes);
  const int64_t end = offset + length;
  *bytes = memory + (offset - begin);
  if (length == 0) return IMSEQ_OK;
  int64_t reached = begin;
  int os_errno = fill(begin, end, memory, &reached);
  if (is_bad_sector(os_errno)) {  // drives often manage it the second time
    const int64_t rest = round_down(reached, kPageBytes);
    os_errno = fill(rest, end, memory + (rest - begin), &reached);
  }
  std::vector<BadRange> bad_pages;
  if (is_bad_sector(os_errno)) {
    const int64_t rest = round_down(reached, kPageBytes);
    os_errno = salvage(rest, end, memory + (rest - begin), kSalvagePiece, &reached, &bad_pages);
  }
  if (os_errno != 0) return refused(os_errno, offset, end, reached, bad_pages, error);
  if (reached < end) {
    const int64_t file_end = std::min(reached, file_bytes_);  // it may end before offset
    return truncated(file_end, offset, length, error);
  }
  for (const BadRange& page : bad_pages) {
    bad->push_back({std::max(page.begin, offset), std::min(page.end, end), page.os_errno});
  }
  return IMSEQ_OK;
}

bool FileReader::read_cached([[maybe_unused]] int64_t offset, [[maybe_unused]] int64_t length,
                             [[maybe_unused]] uint8_t* memory,
                             [[maybe_unused]] const uint8_t** bytes) {
#if defined(RWF_NOWAIT)
  if (direct_ || !can_ask_cache_ || !is_range(offset, length)) return false;
  const int64_t begin = round_down(offset, kPageBytes), end = offset + length;
  *bytes = memory + (offset - begin);
  for (int64_t from = begin; from < end;) {
    iovec range = {memory + (from - begin), static_cast<size_t>(end - from)};
    const ssize_t got = ::preadv2(fd_, &range, 1, static_cast<off_t>(from), RWF_NOWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno != EAGAIN) can_ask_cache_ = false;  // not on this file system
    if (got <= 0) return false;
    from += got;
  }
  was_direct_ = false;
  return true;
#else
  return false;
#endif
}

// Reads from begin, the start of a page, to the end of the page that holds end. Returns the errno,
// or 0: everything was read, or the file ended. *reached: everything before it was read.
int FileReader::fill(int64_t begin, int64_t end, uint8_t* memory, int64_t* reached) {
  *reached = begin;
  while (*reached < end) {
    // O_DIRECT needs the start of a page after a short read, too.
    const int64_t from = round_down(*reached, kPageBytes);
    if (!direct_) advise(begin, end);
    const int64_t limit =
        direct_ ? from + kDirectRequest : round_down(from, kBufferedRequest) + kBufferedRequest;
    const auto size = static_cast<size_t>(std::min(round_up(end, kPageBytes), limit) - from);
    ssize_t got;
    do {
      got = pread_(fd_, memory + (from - begin), size, static_cast<off_t>(from));
    } while (got < 0 && errno == EINTR);
    const int os_errno = errno;
    if (got < 0 && os_errno == EINVAL && direct_) {
      direct_ = false;
#if defined(O_DIRECT)  // on the open file, because by now its name may belong to another one
      ::fcntl(fd_, F_SETFL, ::fcntl(fd_, F_GETFL) & ~O_DIRECT);
#endif
      continue;
    }
    was_direct_ = direct_;
    if (got < 0) return os_errno;
    if (from + got <= *reached) return 0;
    *reached = std::min(end, from + got);
  }
  return 0;
}

// Like fill, but in pieces; a bad piece is read page by page, and bad pages become zero.
int FileReader::salvage(int64_t begin, int64_t end, uint8_t* memory, int64_t piece_bytes,
                        int64_t* reached, std::vector<BadRange>* bad_pages) {
  for (int64_t from = begin; from < end; from = *reached) {
    const int64_t to = std::min(end, round_down(from, piece_bytes) + piece_bytes);
    uint8_t* const piece = memory + (from - begin);
    int os_errno = fill(from, to, piece, reached);
    if (is_bad_sector(os_errno) && piece_bytes > kPageBytes) {
      os_errno = salvage(from, to, piece, kPageBytes, reached, bad_pages);
    } else if (is_bad_sector(os_errno) && bad_pages->size() < kMaxBadPages) {
      std::memset(piece, 0, static_cast<size_t>(kPageBytes));
      bad_pages->push_back({from, to, os_errno});
      *reached = to;
      continue;
    }
    if (os_errno != 0 || *reached < to) return os_errno;
  }
  return 0;
}

int32_t FileReader::truncated(int64_t file_end, int64_t offset, int64_t length,
                              imseq_error* error) const {
  return fail(error, IMSEQ_ERROR_DATA, -1, file_end, 0,
              "%s ends at byte %lld, expected %lld bytes from offset %lld: it is truncated or was "
              "replaced; for a pack run 'imagenet-seq verify'",
              path_.c_str(), static_cast<long long>(file_end), static_cast<long long>(length),
              static_cast<long long>(offset));
}

int32_t FileReader::refused(int os_errno, int64_t begin, int64_t end, int64_t reached,
                            const std::vector<BadRange>& bad_pages, imseq_error* error) const {
  if (!is_bad_sector(os_errno)) {
    return fail(error, IMSEQ_ERROR_READ, -1, reached, os_errno,
                "cannot read %lld bytes at offset %lld of %s",
                static_cast<long long>(end - reached), static_cast<long long>(reached),
                path_.c_str());
  }
  const int64_t first = std::max(begin, bad_pages.empty() ? reached : bad_pages.front().begin);
  return fail(error, IMSEQ_ERROR_READ, -1, first, os_errno,
              "the disk cannot read more than %zu pages from offset %lld on of %s (block at %lld, "
              "%lld bytes): see 'dmesg' and 'smartctl -a', and restore the file to a sound disk",
              bad_pages.size(), static_cast<long long>(first), path_.c_str(),
              static_cast<long long>(begin), static_cast<long long>(end - begin));
}

}  // namespace imseq
