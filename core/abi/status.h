// Filling the caller's error struct: the one way the core reports failure.
#pragma once

#include "imagenet_seq.h"

namespace imseq {

// Fills *error (when not null) and returns code, so that callers write `return fail(...)`.
__attribute__((format(printf, 6, 7))) int32_t fail(imseq_error* error, int32_t code, int64_t sample,
                                                   int64_t offset, int os_errno, const char* format,
                                                   ...);

}  // namespace imseq
