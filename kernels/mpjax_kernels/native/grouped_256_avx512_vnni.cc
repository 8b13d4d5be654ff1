// The same as AVX-VNNI's, `vpdpbusd` on 256 bits, but with an EVEX prefix: for CPUs that have AVX512-VNNI
// and no AVX-VNNI, where somebody asks for that.

#include "grouped.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

#include "grouped_vnni256.h"

namespace mpjax {
namespace {

struct Evex {
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return _mm256_dpbusd_epi32(total, columns, row);
  }
};

}  // namespace

const GroupedKernels kAvx512Grouped256 = GroupedVnni<Evex>(kAvx512Int8Dot256);

}  // namespace mpjax

#endif
