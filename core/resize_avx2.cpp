#include "resize.h"
namespace imseq {
const ResizeKernels& avx2_resize_kernels() { return portable_resize_kernels(); }
}  // namespace imseq
