// The float8 formats, and the numbers that their bit patterns stand for.

#ifndef MPJAX_KERNELS_NATIVE_FLOAT8_H_
#define MPJAX_KERNELS_NATIVE_FLOAT8_H_

#include <cstdint>

namespace mpjax {

// A format of eight bits: a sign, an exponent and a mantissa.
struct Float8 {
  int mantissa;     // bits
  int bias;         // of the exponent
  float max;        // the largest finite number
  bool has_infinity;  // its largest exponent is kept for infinities and NaN, as IEEE does
};

inline constexpr Float8 kE4M3 = {3, 7, 448.0f, false};
inline constexpr Float8 kE5M2 = {2, 15, 57344.0f, true};

// For each magnitude (the lower seven bits) the upper and the lower byte of the same number in
// bfloat16, which holds all of them exactly.
struct DecodeTable {
  uint8_t high[128];
  uint8_t low[128];
};

const DecodeTable& TableOf(bool is_e5m2);

// The bfloat16 of a bit pattern.
inline uint16_t Decoded(uint8_t bits, const DecodeTable& table) {
  const int high = table.high[bits & 0x7F] | (bits & 0x80);
  return static_cast<uint16_t>((high << 8) | table.low[bits & 0x7F]);
}

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_FLOAT8_H_
