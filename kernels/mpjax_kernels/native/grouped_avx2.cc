// The product in groups on AVX2. `vpmaddubsw` multiplies the unsigned numbers of int4 by int8 and adds
// two products in 16 bits, where sums of eight do not saturate; `vpmaddwd` adds pairs of those in 32.
// int8 is widened, as in `int8_dot_avx2.cc`.

#include "grouped.h"

#if defined(__AVX2__)

#include "grouped_256.h"

namespace mpjax {
namespace {

struct Int4 : Nibbles {
  static __m256i Add(__m256i total, __m256i weight, __m256i row) {
    const __m256i pairs = _mm256_maddubs_epi16(weight, row);
    return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static __m256i To(__m256i total, const __m256i (&weight)[2], const uint8_t* row) {
    const __m256i even = _mm256_maddubs_epi16(weight[0], Avx2::Load(row));
    const __m256i odd = _mm256_maddubs_epi16(weight[1], Avx2::Load(row + 32));
    const __m256i both = _mm256_add_epi16(even, odd);
    return _mm256_add_epi32(total, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
  }
};

struct Int8 {
  static constexpr int kTerms = 32, kTermsPerByte = 1, kBias = 0;
  static constexpr int kMostParts = 1;  // each half is in both of 128 bits
  static void Decode(__m256i bytes, __m256i (&to)[2]) {
    to[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes));
    to[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1));
  }
  static __m256i To(__m256i total, const __m256i (&weight)[2], const uint8_t* row) {
    __m256i terms[2];
    Decode(Avx2::Load(row), terms);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(weight[0], terms[0]));
    return _mm256_add_epi32(total, _mm256_madd_epi16(weight[1], terms[1]));
  }
};

}  // namespace

const GroupedKernels kAvx2Grouped = GroupedKernelsBy<Int8, Int4>(kAvx2Int8Dot);

}  // namespace mpjax

#endif
