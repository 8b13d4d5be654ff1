// The kernels of rows by int4 whose lanes lie next to each other; see `GroupedKernels::multiply_lanes`.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_LANES_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_LANES_H_

#include "grouped.h"

namespace mpjax {

void MultiplyLanesAvx512(const Weight& weight, int64_t lane, int64_t lanes, int64_t term,
                         int64_t terms, const LaidOutRows& left, int32_t* sums);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_LANES_H_
