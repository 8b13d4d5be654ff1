// The product in groups on AVX-VNNI: `vpdpbusd` with a VEX prefix, on CPUs without AVX-512.

#include "grouped.h"

#if defined(__AVXVNNI__)

#include "grouped_vnni256.h"

namespace mpjax {
namespace {

struct Vex {
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return _mm256_dpbusd_avx_epi32(total, columns, row);
  }
};

}  // namespace

const GroupedKernels kAvxVnniGrouped = GroupedVnni<Vex>(kAvxVnniInt8Dot);

}  // namespace mpjax

#endif
