// What an instruction set brings to the cast to float8.

#ifndef MPJAX_KERNELS_NATIVE_QUANTIZE_H_
#define MPJAX_KERNELS_NATIVE_QUANTIZE_H_

#include <cstdint>

#include "float8.h"

namespace mpjax {

enum class Input { kFloat32, kBfloat16 };

struct QuantizeKernels {
  // The bits of the largest |x|, which order non-negative floats as their size, infinity above all
  // finite ones and NaN above that.
  uint32_t (*largest)(Input type, const void* x, int64_t count);

  // values = saturate(round(x / scale)), and the bits of the largest |x|.
  uint32_t (*quantize)(Input type, const void* x, int64_t count, float scale, const Float8& format,
                       uint8_t* values);
};

extern const QuantizeKernels kPortableQuantize;
extern const QuantizeKernels kAvx512Quantize;

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_QUANTIZE_H_
