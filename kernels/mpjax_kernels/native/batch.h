// The batch axes of the operands of a call: they come first, and a size of 1 broadcasts.

#ifndef MPJAX_KERNELS_NATIVE_BATCH_H_
#define MPJAX_KERNELS_NATIVE_BATCH_H_

#include <cstddef>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace mpjax {

using Dimensions = xla::ffi::AnyBuffer::Dimensions;

// Whether the first `count` sizes are those of the result or 1.
inline bool Broadcasts(const Dimensions& sizes, const Dimensions& out, size_t count) {
  for (size_t axis = 0; axis < count; ++axis) {
    if (sizes[axis] != out[axis] && sizes[axis] != 1) return false;
  }
  return true;
}

// Which matrix of an operand, whose first `count` axes are a batch, is that of the result's b-th.
inline int64_t BatchIndex(const Dimensions& sizes, const Dimensions& out, size_t count, int64_t b) {
  int64_t index = 0, stride = 1;
  for (size_t axis = count; axis-- > 0;) {
    if (sizes[axis] != 1) index += b % out[axis] * stride;
    stride *= sizes[axis];
    b /= out[axis];
  }
  return index;
}

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_BATCH_H_
