// Decoding float8 on AVX512-VBMI: `vpermi2b` looks up 64 numbers at once in a table of 128 bytes, which
// are all the magnitudes that there are. Compiled once for each instruction set, so all is in an
// unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_FLOAT8_TABLES_H_
#define MPJAX_KERNELS_NATIVE_FLOAT8_TABLES_H_

#include <immintrin.h>

#include "dot.h"

namespace mpjax {
namespace {

// The upper and the lower bytes of 64 numbers in bfloat16.
class Float8Tables {
 public:
  explicit Float8Tables(const DecodeTable& table) {
    for (int half = 0; half < 2; ++half) {
      high_[half] = _mm512_loadu_si512(table.high + 64 * half);
      low_[half] = _mm512_loadu_si512(table.low + 64 * half);
    }
  }

  void Decode(__m512i bytes, __m512i& low, __m512i& high) const {
    const __m512i magnitude = _mm512_permutex2var_epi8(high_[0], bytes, high_[1]);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    high = _mm512_ternarylogic_epi32(magnitude, bytes, sign, 0xF8);  // magnitude | (bytes & sign)
    low = _mm512_permutex2var_epi8(low_[0], bytes, low_[1]);
  }

 private:
  __m512i high_[2], low_[2];
};

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_FLOAT8_TABLES_H_
