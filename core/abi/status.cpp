#include "abi/status.h"

#include <cstdarg>
#include <cstdio>

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

}  // namespace imseq
