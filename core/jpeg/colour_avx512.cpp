#include "jpeg/colour_loop.h"

const imseq::ColourKernels imseq::kColourAvx512 = kVectorKernels;
