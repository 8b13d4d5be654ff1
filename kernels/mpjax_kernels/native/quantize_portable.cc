// The cast to 8 bits, by whatever the compiler makes of the loops.

#include "quantize_loops.h"

namespace mpjax {

const QuantizeKernels kPortableQuantize = {Largest, Quantize};

}  // namespace mpjax
