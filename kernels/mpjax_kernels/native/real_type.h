// The floating-point formats of arrays and results, as XLA names them.

#ifndef MPJAX_KERNELS_NATIVE_REAL_TYPE_H_
#define MPJAX_KERNELS_NATIVE_REAL_TYPE_H_

#include "real.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {

inline bool IsReal(xla::ffi::DataType type) {
  return type == xla::ffi::F32 || type == xla::ffi::BF16 || type == xla::ffi::F16;
}

// Of one that is.
inline Real RealOf(xla::ffi::DataType type) {
  return type == xla::ffi::F32    ? Real::kFloat32
         : type == xla::ffi::BF16 ? Real::kBfloat16
                                  : Real::kFloat16;
}

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_REAL_TYPE_H_
