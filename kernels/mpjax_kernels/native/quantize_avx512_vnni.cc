// The cast to 8 bits of 16 numbers at a time: `vdivps`, integer arithmetic, and `vpmovdb`, which
// cuts numbers to their last byte.

#include "quantize_loops.h"

#if defined(__AVX512BW__)

namespace mpjax {

const QuantizeKernels kAvx512Quantize = {Largest, Quantize};

}  // namespace mpjax

#endif
