// The same as AVX-VNNI's, `vpdpbusd` on 256 bits, but with an EVEX prefix: for CPUs that have AVX512-VNNI
// and no AVX-VNNI, where somebody asks for that.

#include "dot.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

#include "int8_dot_vnni256.h"

namespace mpjax {
namespace {

struct Evex {
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return _mm256_dpbusd_epi32(total, columns, row);
  }
};

}  // namespace

const DotKernels kAvx512Int8Dot256 = KernelsBy<Evex>();

}  // namespace mpjax

#endif
