// The product of a bfloat16 array by a weight on AVX512-BF16: `vdpbf16ps` multiplies pairs of
// bfloat16, which hold the integers of the weight exactly, and adds them up in float32.

#include "weight.h"

#if defined(__AVX512BF16__)

#include "weight_avx512.h"

namespace mpjax {
namespace {

struct AddPairs {
  static __m512i To(__m512i total, __m512i columns, __m512i row) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(total),
                                                reinterpret_cast<__m512bh>(row),
                                                reinterpret_cast<__m512bh>(columns)));
  }
};

int NoDirectLanes(const Weight&, int64_t, int64_t) { return 0; }

}  // namespace

const WeightKernels kAvx512WeightPairs = {2,       PackRun<true>, MultiplyWeight<AddPairs>,
                                          NoDirectLanes, nullptr, Scale, WriteFloats};

}  // namespace mpjax

#endif
