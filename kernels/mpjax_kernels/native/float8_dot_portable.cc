// The product of float8 matrices in plain C++, which is right on every machine.

#include "tile_portable.h"

namespace mpjax {
namespace {

void Pack(const Source& source, int lanes, int64_t terms, const Panels& to) {
  const DecodeTable& table = *source.table;
  ForEachPacked(source, lanes, terms, to.is_left, [&](uint8_t bits, int panel, int width, int lane,
                                                      int64_t term) {
    to.data[panel * to.stride + (term / 2) * 2 * width + 2 * lane + term % 2] = Decoded(bits, table);
  });
}

void Multiply(const uint16_t* left, int rows, const uint16_t* right, int64_t panel_stride,
              int panels, int64_t pairs, bool add, Sum* sums) {
  for (int row = 0; row < rows; ++row) {
    for (int panel = 0; panel < panels; ++panel) {
      float total[kColumns];
      Sum* to = sums + row * kWidth + panel * kColumns;
      for (int column = 0; column < kColumns; ++column) total[column] = add ? to[column].real : 0;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t* a = left + 2 * (pair * kRows + row);
        const uint16_t* b = right + panel * panel_stride + 2 * pair * kColumns;
        const float first = ToFloat(a[0]), second = ToFloat(a[1]);
        for (int column = 0; column < kColumns; ++column) {
          total[column] += first * ToFloat(b[2 * column]);
          total[column] += second * ToFloat(b[2 * column + 1]);
        }
      }
      for (int column = 0; column < kColumns; ++column) to[column].real = total[column];
    }
  }
}

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target, [](const Sum& sum) { return sum.real; });
}

}  // namespace

const DotKernels kPortableFloat8Dot = {2, Pack, Multiply, nullptr, Write};

}  // namespace mpjax
