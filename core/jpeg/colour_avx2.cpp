#include "jpeg/colour_loop.h"

namespace imseq {

const ColourKernels kColourAvx2 = kVectorKernels;

}  // namespace imseq
