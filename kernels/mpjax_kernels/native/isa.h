// Which instruction set the kernels use.

#ifndef MPJAX_KERNELS_NATIVE_ISA_H_
#define MPJAX_KERNELS_NATIVE_ISA_H_

namespace mpjax {

// In their order: each has what those before it have.
enum class Isa { kPortable, kAvx512Vnni, kAvx512Bf16 };

// The best that this CPU has, or the one that MPJAX_NATIVE_ISA names in the environment, if it has
// that.
Isa CurrentIsa();

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ISA_H_
