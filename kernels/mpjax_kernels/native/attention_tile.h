// Rows by a panel of columns, their sums in registers: what attention of many queries multiplies by.
//
// `Lanes` says what a register holds: `Vector`, `kCount` numbers of it, `kRows` rows that have registers, and
// Load, Store, Broadcast, Fma; Even takes the lanes without a bit of two registers, and Odd those with it.
// Each sum takes its terms in order, so all instruction sets give the same bits.

#ifndef MPJAX_KERNELS_NATIVE_ATTENTION_TILE_H_
#define MPJAX_KERNELS_NATIVE_ATTENTION_TILE_H_

#include "attention.h"

namespace mpjax {
namespace {

// `Rows` rows by two registers of columns.
template <typename Lanes, int Rows>
inline void Tile(const float* left, int64_t left_stride, const float* panel, int64_t terms, bool more,
                 float* sums, int64_t sums_stride) {
  using Vector = typename Lanes::Vector;
  Vector total[Rows][2];
#pragma GCC unroll 12
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < 2; ++v) {
      total[row][v] = more ? Lanes::Load(sums + row * sums_stride + v * Lanes::kCount)
                           : Lanes::Broadcast(0.0f);
    }
  }
  for (int64_t term = 0; term < terms; ++term, panel += kPanel) {
    const Vector first = Lanes::Load(panel), second = Lanes::Load(panel + Lanes::kCount);
#pragma GCC unroll 12
    for (int row = 0; row < Rows; ++row) {
      const Vector x = Lanes::Broadcast(left[row * left_stride + term]);
      total[row][0] = Lanes::Fma(x, first, total[row][0]);
      total[row][1] = Lanes::Fma(x, second, total[row][1]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < 2; ++v) {
      Lanes::Store(sums + row * sums_stride + v * Lanes::kCount, total[row][v]);
    }
  }
}

template <typename Lanes, int Rows>
inline int64_t Tiles(int64_t row, const float* left, int64_t left_stride, int64_t rows, const float* panel,
                     int64_t terms, bool more, float* sums, int64_t sums_stride) {
  for (; row + Rows <= rows; row += Rows) {
    for (int c = 0; c < kPanel; c += 2 * Lanes::kCount) {
      Tile<Lanes, Rows>(left + row * left_stride, left_stride, panel + c, terms, more,
                        sums + row * sums_stride + c, sums_stride);
    }
  }
  return row;
}

template <typename Lanes>
void Multiply(const float* left, int64_t left_stride, int64_t rows, const float* panel, int64_t terms,
              bool more, float* sums, int64_t sums_stride) {
  const auto all = [&](auto tiles, int64_t row) {
    return tiles(row, left, left_stride, rows, panel, terms, more, sums, sums_stride);
  };
  int64_t row = all(Tiles<Lanes, Lanes::kRows>, 0);
  row = all(Tiles<Lanes, 4>, row);
  all(Tiles<Lanes, 1>, row);
}

// A square of as many registers as each has numbers, whose bits of row and lane change places one by one.
template <typename Lanes>
inline void TransposeSquare(typename Lanes::Vector (&rows)[Lanes::kCount]) {
#pragma GCC unroll 4
  for (int bit = 1; bit < Lanes::kCount; bit *= 2) {
#pragma GCC unroll 16
    for (int row = 0; row < Lanes::kCount; ++row) {
      if (row & bit) continue;
      const auto lower = rows[row], upper = rows[row | bit];
      rows[row] = Lanes::Even(lower, upper, bit);
      rows[row | bit] = Lanes::Odd(lower, upper, bit);
    }
  }
}

template <typename Lanes>
void Transpose(const float* const* columns, int64_t count, float* panel) {
  constexpr int kSize = Lanes::kCount;
  int64_t i = 0;
  for (; i + kSize <= count; i += kSize) {
    for (int c = 0; c < kPanel; c += kSize) {
      typename Lanes::Vector rows[kSize];
#pragma GCC unroll 16
      for (int row = 0; row < kSize; ++row) rows[row] = Lanes::Load(columns[c + row] + i);
      if constexpr (kSize > 1) TransposeSquare<Lanes>(rows);
#pragma GCC unroll 16
      for (int row = 0; row < kSize; ++row) Lanes::Store(panel + (i + row) * kPanel + c, rows[row]);
    }
  }
  for (; i < count; ++i) {
    for (int c = 0; c < kPanel; ++c) panel[i * kPanel + c] = columns[c][i];
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ATTENTION_TILE_H_
