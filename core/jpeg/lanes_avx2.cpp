#include "jpeg/lanes_loop.h"

const imseq::LaneKernels imseq::kLanesAvx2 = kLaneKernels;
