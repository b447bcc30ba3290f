#include "jpeg/colour_loop.h"

namespace imseq {

const ColourKernels kColourNeon = kVectorKernels;

}  // namespace imseq
