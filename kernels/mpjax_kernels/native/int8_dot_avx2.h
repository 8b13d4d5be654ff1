// The product of int8 matrices in registers of 256 bits, by the instruction that `Dot` names. Compiled
// once for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_INT8_DOT_AVX2_H_
#define MPJAX_KERNELS_NATIVE_INT8_DOT_AVX2_H_

#include "tile_avx2.h"

namespace mpjax {
namespace {

// The sums of all 8 numbers of four registers.
inline __m128i AddUp(const __m256i (&of)[4]) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(of[0], of[1]),
                                        _mm256_hadd_epi32(of[2], of[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// `Rows` rows by four columns, or as many as there are, whose terms lie next to each other. If `Ahead`,
// the columns that follow are fetched meanwhile: the hardware stops at the end of a page.
template <typename Dot, int Rows, bool Ahead>
void MultiplyLanes(const Source& left, const Source& right, int64_t columns, int64_t terms,
                   const int32_t* excess, Sum* sums) {
  __m256i total[Rows][4];
#pragma GCC unroll 2
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) total[row][column] = Avx2::Zero();
  }
  const uint8_t* at[4];  // beyond the columns, those before
  for (int column = 0; column < 4; ++column) {
    at[column] = right.data + (column < columns ? column : columns - 1) * right.lane_stride;
  }
  const auto add = [&](int64_t term, auto load) {
    __m256i right_terms[4];
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      right_terms[column] = Dot::Right(load(at[column] + term));
    }
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) {
      const __m256i left_terms = Dot::Left(load(left.data + row * left.lane_stride + term));
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) {
        total[row][column] = Dot::To(total[row][column], right_terms[column], left_terms);
      }
    }
  };
  const int64_t whole = terms / Dot::kTerms * Dot::kTerms;
  for (int64_t term = 0; term < whole; term += Dot::kTerms) {
    for (int column = 0; Ahead && term % 64 == 0 && column < 4; ++column) {
      _mm_prefetch(reinterpret_cast<const char*>(at[column] + 4 * right.lane_stride + term),
                   _MM_HINT_T1);
    }
    add(term, [](const uint8_t* from) { return Dot::Load(from); });
  }
  if (whole < terms) {
    add(whole, [=](const uint8_t* from) { return Dot::First(LoadBytes(from, terms - whole)); });
  }
  for (int row = 0; row < Rows; ++row) {
    alignas(16) int32_t found[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(found),
                    _mm_sub_epi32(AddUp(total[row]), _mm_set1_epi32(excess[row])));
    for (int64_t column = 0; column < 4 && column < columns; ++column) {
      sums[row * kWidth + column].integer = found[column];
    }
  }
}

template <typename Dot>
void MultiplyUnpacked(const Source& left, int64_t rows, Source right, int64_t columns,
                      int64_t terms, Sum* sums) {
  int32_t excess[kFewRows];
  for (int64_t row = 0; row < rows; ++row) {
    excess[row] = Dot::ExcessOf(left.data + row * left.lane_stride, terms);
  }
  for (int64_t column = 0; column < columns; column += 4) {
    Source of_rows = left;
    for (int64_t row = 0; row < rows; row += 2) {
      const auto multiply = rows - row == 1 ? MultiplyLanes<Dot, 1, true>
                            : row == 0      ? MultiplyLanes<Dot, 2, true>
                                            : MultiplyLanes<Dot, 2, false>;
      multiply(of_rows, right, columns - column, terms, excess + row,
               sums + row * kWidth + column);
      of_rows.data += 2 * left.lane_stride;
    }
    right.data += 4 * right.lane_stride;
  }
}

inline void WriteIntegers(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target, [&](int64_t row, const Sum* at) {
    const int32_t excess = target.excess == nullptr ? 0 : target.excess[row];
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(Avx2::Load(at), _mm256_set1_epi32(excess)));
  });
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_INT8_DOT_AVX2_H_
