// A few rows in float32 by int4 whose terms lie next to each other: `vpermps` takes the lower four bits
// of each 32 as a place in a table of 16 numbers.

#include "weight_streams.h"

#if defined(__AVX512VNNI__)

#include "weight_int4_terms_avx512.h"

namespace mpjax {
namespace {

struct Floats {
  static constexpr int kVectors = 8, kTermsPerStep = 1;

  // The i-th register: every eighth term from the i-th on.
  static void LayOut(const uint32_t* left, int64_t terms, __m512i* to) {
    __m512i parts[16];
    for (int i = 0; i < 16; ++i) {  // eight neighbours in the lower halves
      const __mmask16 mask = static_cast<__mmask16>(terms > 8 * i ? MaskOf(terms - 8 * i) & 0xFF : 0);
      parts[i] = _mm512_maskz_loadu_epi32(mask, left + 8 * i);
    }
    Transpose(parts);
    for (int i = 0; i < kVectors; ++i) to[i] = parts[i];
  }

  static __m512i Decode(__m512i bits, int i) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512i places = _mm512_srli_epi32(bits, static_cast<unsigned>(4 * i));
    return _mm512_castps_si512(_mm512_permutexvar_ps(places, table));
  }

  static __m512 Add(__m512 total, __m512i numbers, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(numbers), _mm512_castsi512_ps(x), total);
  }
};

}  // namespace

void MultiplyInt4TermsFloats(const Weight& weight, const Run& run, const uint32_t* left,
                             int64_t stride, int64_t rows, float* sums) {
  MultiplyInt4Terms<Floats>(weight, run, left, stride, rows, sums);
}

}  // namespace mpjax

#endif
