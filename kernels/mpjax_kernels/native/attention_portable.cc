// Attention of few queries, by whatever the compiler makes of the loops.

#include "attention_loops.h"

namespace mpjax {

const AttentionKernels kPortableAttention = {Widen, Narrow, Scores, Add};

}  // namespace mpjax
