// Panels of packed numbers multiplied in registers of any size: `V` loads, stores and broadcasts
// numbers of 32 bits, `Add` adds to some of them the products of a step, of as many columns and of
// one row, that is broadcast. Compiled once for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_TILE_MULTIPLY_H_
#define MPJAX_KERNELS_NATIVE_TILE_MULTIPLY_H_

#include <cstdint>

#include "dot.h"

namespace mpjax {
namespace {

// Where the steps of rows are: in a panel, or in rows so many steps apart.
struct LeftPanel {
  const uint16_t* data;
  int At(int64_t row, int64_t step) const {
    return reinterpret_cast<const int*>(data)[step * kRows + row];
  }
};

struct LeftRows {
  const uint32_t* data;
  int64_t stride;
  int At(int64_t row, int64_t step) const { return static_cast<int>(data[row * stride + step]); }
};

// `Rows` rows by `Panels` panels of 16 columns, in registers.
template <typename V, typename Add, int Rows, int Panels, typename Left>
void MultiplyPanels(Left left, const uint16_t* right, int64_t panel_stride, int64_t steps, bool add,
                    Sum* sums) {
  constexpr int kEach = kColumns / V::kNumbers, kVectors = Panels * kEach;
  typename V::Type total[Rows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Sum* at = sums + row * kWidth + v * V::kNumbers;
      total[row][v] = add ? V::Load(at) : V::Zero();
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    typename V::Type columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const uint16_t* panel = right + v / kEach * panel_stride + step * kLaneNumbers * kColumns;
      columns[v] = V::LoadColumns(panel + v % kEach * V::kNumbers * kLaneNumbers);
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const typename V::Type terms = V::Broadcast(left.At(row, step));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        total[row][v] = Add::To(total[row][v], columns[v], terms);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V::Store(sums + row * kWidth + v * V::kNumbers, total[row][v]);
    }
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_TILE_MULTIPLY_H_
