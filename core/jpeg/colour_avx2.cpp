#include "jpeg/colour_loop.h"

const imseq::ColourKernels imseq::kColourAvx2 = kVectorKernels;
