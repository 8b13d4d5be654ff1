// The product of int8 matrices in plain C++, which is right on every machine.

#include "tile_portable.h"

namespace mpjax {
namespace {

void Pack(const Source& source, int lanes, int64_t terms, const Panels& to) {
  ForEachPacked(source, lanes, terms, to.is_left, [&](uint8_t bits, int panel, int width, int lane,
                                                      int64_t term) {
    uint16_t* step = to.data + panel * to.stride + (term / 4) * kLaneNumbers * width;
    reinterpret_cast<uint8_t*>(step)[4 * lane + term % 4] = bits;
  });
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
