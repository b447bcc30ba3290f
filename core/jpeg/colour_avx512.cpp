#include "jpeg/colour_loop.h"

namespace imseq {

const ColourKernels kColourAvx512 = kVectorKernels;

}  // namespace imseq
