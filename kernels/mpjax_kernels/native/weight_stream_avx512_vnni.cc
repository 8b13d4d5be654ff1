// Few rows in float32 by lines of a weight, on AVX-512: int8 is widened (`vpmovsxbd`, `vcvtdq2ps`);
// int4 is looked up, as `vpermps` takes the lower four bits of each 32 as a place in a table of 16.

#include "weight_streams.h"

#if defined(__AVX512VNNI__)

#include "weight_stream_avx512.h"

namespace mpjax {
namespace {

inline __m512 Broadcast(const uint32_t* bits) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*bits)));
}

struct Int8Floats {
  static constexpr int kRows = 4, kRegisters = 4, kTerms = 8, kTermsPerStep = 1;

  template <typename Tile, int Rows>
  static void Add(const Tile& tile, const uint32_t* left, int64_t left_stride,
                  __m512 (&total)[Rows][kRegisters]) {
    for (int term = 0; term < tile.terms; ++term) {
#pragma GCC unroll 4
      for (int i = 0; i < kRegisters; ++i) {
        const __m512 weight = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(tile.Load16(term, i)));
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
          const __m512 x = Broadcast(left + row * left_stride + term);
          total[row][i] = _mm512_fmadd_ps(weight, x, total[row][i]);
        }
      }
    }
  }
};

// The i-th of eight registers has every eighth lane from the i-th on.
struct Int4Floats {
  static constexpr int kRows = 2, kRegisters = 8, kTerms = 16, kTermsPerStep = 1;

  template <typename Tile, int Rows>
  static void Add(const Tile& tile, const uint32_t* left, int64_t left_stride,
                  __m512 (&total)[Rows][kRegisters]) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    for (int term = 0; term < tile.terms; ++term) {
      const __m512i bits = tile.Load(term);
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i) {
        const __m512 weight = _mm512_permutexvar_ps(_mm512_srli_epi32(bits, 4 * i), table);
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          const __m512 x = Broadcast(left + row * left_stride + term);
          total[row][i] = _mm512_fmadd_ps(weight, x, total[row][i]);
        }
      }
    }
  }
};

void FoldInt4(const float* sums, const float* scales, int64_t lanes, float* total) {
  for (int64_t lane = 0; lane < lanes; lane += 128) {
    __m512i eighths[16];
    for (int i = 0; i < 16; ++i) {
      eighths[i] = i < 8 ? _mm512_loadu_si512(sums + lane + 16 * i) : _mm512_setzero_si512();
    }
    Transpose(eighths);  // now the first eight numbers are neighbours
    for (int i = 0; i < 8; ++i) {
      const __m512i sixteen = _mm512_inserti64x4(
          eighths[2 * i], _mm512_castsi512_si256(eighths[2 * i + 1]), 1);
      const int64_t at = lane + 16 * i;
      FoldLanes(_mm512_castsi512_ps(sixteen), scales + at, lanes - at, total + at);
    }
  }
}

}  // namespace

void StreamWeight(const Weight& weight, const Run& run, const uint32_t* left, int64_t left_stride,
                  int64_t rows, int64_t stride, float* sums) {
  const int64_t first = run.term * weight.stride + run.lane;
  if (weight.is_int4) {
    return StreamLines<Int4Floats>(weight.data + first / 2, weight.stride / 2, run.lanes / 2,
                                   run.terms, left, left_stride, rows, stride, sums);
  }
  StreamLines<Int8Floats>(weight.data + first, weight.stride, run.lanes, run.terms, left,
                          left_stride, rows, stride, sums);
}

void FoldWeight(const Weight& weight, const float* sums, const float* scales, int64_t lanes,
                float* total) {
  const auto fold = weight.is_int4 ? FoldInt4 : FoldInOrder;
  fold(sums, scales, lanes, total);
}

}  // namespace mpjax

#endif
