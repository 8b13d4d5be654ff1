// Which instruction set the kernels use: asked of the CPU once.

#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "xla/ffi/api/c_api.h"

namespace mpjax {
namespace {

bool HasAvx512Bf16() {
#if defined(MPJAX_HAS_AVX512_BF16)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa Choose() {
  const char* wanted = std::getenv("MPJAX_NATIVE_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return Isa::kPortable;
  return HasAvx512Bf16() ? Isa::kAvx512Bf16 : Isa::kPortable;
}

}  // namespace

Isa CurrentIsa() {
  static const Isa isa = Choose();
  return isa;
}

}  // namespace mpjax

// The name of the instruction set, for Python.
extern "C" __attribute__((visibility("default"))) const char* mpjax_native_isa() {
  return mpjax::CurrentIsa() == mpjax::Isa::kAvx512Bf16 ? "avx512_bf16" : "portable";
}

// The version of XLA's FFI that the library was built against: an older runtime refuses it.
extern "C" __attribute__((visibility("default"))) int mpjax_native_ffi_major() {
  return XLA_FFI_API_MAJOR;
}

extern "C" __attribute__((visibility("default"))) int mpjax_native_ffi_minor() {
  return XLA_FFI_API_MINOR;
}
