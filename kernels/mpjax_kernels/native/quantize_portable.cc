// The cast to float8, by whatever the compiler makes of the loops.

#include "quantize_loops.h"

namespace mpjax {

const QuantizeKernels kPortableQuantize = {Largest, Quantize};

}  // namespace mpjax
