// What functions that fail share.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "imagenet_seq.h"

namespace imseq {

// Fills *error (when not null) and returns code, so that callers write `return fail(...)`.
__attribute__((format(printf, 6, 7))) int32_t fail(imseq_error* error, int32_t code, int64_t sample,
                                                   int64_t offset, int os_errno, const char* format,
                                                   ...);

inline bool has_null(std::initializer_list<const void*> pointers) {
  return std::find(pointers.begin(), pointers.end(), nullptr) != pointers.end();
}

}  // namespace imseq
