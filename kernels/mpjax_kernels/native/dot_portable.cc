// The product of float8 matrices in plain C++, which is right on every machine.

#include <cstring>

#include "dot.h"

namespace mpjax {
namespace {

float FromBfloat16(uint16_t number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void Pack(const DecodeTable& table, const Source& source, int lanes, int64_t terms, uint16_t* first,
          uint16_t* second) {
  const int64_t padded = (terms + kTermsPerStep - 1) / kTermsPerStep * kTermsPerStep;
  for (int64_t term = 0; term < padded; ++term) {
    for (int lane = 0; lane < kColumns; ++lane) {
      uint16_t number = 0;
      if (term < terms && lane < lanes) {
        const uint8_t bits =
            source.data[lane * source.lane_stride + term * source.term_stride];
        const int high = table.high[bits & 0x7F] | (bits & 0x80);
        number = static_cast<uint16_t>((high << 8) | table.low[bits & 0x7F]);
      }
      const int width = second == nullptr ? kColumns : kRows;
      uint16_t* panel = lane < width ? first : second;
      panel[(term / 2) * 2 * width + 2 * (lane % width) + term % 2] = number;
    }
  }
}

void Multiply(const uint16_t* left, const uint16_t* right, int64_t panel_stride, int panels,
              int64_t pairs, bool add, float* sums) {
  for (int row = 0; row < kRows; ++row) {
    for (int panel = 0; panel < panels; ++panel) {
      float* total = sums + row * kWidth + panel * kColumns;
      for (int column = 0; column < kColumns; ++column) total[column] = add ? total[column] : 0.0f;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t* a = left + 2 * (pair * kRows + row);
        const uint16_t* b = right + panel * panel_stride + 2 * pair * kColumns;
        const float first = FromBfloat16(a[0]), second = FromBfloat16(a[1]);
        for (int column = 0; column < kColumns; ++column) {
          total[column] += first * FromBfloat16(b[2 * column]);
          total[column] += second * FromBfloat16(b[2 * column + 1]);
        }
      }
    }
  }
}

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void Write(const float* sums, int64_t rows, int64_t columns, const Target& target) {
  for (int64_t i = 0; i < rows; ++i) {
    const float row_scale = target.row_scales[i * target.row_scale_stride];
    for (int64_t j = 0; j < columns; ++j) {
      const float sum = sums[i * kWidth + j], column_scale = target.column_scales[j];
      const float scaled =
          target.columns_first ? sum * column_scale * row_scale : sum * row_scale * column_scale;
      const int64_t at = i * target.row_stride + j;
      if (target.is_bfloat16) {
        static_cast<uint16_t*>(target.out)[at] = ToBfloat16(scaled);
      } else {
        static_cast<float*>(target.out)[at] = scaled;
      }
    }
  }
}

}  // namespace

const DotKernels kPortableDot = {"portable", Pack, Multiply, Write};

}  // namespace mpjax
