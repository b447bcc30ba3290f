#include "jpeg/lanes_loop.h"

namespace imseq {

const LaneKernels kLanesAvx2 = kLaneKernels;

}  // namespace imseq
