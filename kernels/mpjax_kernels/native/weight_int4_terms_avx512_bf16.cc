// A few rows in bfloat16 by int4 whose terms lie next to each other: `vpermw` takes the lower five bits
// of each 16 as a place in a table, and `vdpbf16ps` adds up the two terms in each 32.

#include "weight_streams.h"

#if defined(__AVX512BF16__)

#include "int4_table.h"
#include "weight_int4_terms_avx512.h"

namespace mpjax {
namespace {

struct Pairs {
  static constexpr int kVectors = 4, kTermsPerStep = 2;

  // The i-th register: of each eight terms the i-th and the fourth after it.
  static void LayOut(const uint32_t* left, int64_t terms, __m512i* to) {
    __m512i parts[4];
    for (int i = 0; i < 4; ++i) {  // of 32 terms
      const int64_t count = (terms + 1) / 2 - 16 * i;
      const __mmask16 mask = static_cast<__mmask16>(MaskOf(count < 0 ? 0 : count));
      parts[i] = _mm512_maskz_loadu_epi32(mask, left + 16 * i);
    }
    alignas(64) uint16_t order[32];
    for (int place = 0; place < 32; ++place) {
      order[place] = static_cast<uint16_t>((8 * (place / 2) + 4 * (place % 2)) % 64);
    }
    const __m512i first = _mm512_load_si512(order);
    for (int i = 0; i < kVectors; ++i) {
      const __m512i places = _mm512_add_epi16(first, _mm512_set1_epi16(static_cast<int16_t>(i)));
      const __m512i low = _mm512_permutex2var_epi16(parts[0], places, parts[1]);
      const __m512i high = _mm512_permutex2var_epi16(parts[2], places, parts[3]);
      to[i] = _mm512_mask_blend_epi16(0xFFFF0000, low, high);
    }
  }

  static __m512i Decode(__m512i bits, int i) {
    const __m512i places = _mm512_srli_epi16(bits, static_cast<unsigned>(4 * i));
    return _mm512_permutexvar_epi16(places, Int4Table());
  }

  static __m512 Add(__m512 total, __m512i numbers, __m512i x) {
    return _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(x),
                            reinterpret_cast<__m512bh>(numbers));
  }
};

}  // namespace

void MultiplyInt4TermsPairs(const Weight& weight, const Run& run, const uint32_t* left,
                            int64_t stride, int64_t rows, float* sums) {
  MultiplyInt4Terms<Pairs>(weight, run, left, stride, rows, sums);
}

}  // namespace mpjax

#endif
