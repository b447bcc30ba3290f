#include "jpeg/colour_loop.h"

const imseq::ColourKernels imseq::kColourNeon = kVectorKernels;
