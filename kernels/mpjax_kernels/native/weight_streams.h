// What multiplies few rows by a weight as it lies, in files of their own (`weight.h` says what each does).

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

// By int4 without zero points whose terms lie next to each other: `multiply_direct`, in float32 and in
// bfloat16.
void MultiplyInt4TermsFloats(const Weight& weight, const Run& run, const uint32_t* left,
                             int64_t stride, int64_t rows, float* sums);
void MultiplyInt4TermsPairs(const Weight& weight, const Run& run, const uint32_t* left,
                            int64_t stride, int64_t rows, float* sums);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_STREAMS_H_
