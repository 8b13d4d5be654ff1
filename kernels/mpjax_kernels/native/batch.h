// The batch axes of the operands of a call: they come first, and a size of 1 broadcasts.

#ifndef MPJAX_KERNELS_NATIVE_BATCH_H_
#define MPJAX_KERNELS_NATIVE_BATCH_H_

#include <cstddef>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace mpjax {

using Dimensions = xla::ffi::AnyBuffer::Dimensions;

// An array as a call has it: an argument, or one that it made of one.
class View {
 public:
  View(const xla::ffi::AnyBuffer& of)
      : type_(of.element_type()), sizes_(of.dimensions()), data_(of.untyped_data()) {}
  View(xla::ffi::DataType type, Dimensions sizes, const void* data)
      : type_(type), sizes_(sizes), data_(data) {}

  xla::ffi::DataType element_type() const { return type_; }
  Dimensions dimensions() const { return sizes_; }
  const void* untyped_data() const { return data_; }

 private:
  xla::ffi::DataType type_;
  Dimensions sizes_;
  const void* data_;
};

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
