#include "batch.h"
namespace imseq {
const StoreKernels& avx2_store_kernels() { return portable_store_kernels(); }
}  // namespace imseq
