// What multiplies few rows by a weight that is read line by line, in files of their own.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_STREAMS_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_STREAMS_H_

#include <cstdint>

#include "weight.h"

namespace mpjax {

// In float32: of int8 and int4.
void StreamWeight(const Weight& weight, const Run& run, const uint32_t* left, int64_t left_stride,
                  int64_t rows, int64_t stride, float* sums);
void FoldWeight(const Weight& weight, const float* sums, const float* scales, int64_t lanes,
                float* total);

// In bfloat16: of int4.
void StreamWeightPairs(const Weight& weight, const Run& run, const uint32_t* left,
                       int64_t left_stride, int64_t rows, int64_t stride, float* sums);
void FoldWeightPairs(const Weight& weight, const float* sums, const float* scales, int64_t lanes,
                     float* total);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_STREAMS_H_
