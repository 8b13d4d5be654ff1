// The product of int8 matrices on AVX-VNNI: `vpdpbusd` with a VEX prefix, on CPUs without AVX-512.

#include "dot.h"

#if defined(__AVXVNNI__)

#include "int8_dot_vnni256.h"

namespace mpjax {
namespace {

struct Vex {
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return _mm256_dpbusd_avx_epi32(total, columns, row);
  }
};

}  // namespace

const DotKernels kAvxVnniInt8Dot = KernelsBy<Vex>();

}  // namespace mpjax

#endif
