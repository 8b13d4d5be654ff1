// Which instruction set the kernels use.

#ifndef MPJAX_KERNELS_NATIVE_ISA_H_
#define MPJAX_KERNELS_NATIVE_ISA_H_

namespace mpjax {

// From the slowest to the fastest. AVX-VNNI is not a part of AVX512-VNNI: a CPU that has the latter alone
// has the same instruction on 256 bits in another form, and takes that where AVX-VNNI is asked for.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Bf16 };

// The best that this CPU has, or the one that MPJAX_NATIVE_ISA names in the environment, if it has
// that.
Isa CurrentIsa();

// Whether the CPU has AVX-VNNI itself, and so has the library.
bool HasAvxVnni();

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ISA_H_
