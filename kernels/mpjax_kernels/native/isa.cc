// Which instruction set the kernels use: asked of the CPU once.

#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "xla/ffi/api/c_api.h"

namespace mpjax {
namespace {

constexpr const char* kNames[] = {"portable", "avx512_vnni", "avx512_bf16"};

bool HasAvx512Vnni() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool HasAvx512Bf16() {
#if defined(MPJAX_HAS_AVX512_BF16)
  return HasAvx512Vnni() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa Choose() {
  const Isa best = HasAvx512Bf16()   ? Isa::kAvx512Bf16
                   : HasAvx512Vnni() ? Isa::kAvx512Vnni
                                     : Isa::kPortable;
  const char* wanted = std::getenv("MPJAX_NATIVE_ISA");
  for (int isa = 0; wanted != nullptr && isa < static_cast<int>(best); ++isa) {
    if (std::strcmp(wanted, kNames[isa]) == 0) return static_cast<Isa>(isa);
  }
  return best;
}

}  // namespace

Isa CurrentIsa() {
  static const Isa isa = Choose();
  return isa;
}

}  // namespace mpjax

// The name of the instruction set, for Python.
extern "C" __attribute__((visibility("default"))) const char* mpjax_native_isa() {
  return mpjax::kNames[static_cast<int>(mpjax::CurrentIsa())];
}

// The version of XLA's FFI that the library was built against: an older runtime refuses it.
extern "C" __attribute__((visibility("default"))) int mpjax_native_ffi_major() {
  return XLA_FFI_API_MAJOR;
}

extern "C" __attribute__((visibility("default"))) int mpjax_native_ffi_minor() {
  return XLA_FFI_API_MINOR;
}
