// What an instruction set brings to the cast to 8 bits.

#ifndef MPJAX_KERNELS_NATIVE_QUANTIZE_H_
#define MPJAX_KERNELS_NATIVE_QUANTIZE_H_

#include <cstdint>

#include "float8.h"
#include "real.h"

namespace mpjax {

enum class Output { kE4M3, kE5M2, kInt8 };

// The largest magnitude that values of a format take.
inline float LargestOf(Output format) {
  return format == Output::kE4M3 ? kE4M3.max : format == Output::kE5M2 ? kE5M2.max : 127.0f;
}

struct QuantizeKernels {
  // The bits of the largest |x|, which order non-negative floats as their size, infinity above all
  // finite ones and NaN above that.
  uint32_t (*largest)(Real type, const void* x, int64_t count);

  // values = saturate(round(x / scale)), and the bits of the largest |x|.
  uint32_t (*quantize)(Real type, const void* x, int64_t count, float scale, Output format,
                       uint8_t* values);
};

// Quantizes a tensor by the scale of its amax, which is returned, in this thread; as the call does
// that has no scale.
float QuantizeByAmax(Real type, const void* x, int64_t count, Output format, uint8_t* values);

extern const QuantizeKernels kPortableQuantize;
extern const QuantizeKernels kAvx2Quantize;
extern const QuantizeKernels kAvx512Quantize;

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_QUANTIZE_H_
