// Which instruction set the kernels use: asked of the CPU once.

#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include "xla/ffi/api/c_api.h"

namespace mpjax {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx_vnni", "avx512_vnni", "avx512_bf16"};
constexpr int kCount = 5;

bool HasAvx512Vnni() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

#if defined(__x86_64__) || defined(__i386__)
// A bit of what `cpuid` says; not all compilers have names for these.
bool HasF16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

[[maybe_unused]] bool HasVexVnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

bool Has(Isa isa) {
#if defined(MPJAX_HAS_AVX2)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
#else
  const bool has_avx2 = false;
#endif
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return has_avx2;
    case Isa::kAvxVnni:
      return has_avx2 && (HasAvxVnni() || HasAvx512Vnni());
    case Isa::kAvx512Vnni:
      return has_avx2 && HasAvx512Vnni();
    default:
#if defined(MPJAX_HAS_AVX512_BF16)
      return has_avx2 && HasAvx512Vnni() && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
}

Isa Choose() {
  const char* wanted = std::getenv("MPJAX_NATIVE_ISA");
  for (int isa = 0; wanted != nullptr && isa < kCount; ++isa) {
    const bool is_wanted = std::strcmp(wanted, kNames[isa]) == 0;
    if (is_wanted && Has(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
  }
  int best = kCount - 1;
  while (!Has(static_cast<Isa>(best))) --best;
  return static_cast<Isa>(best);
}

}  // namespace

bool HasAvxVnni() {
#if defined(MPJAX_HAS_AVX_VNNI)
  return HasVexVnni();
#else
  return false;
#endif
}

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
