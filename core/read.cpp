#include "read.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "status.h"

namespace imseq {

namespace {
constexpr int64_t kGrain = 64 * 1024;  // capacities are rounded up to this, so that files fit again
constexpr int64_t kMaxRequest = int64_t{1} << 30;  // Linux cuts one read() at 2 GB
}  // namespace

Buffer BufferPool::get(int64_t size_bytes) {
  size_t best = free_.size();
  for (size_t i = 0; i < free_.size(); ++i) {
    if (free_[i].capacity_bytes < size_bytes) continue;
    if (best == free_.size() || free_[i].capacity_bytes < free_[best].capacity_bytes) best = i;
  }
  // A buffer much larger than needed is left for a block that needs it.
  if (best < free_.size() && free_[best].capacity_bytes <= 4 * (size_bytes + kGrain)) {
    Buffer buffer = std::move(free_[best]);
    free_[best] = std::move(free_.back());
    free_.pop_back();
    free_bytes_ -= buffer.capacity_bytes;
    return buffer;
  }
  Buffer buffer;
  buffer.capacity_bytes = (size_bytes + kGrain) / kGrain * kGrain;
  buffer.bytes.reset(new uint8_t[static_cast<size_t>(buffer.capacity_bytes)]);
  return buffer;
}

void BufferPool::give(Buffer buffer, int64_t keep_bytes) {
  if (buffer.bytes == nullptr || free_bytes_ + buffer.capacity_bytes > keep_bytes) return;
  free_bytes_ += buffer.capacity_bytes;
  free_.push_back(std::move(buffer));
}

FileReader::~FileReader() { close(); }

void FileReader::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  path_.clear();
}

int32_t FileReader::open(const std::string& path, imseq_error* error) {
  if (fd_ < 0 || path != path_) {
    close();
    do {
      fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    } while (fd_ < 0 && errno == EINTR);
    if (fd_ < 0) {
      return fail(error, IMSEQ_ERROR_READ, -1, -1, errno, "cannot open %s", path.c_str());
    }
    path_ = path;
  }
  struct stat info;
  if (::fstat(fd_, &info) != 0) {
    return fail(error, IMSEQ_ERROR_READ, -1, -1, errno, "cannot stat %s", path.c_str());
  }
  if (!S_ISREG(info.st_mode)) {
    return fail(error, IMSEQ_ERROR_DATA, -1, -1, 0, "%s is not a regular file", path.c_str());
  }
  file_bytes_ = info.st_size;
  return IMSEQ_OK;
}

int32_t FileReader::read(int64_t offset, int64_t length, uint8_t* out, imseq_error* error) {
  int64_t done = 0;
  while (done < length) {
    const int64_t request = length - done < kMaxRequest ? length - done : kMaxRequest;
    const ssize_t got =
        ::pread(fd_, out + done, static_cast<size_t>(request), static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      return fail(error, IMSEQ_ERROR_READ, -1, offset + done, errno,
                  "cannot read %lld bytes at offset %lld of %s", static_cast<long long>(request),
                  static_cast<long long>(offset + done), path_.c_str());
    }
    if (got == 0) {
      return fail(
          error, IMSEQ_ERROR_DATA, -1, offset + done, 0,
          "%s ends at byte %lld, expected %lld bytes from offset %lld: it is truncated or was "
          "replaced; for a pack run 'imagenet-seq verify'",
          path_.c_str(), static_cast<long long>(offset + done), static_cast<long long>(length),
          static_cast<long long>(offset));
    }
    done += got;
  }
  return IMSEQ_OK;
}

}  // namespace imseq
