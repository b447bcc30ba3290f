#include "jpeg/lanes_loop.h"

namespace imseq {

const LaneKernels kLaneKernelsAvx2 = {run_lanes<ByImageTables, kImageLanes>,
                                      run_lanes<ByFlatTables, kFlatLanes>, kImageLanes, kFlatLanes};

}  // namespace imseq
