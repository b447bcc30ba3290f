// The C functions of packing.
#include <fcntl.h>

#include <cerrno>
#include <exception>

#include "abi/status.h"
#include "imagenet_seq.h"
#include "pack/huffman.h"
#include "pack/transcode.h"
#include "read/crc32c.h"

namespace imseq {

namespace {

Transcoder& transcoder_of_thread() {
  static thread_local Transcoder transcoder;
  return transcoder;
}

int32_t check_arguments(const uint8_t* bytes, size_t size, int32_t restart_interval,
                        imseq_error* error) {
  if (bytes == nullptr && size > 0) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "bytes: expected a pointer, got NULL");
  }
  if (restart_interval < 0 || restart_interval > 65535) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "restart_interval: expected 0 to 65535 MCUs, got %d", restart_interval);
  }
  return IMSEQ_OK;
}

// Returns 0, or the errno of a refusal. Does nothing where the system can't do it: reserved room
// only makes reading faster.
int set_aside([[maybe_unused]] int fd, [[maybe_unused]] int64_t size_bytes) {
#if defined(__linux__)
  while (::fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size_bytes) != 0) {
    if (errno == EOPNOTSUPP || errno == ENOSYS) return 0;
    if (errno != EINTR) return errno;
  }
#endif
  return 0;
}

}  // namespace

}  // namespace imseq

int32_t imseq_transcode(const uint8_t* bytes, size_t size, int32_t restart_interval,
                        uint32_t options, const uint8_t* tables, uint8_t* out, size_t capacity,
                        size_t* out_size, imseq_header* header, imseq_error* error) try {
  int32_t status = imseq::check_arguments(bytes, size, restart_interval, error);
  if (status != IMSEQ_OK) return status;
  if ((out == nullptr && capacity > 0) || out_size == nullptr) {
    return imseq::is_null(error, "imseq_transcode");
  }
  imseq::Transcoder& transcoder = imseq::transcoder_of_thread();
  const bool strip = (options & IMSEQ_STRIP_METADATA) != 0;
  size_t entropy_offset = 0;
  status = transcoder.transcode(bytes, size, {restart_interval, strip, tables}, out, capacity,
                                out_size, &entropy_offset, error);
  if (status == IMSEQ_OK && header != nullptr) {
    imseq::describe(transcoder.header(), true, header);
    header->restart_interval = restart_interval;
    header->progressive = 0;
    header->entropy_offset = static_cast<int64_t>(entropy_offset);
  }
  transcoder.trim();
  return status;
} catch (const std::exception&) {
  imseq::transcoder_of_thread().trim();
  return imseq::out_of_memory(error, "imseq_transcode");
}

int32_t imseq_count_symbols(const uint8_t* bytes, size_t size, int32_t restart_interval,
                            uint64_t* counts, imseq_error* error) try {
  const int32_t status = imseq::check_arguments(bytes, size, restart_interval, error);
  if (status != IMSEQ_OK) return status;
  if (counts == nullptr) return imseq::is_null(error, "imseq_count_symbols");
  imseq::Transcoder& transcoder = imseq::transcoder_of_thread();
  const bool counted = transcoder.count_symbols(bytes, size, restart_interval, counts);
  transcoder.trim();
  return counted ? IMSEQ_OK : IMSEQ_NOT_DECODED;
} catch (const std::exception&) {
  imseq::transcoder_of_thread().trim();
  return imseq::out_of_memory(error, "imseq_count_symbols");
}

int32_t imseq_fit_tables(const uint64_t* counts, uint8_t* out, imseq_error* error) try {
  static_assert(IMSEQ_TABLES_BYTES == imseq::kPackTablesBytes);
  if (counts == nullptr || out == nullptr) return imseq::is_null(error, "imseq_fit_tables");
  for (size_t i = 0; i < 4 * 256; ++i) {
    if (counts[i] < imseq::kMaxSymbolCount) continue;
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "counts[%zu]: expected less than 2^48, got %llu", i,
                       static_cast<unsigned long long>(counts[i]));
  }
  for (size_t table = 0; table < 4; ++table) {
    const imseq::HuffmanKind kind = imseq::kind_of_table(table);
    out = imseq::write_dht(imseq::fit_pack_code(counts + table * 256, kind), table, out);
  }
  return IMSEQ_OK;
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_fit_tables");
}

uint32_t imseq_crc32c(uint32_t crc, const uint8_t* bytes, size_t size) {
  return imseq::crc32c(crc, bytes, size);
}

int32_t imseq_preallocate(int32_t fd, int64_t size_bytes, imseq_error* error) {
  if (size_bytes < 0) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "size_bytes: expected 0 or more, got %lld",
                       static_cast<long long>(size_bytes));
  }
  const int os_errno = size_bytes == 0 ? 0 : imseq::set_aside(fd, size_bytes);
  if (os_errno == 0) return IMSEQ_OK;
  return imseq::fail(error, IMSEQ_ERROR_READ, -1, -1, os_errno, "cannot set aside %lld bytes",
                     static_cast<long long>(size_bytes));
}
