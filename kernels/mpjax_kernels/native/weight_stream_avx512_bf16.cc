// Few rows in bfloat16 by lines of int4, on AVX512-BF16: `vpermw` takes the lower five bits of each 16
// as a place in a table of 32 numbers, the sixteen of int4 twice, and `vdpbf16ps` adds up two terms.

#include "weight_streams.h"

#if defined(__AVX512BF16__)

#include "int4_table.h"
#include "weight_stream_avx512.h"

namespace mpjax {
namespace {

struct Int4Pairs {
  static constexpr int kRows = 2, kRegisters = 8, kTerms = 16, kTermsPerStep = 2;

  template <typename Tile, int Rows>
  static void Add(const Tile& tile, const uint32_t* left, int64_t left_stride,
                  __m512 (&total)[Rows][kRegisters]) {
    const __m512i table = Int4Table();
    for (int term = 0; term < tile.terms; term += 2) {
      const __m512i first = tile.Load(term);
      const __m512i second = term + 1 < tile.terms ? tile.Load(term + 1) : first;
      // Both terms of four neighbouring lanes in 32 bits: of the first and of the last 16 of each 32.
      const __m512i halves[2] = {_mm512_unpacklo_epi16(first, second),
                                 _mm512_unpackhi_epi16(first, second)};
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i) {
        const __m512i places = _mm512_srli_epi16(halves[i / 4], 4 * (i % 4));
        const __m512i weight = _mm512_permutexvar_epi16(places, table);
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          const uint32_t pair = left[row * left_stride + term / 2];
          const __m512i x = _mm512_set1_epi32(static_cast<int>(pair));
          total[row][i] = _mm512_dpbf16_ps(total[row][i], reinterpret_cast<__m512bh>(x),
                                           reinterpret_cast<__m512bh>(weight));
        }
      }
    }
  }
};

// Exchanges rows and columns of each 4 x 4 numbers of 32 bits.
inline void TransposeFours(__m512i (&of)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(of[0], of[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(of[0], of[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(of[2], of[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(of[2], of[3]);
  of[0] = _mm512_unpacklo_epi64(low01, low23);
  of[1] = _mm512_unpackhi_epi64(low01, low23);
  of[2] = _mm512_unpacklo_epi64(high01, high23);
  of[3] = _mm512_unpackhi_epi64(high01, high23);
}

}  // namespace

void StreamWeightPairs(const Weight& weight, const Run& run, const uint32_t* left,
                       int64_t left_stride, int64_t rows, int64_t stride, float* sums) {
  const uint8_t* data = weight.data + (run.term * weight.stride + run.lane) / 2;
  StreamLines<Int4Pairs>(data, weight.stride / 2, run.lanes / 2, run.terms, left, left_stride, rows,
                         stride, sums);
}

void FoldWeightPairs(const Weight&, const float* sums, const float* scales, int64_t lanes,
                     float* total) {
  for (int64_t lane = 0; lane < lanes; lane += kPlaces) {
    for (int half = 0; half < 2; ++half) {  // of each 32 lanes
      __m512i fours[4];
      for (int i = 0; i < 4; ++i) fours[i] = _mm512_loadu_si512(sums + lane + 16 * (4 * half + i));
      TransposeFours(fours);
      InOrder(fours);
      for (int i = 0; i < 4; ++i) {
        const int64_t at = lane + 32 * i + 16 * half;
        FoldLanes(_mm512_castsi512_ps(fours[i]), scales + at, lanes - at, total + at);
      }
    }
  }
}

}  // namespace mpjax

#endif
