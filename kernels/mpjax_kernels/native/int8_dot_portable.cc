// The product of int8 matrices in plain C++, which is right on every machine.

#include <cstring>

#include "tile_portable.h"

namespace mpjax {
namespace {

void Pack(const Source& source, int lanes, int64_t terms, uint16_t* first, uint16_t* second,
          int32_t*) {
  const int64_t padded = (terms + kTermsPerPack - 1) / kTermsPerPack * kTermsPerPack;
  const int width = second == nullptr ? kColumns : kRows;
  for (int64_t term = 0; term < padded; ++term) {
    for (int lane = 0; lane < kColumns; ++lane) {
      const bool exists = term < terms && lane < lanes;
      const int64_t from = lane * source.lane_stride + term * source.term_stride;
      uint16_t* panel = lane < width ? first : second;
      uint8_t* step = reinterpret_cast<uint8_t*>(panel + (term / 4) * kLaneNumbers * width);
      step[4 * (lane % width) + term % 4] = exists ? source.data[from] : 0;
    }
  }
}

void Multiply(const uint16_t* left, int rows, const uint16_t* right, int64_t panel_stride,
              int panels, int64_t steps, bool add, Sum* sums) {
  for (int row = 0; row < rows; ++row) {
    for (int panel = 0; panel < panels; ++panel) {
      int32_t total[kColumns];
      Sum* to = sums + row * kWidth + panel * kColumns;
      for (int column = 0; column < kColumns; ++column) total[column] = add ? to[column].integer : 0;
      for (int64_t step = 0; step < steps; ++step) {
        const int8_t* a = reinterpret_cast<const int8_t*>(left + step * kLaneNumbers * kRows);
        const int8_t* b = reinterpret_cast<const int8_t*>(right + panel * panel_stride +
                                                          step * kLaneNumbers * kColumns);
        for (int column = 0; column < kColumns; ++column) {
          for (int term = 0; term < 4; ++term) {
            total[column] += a[4 * row + term] * b[4 * column + term];
          }
        }
      }
      for (int column = 0; column < kColumns; ++column) to[column].integer = total[column];
    }
  }
}

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  const auto load = [](const Sum& sum) { return static_cast<float>(sum.integer); };
  WriteTile(sums, rows, columns, target, load);
}

}  // namespace

const DotKernels kPortableInt8Dot = {4, Pack, Multiply, nullptr, Write};

}  // namespace mpjax
