// What functions that fail share.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

#include "imagenet_seq.h"

namespace imseq {

// Fills *error (when not null) and returns code, so that callers write `return fail(...)`.
__attribute__((format(printf, 6, 7))) inline int32_t fail(imseq_error* error, int32_t code,
                                                          int64_t sample, int64_t offset,
                                                          int os_errno, const char* format, ...) {
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

inline bool has_null(std::initializer_list<const void*> pointers) {
  return std::find(pointers.begin(), pointers.end(), nullptr) != pointers.end();
}

}  // namespace imseq
