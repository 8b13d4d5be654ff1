// The cast to 8 bits of 8 numbers at a time: `vdivps` and integer arithmetic.

#include "quantize_loops.h"

#if defined(__AVX2__)

namespace mpjax {

const QuantizeKernels kAvx2Quantize = {Largest, Quantize};

}  // namespace mpjax

#endif
