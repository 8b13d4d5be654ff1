// A few rows by int4 whose terms lie next to each other, on AVX-512: 64 bytes of four lanes at a time.
// Compiled once for each instruction set, so all is in an unnamed namespace.
//
// A shift brings every eighth of 128 terms to where a look-up takes it, so it is the rows that are laid
// out in that order: once for all the lanes of a run.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_INT4_TERMS_AVX512_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_INT4_TERMS_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "tile_avx512.h"
#include "weight.h"
#include "weight_terms_avx512.h"

namespace mpjax {
namespace {

constexpr int kBlockTerms = 128;   // in 64 bytes
constexpr int kRunBlocks = 16;     // of which rows are laid out at a time
constexpr int64_t kLinesAhead = 4096;  // bytes ahead, at least, that are fetched

// `Rows` rows, `kVectors` registers of a block each, by four lanes of `bytes` bytes: AddUp of
// `Kernel::Add(weight bytes, registers of a row, total)`.
template <typename Kernel, int Rows>
void MultiplyLaidOut(const uint8_t* const (&lanes)[4], int64_t ahead, int64_t bytes,
                     const __m512i (*rows)[kRunBlocks * Kernel::kVectors], bool add, float* sums) {
  __m512 total[Rows][4] = {};
  for (int64_t byte = 0, block = 0; byte < bytes; byte += 64, ++block) {
    const __mmask64 mask = MaskOf(bytes - byte);
    __m512i weight[4];
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane) {
      _mm_prefetch(reinterpret_cast<const char*>(lanes[lane] + ahead + byte), _MM_HINT_T1);
      weight[lane] = _mm512_maskz_loadu_epi8(mask, lanes[lane] + byte);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Kernel::kVectors; ++i) {
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) {
        const __m512i numbers = Kernel::Decode(weight[lane], i);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
          const __m512i x = rows[row][block * Kernel::kVectors + i];
          total[row][lane] = Kernel::Add(total[row][lane], numbers, x);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
    float* to = sums + row * kWidth;
    const __m128 found = AddUp(total[row]);
    _mm_storeu_ps(to, add ? _mm_add_ps(_mm_loadu_ps(to), found) : found);
  }
}

// A run of kWidth lanes.
template <typename Kernel, int Rows>
void MultiplyInt4Lanes(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                       float* sums) {
  constexpr int kTerms = kRunBlocks * kBlockTerms;
  __m512i rows[Rows][kRunBlocks * Kernel::kVectors];
  const int64_t four = 4 * weight.stride / 2, ahead = (kLinesAhead / (four + 1) + 1) * four;
  for (int term = 0; term < run.terms; term += kTerms) {
    const int here = run.terms - term < kTerms ? run.terms - term : kTerms;
    for (int row = 0; row < Rows; ++row) {
      for (int block = 0; block * kBlockTerms < here; ++block) {
        const int first = term + block * kBlockTerms;
        Kernel::LayOut(left + row * stride + first / Kernel::kTermsPerStep, run.terms - first,
                       rows[row] + block * Kernel::kVectors);
      }
    }
    for (int lane = 0; lane < kWidth; lane += 4) {
      const uint8_t* lanes[4];
      for (int i = 0; i < 4; ++i) {
        lanes[i] = weight.data + ((run.lane + lane + i) * weight.stride + run.term + term) / 2;
      }
      MultiplyLaidOut<Kernel, Rows>(lanes, ahead, (here + 1) / 2, rows, term > 0, sums + lane);
    }
  }
}

template <typename Kernel>
void MultiplyInt4Terms(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                       int64_t rows, float* sums) {
  static_assert(kDirectRows == 4, "one case per number of rows");
  const auto multiply = rows == 1   ? MultiplyInt4Lanes<Kernel, 1>
                        : rows == 2 ? MultiplyInt4Lanes<Kernel, 2>
                        : rows == 3 ? MultiplyInt4Lanes<Kernel, 3>
                                    : MultiplyInt4Lanes<Kernel, 4>;
  multiply(weight, run, left, stride, sums);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_INT4_TERMS_AVX512_H_
