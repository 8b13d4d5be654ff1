// Which instruction set the kernels use.

#ifndef MPJAX_KERNELS_NATIVE_ISA_H_
#define MPJAX_KERNELS_NATIVE_ISA_H_

namespace mpjax {

enum class Isa { kPortable, kAvx512Bf16 };

// The best that this CPU has; kPortable if the environment has MPJAX_NATIVE_ISA=portable.
Isa CurrentIsa();

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ISA_H_
