// Attention of few queries, 8 numbers at a time: `vmulps` and `vaddps`.

#include "attention_loops.h"

#if defined(__AVX2__)

namespace mpjax {

const AttentionKernels kAvx2Attention = {Widen, Narrow, Scores, Add};

}  // namespace mpjax

#endif
