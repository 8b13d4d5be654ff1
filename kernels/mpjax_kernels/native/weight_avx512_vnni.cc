// The product of an array by a weight in float32, on AVX-512.
//
// Few rows are multiplied by a weight whose lanes lie next to each other as it is decoded, in
// registers. int8 is widened (`vpmovsxbd`, `vcvtdq2ps`). int4 is looked up: `vpermps` takes the lower
// four bits of each 32 as a place in a table of 16 numbers, so a shift and a look-up decode every
// eighth of 128 lanes.

#include "weight.h"

#if defined(__AVX512VNNI__)

#include "weight_avx512.h"
#include "weight_streams.h"
#include "weight_terms_avx512.h"

namespace mpjax {
namespace {

// How many terms ahead the weight is fetched: the hardware stops at the end of a page, and the next
// term may be on another. Those of int8, of many a size, would push each other out of the first cache.
constexpr int kInt8Ahead = 24, kInt4Ahead = 8;

// `Rows` rows by `Vectors` times 16 lanes of int8.
template <int Rows, int Vectors, bool Zeros>
void MultiplyInt8(const uint8_t* data, int64_t stride, const Run& run, const float* left,
                  int64_t left_stride, float* sums) {
  __m512 total[Rows][Vectors] = {};
  for (int term = 0; term < run.terms; ++term) {
    const uint8_t* at = data + term * stride;
    const char* ahead = reinterpret_cast<const char*>(at + kInt8Ahead * stride);
    for (int line = 0; line < Vectors / 4; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
    __m512 x[Rows];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) x[row] = _mm512_set1_ps(left[row * left_stride + term]);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * v));
      __m512 weight = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
      if (Zeros) weight = _mm512_sub_ps(weight, _mm512_loadu_ps(run.zeros + 16 * v));
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        total[row][v] = _mm512_fmadd_ps(weight, x[row], total[row][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      _mm512_storeu_ps(sums + (v / 4 * Rows + row) * kWidth + v % 4 * 16, total[row][v]);
    }
  }
}

// One row by 256 lanes of int4, or two by 128: sixteen registers of sums, of every eighth lane.
template <int Rows, bool Zeros>
void MultiplyInt4(const uint8_t* data, int64_t stride, const Run& run, const float* left,
                  int64_t left_stride, float* sums) {
  constexpr int kChunks = 2 / Rows;  // of 128 lanes
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  alignas(64) float zeros[kChunks * 8][16];
  for (int lane = 0; Zeros && lane < kChunks * 128; ++lane) {
    zeros[lane / 128 * 8 + lane % 8][lane % 128 / 8] = run.zeros[lane];
  }
  __m512 total[16] = {};
  for (int term = 0; term < run.terms; ++term) {
    const uint8_t* at = data + term * stride;
    const char* ahead = reinterpret_cast<const char*>(at + kInt4Ahead * stride);
    __m512 x[Rows];
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) x[row] = _mm512_set1_ps(left[row * left_stride + term]);
#pragma GCC unroll 2
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      _mm_prefetch(ahead + 64 * chunk, _MM_HINT_T0);
      const __m512i bits = _mm512_loadu_si512(at + 64 * chunk);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __m512 weight = _mm512_permutexvar_ps(_mm512_srli_epi32(bits, 4 * i), table);
        if (Zeros) weight = _mm512_sub_ps(weight, _mm512_load_ps(zeros[8 * chunk + i]));
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          __m512& to = total[8 * (chunk + row) + i];
          to = _mm512_fmadd_ps(weight, x[row], to);
        }
      }
    }
  }
  StoreEighths<Rows>(total, sums);
}

int DirectLanes(const Weight& weight, int64_t rows, int64_t terms, bool) {
  if (weight.terms_last) {
    const bool in_bytes = !weight.is_int4 || terms % 2 == 0;
    return rows <= kDirectRows && terms >= 16 && in_bytes ? kWidth : 0;
  }
  if (weight.is_int4) return rows == 1 ? 256 : rows == 2 ? 128 : 0;
  return rows == 1 ? 256 : rows == 2 ? 128 : rows <= kDirectRows ? 64 : 0;
}

template <bool Zeros>
void MultiplyDirectly(const Weight& weight, const Run& run, const float* left, int64_t stride,
                      int64_t rows, float* sums) {
  if (weight.terms_last) {
    if (!weight.is_int4) return MultiplyTerms<Int8Terms, Zeros>(weight, run, left, stride, rows, sums);
    if (Zeros) return MultiplyTerms<Int4Terms, Zeros>(weight, run, left, stride, rows, sums);
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(left);
    return MultiplyInt4TermsFloats(weight, run, bits, stride, rows, sums);
  }
  const int64_t first = run.term * weight.stride + run.lane;
  if (weight.is_int4) {
    const auto multiply = rows == 1 ? MultiplyInt4<1, Zeros> : MultiplyInt4<2, Zeros>;
    return multiply(weight.data + first / 2, weight.stride / 2, run, left, stride, sums);
  }
  const auto multiply = rows == 1   ? MultiplyInt8<1, 16, Zeros>
                        : rows == 2 ? MultiplyInt8<2, 8, Zeros>
                        : rows == 3 ? MultiplyInt8<3, 4, Zeros>
                                    : MultiplyInt8<4, 4, Zeros>;
  multiply(weight.data + first, weight.stride, run, left, stride, sums);
}

void MultiplyDirect(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                    int64_t rows, float* sums) {
  const auto multiply = run.zeros == nullptr ? MultiplyDirectly<false> : MultiplyDirectly<true>;
  multiply(weight, run, reinterpret_cast<const float*>(left), stride, rows, sums);
}

}  // namespace

const WeightKernels kAvx512Weight = {1,           PackRun<WeightPacker<false>>, MultiplyWeight<AddFloats>,
                                     DirectLanes, MultiplyDirect, Scale,
                                     WriteFloats, StreamWeight,  FoldWeight};

}  // namespace mpjax

#endif
