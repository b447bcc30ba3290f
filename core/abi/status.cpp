#include "abi/status.h"

#include <cstdarg>
#include <cstdio>

#include "jpeg/header.h"

namespace imseq {

int32_t fail(imseq_error* error, int32_t code, int64_t sample, int64_t offset, int os_errno,
             const char* format, ...) {
  if (error == nullptr) return code;
  error->code = code;
  error->os_errno = os_errno;
  error->sample = sample;
  error->offset = offset;
  va_list args;
  va_start(args, format);
  vsnprintf(error->message, sizeof(error->message), format, args);
  va_end(args);
  return code;
}

int32_t is_null(imseq_error* error, const char* function) {
  return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "%s: expected pointers, got NULL", function);
}

int32_t out_of_memory(imseq_error* error, const char* function) {
  return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "%s: no memory", function);
}

void describe(const JpegHeader& header, bool supported, imseq_header* out) {
  *out = imseq_header{};
  out->width = header.width;
  out->height = header.height;
  out->num_components = header.num_components;
  for (size_t c = 0; c < static_cast<size_t>(header.num_components); ++c) {
    out->h_sampling[c] = header.components[c].h_sampling;
    out->v_sampling[c] = header.components[c].v_sampling;
  }
  out->restart_interval = header.restart_interval;
  out->progressive = header.frame_marker == kSof2 ? 1 : 0;
  out->supported = supported ? 1 : 0;
  out->entropy_offset = static_cast<int64_t>(header.entropy_offset);
}

}  // namespace imseq
