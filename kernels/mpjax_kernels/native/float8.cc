// What each float8 bit pattern is in bfloat16, worked out once per format from its definition.

#include "float8.h"

namespace mpjax {
namespace {

constexpr int kBfloat16Bias = 127, kBfloat16Mantissa = 7;

uint16_t ToBfloat16(int magnitude, const Float8& format) {
  const int top = (1 << (7 - format.mantissa)) - 1;  // the largest exponent
  int exponent = magnitude >> format.mantissa;
  int mantissa = magnitude & ((1 << format.mantissa) - 1);
  if (format.has_infinity ? exponent == top : magnitude == 0x7F) {
    const bool is_nan = !format.has_infinity || mantissa != 0;
    return is_nan ? 0x7FC0 : 0x7F80;
  }
  if (magnitude == 0) return 0;
  if (exponent == 0) {  // subnormal: moved up until its leading bit is the implied one
    exponent = 1;
    while (!(mantissa >> format.mantissa)) {
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= (1 << format.mantissa) - 1;
  }
  const int biased = exponent - format.bias + kBfloat16Bias;
  return static_cast<uint16_t>((biased << kBfloat16Mantissa) |
                               (mantissa << (kBfloat16Mantissa - format.mantissa)));
}

DecodeTable MakeTable(const Float8& format) {
  DecodeTable table;
  for (int magnitude = 0; magnitude < 128; ++magnitude) {
    const uint16_t number = ToBfloat16(magnitude, format);
    table.high[magnitude] = static_cast<uint8_t>(number >> 8);
    table.low[magnitude] = static_cast<uint8_t>(number & 0xFF);
  }
  return table;
}

}  // namespace

const DecodeTable& TableOf(bool is_e5m2) {
  static const DecodeTable e4m3 = MakeTable(kE4M3), e5m2 = MakeTable(kE5M2);
  return is_e5m2 ? e5m2 : e4m3;
}

}  // namespace mpjax
