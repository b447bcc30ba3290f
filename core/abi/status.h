// What the C functions share: filling the caller's error and header structs.
#pragma once

#include "imagenet_seq.h"

namespace imseq {

struct JpegHeader;

// Fills *error (when not null) and returns code, so that callers write `return fail(...)`.
__attribute__((format(printf, 6, 7))) int32_t fail(imseq_error* error, int32_t code, int64_t sample,
                                                   int64_t offset, int os_errno, const char* format,
                                                   ...);

// For a C function that was given NULL, or that got no memory.
int32_t is_null(imseq_error* error, const char* function);
int32_t out_of_memory(imseq_error* error, const char* function);

// Fills *out; supported: whether the core decodes the image.
void describe(const JpegHeader& header, bool supported, imseq_header* out);

}  // namespace imseq
