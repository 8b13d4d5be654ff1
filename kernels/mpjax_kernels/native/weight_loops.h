// What all instruction sets do alike with sums of products, in loops that compilers vectorize.
// Compiled once for each of them, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_LOOPS_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_LOOPS_H_

#include <cstdint>

#include "weight.h"

namespace mpjax {
namespace {

inline void Scale(const float* sums, int64_t rows, const float* scales, bool add, float* total) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = sums + row * kWidth;
    float* to = total + row * kWidth;
    for (int lane = 0; lane < kWidth; ++lane) {
      const float scaled = from[lane] * scales[lane];
      to[lane] = add ? to[lane] + scaled : scaled;
    }
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_LOOPS_H_
