// A few rows by a weight whose terms lie next to each other, on AVX-512: 16 terms of four lanes at a
// time, decoded in registers to float32. Compiled once for each instruction set, so all is in an
// unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_TERMS_AVX512_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_TERMS_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "tile_avx512.h"
#include "weight.h"

namespace mpjax {
namespace {

struct Int8Terms {
  static const uint8_t* At(const uint8_t* data, int64_t entry) { return data + entry; }
  static __m512 Load(const uint8_t* at, int64_t term, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at + term)));
  }
};

// Two to a byte, and the first term is the first of a byte. `vpermps` takes the lower four bits of
// each 32 as a place in a table of 16 numbers.
struct Int4Terms {
  static const uint8_t* At(const uint8_t* data, int64_t entry) { return data + entry / 2; }
  static __m512 Load(const uint8_t* at, int64_t term, __mmask16 mask) {
    const int64_t bytes = (_mm_popcnt_u32(mask) + 1) / 2;
    const __mmask16 half = static_cast<__mmask16>((1u << bytes) - 1);
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(half, at + term / 2));
    const __m128i both = _mm_or_si128(pairs, _mm_slli_epi16(pairs, 4));
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), table);
  }
};

// The sums of all 16 numbers of four registers.
inline __m128 AddUp(const __m512 (&of)[4]) {
  const __m512 first =
      _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
  const __m512 second =
      _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(first), _mm512_castps_pd(second));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(first), _mm512_castps_pd(second));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <typename Terms, int Rows, bool Zeros>
void MultiplyFourLanes(const uint8_t* const (&lanes)[4], int64_t ahead, const float* zeros,
                       int terms, const float* left, int64_t left_stride, float* sums) {
  __m512 total[Rows][4] = {};
  const auto add = [&](int64_t term, __mmask16 mask) {
    __m512 x[Rows];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      x[row] = _mm512_maskz_loadu_ps(mask, left + row * left_stride + term);
    }
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane) {
      __m512 weight = Terms::Load(lanes[lane], term, mask);
      if (Zeros) weight = _mm512_sub_ps(weight, _mm512_set1_ps(zeros[lane]));
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        total[row][lane] = _mm512_fmadd_ps(weight, x[row], total[row][lane]);
      }
    }
  };
  const int64_t whole = terms / 16 * 16;
  for (int64_t term = 0; term < whole; term += 16) {
    if (term % 64 == 0) {  // the hardware stops at the end of a page
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) {
        const uint8_t* next = Terms::At(lanes[lane], term) + ahead;
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      }
    }
    add(term, 0xFFFF);
  }
  if (whole < terms) add(whole, static_cast<__mmask16>(MaskOf(terms - whole)));
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) _mm_storeu_ps(sums + row * kWidth, AddUp(total[row]));
}

template <typename Terms, int Rows, bool Zeros>
void MultiplyTermsOf(const Weight& weight, const Run& run, const float* left, int64_t stride,
                     float* sums) {
  const int64_t ahead = Terms::At(weight.data, 4 * weight.stride) - weight.data;
  for (int lane = 0; lane < kWidth; lane += 4) {
    const uint8_t* lanes[4];
    for (int i = 0; i < 4; ++i) {
      lanes[i] = Terms::At(weight.data, (run.lane + lane + i) * weight.stride + run.term);
    }
    const float* zeros = Zeros ? run.zeros + lane : nullptr;
    MultiplyFourLanes<Terms, Rows, Zeros>(lanes, ahead, zeros, run.terms, left, stride, sums + lane);
  }
}

template <typename Terms, bool Zeros>
void MultiplyTerms(const Weight& weight, const Run& run, const float* left, int64_t stride,
                   int64_t rows, float* sums) {
  static_assert(kDirectRows == 4, "one case per number of rows");
  const auto multiply = rows == 1   ? MultiplyTermsOf<Terms, 1, Zeros>
                        : rows == 2 ? MultiplyTermsOf<Terms, 2, Zeros>
                        : rows == 3 ? MultiplyTermsOf<Terms, 3, Zeros>
                                    : MultiplyTermsOf<Terms, 4, Zeros>;
  multiply(weight, run, left, stride, sums);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_TERMS_AVX512_H_
