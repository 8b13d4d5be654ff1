// Attention of few queries, 16 numbers at a time: `vmulps` and `vaddps`.

#include "attention_loops.h"

#if defined(__AVX512VNNI__)

namespace mpjax {

const AttentionKernels kAvx512Attention = {Widen, Narrow, Scores, Add};

}  // namespace mpjax

#endif
