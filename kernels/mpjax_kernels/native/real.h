// The floating-point formats of arrays and results, beside the 8-bit ones.

#ifndef MPJAX_KERNELS_NATIVE_REAL_H_
#define MPJAX_KERNELS_NATIVE_REAL_H_

#include <cstdint>
#include <cstring>

namespace mpjax {

enum class Real { kFloat32, kBfloat16, kFloat16 };

inline int64_t BytesOf(Real type) { return type == Real::kFloat32 ? 4 : 2; }

// A float16 as it is stored; uint16_t is a bfloat16.
struct Float16 {
  uint16_t bits;
};

// Conversions are in unnamed namespaces, for each instruction set to compile its own.
namespace {

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t bfloat16) { return FromBits(static_cast<uint32_t>(bfloat16) << 16); }

// Moved to the place of a float32's exponent and mantissa, a float16 is 2**112 times too small, and
// subnormal numbers are too; infinity and NaN are not.
inline float ToFloat(Float16 half) {
  const uint32_t magnitude = static_cast<uint32_t>(half.bits & 0x7FFF) << 13;
  const uint32_t finite = BitsOf(FromBits(magnitude) * FromBits((127u + 112u) << 23));
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  return FromBits((magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite) | sign);
}

// To nearest even, in integers, which keeps subnormal numbers.
inline uint16_t ToBfloat16(float value) {
  const uint32_t bits = BitsOf(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// To nearest even. What is below the normal numbers is a multiple of 2**-24, the last place of 0.5:
// the sum with that rounds it, and has it as its last bits.
inline uint16_t ToFloat16(float value) {
  const uint32_t bits = BitsOf(value), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00 | (magnitude >> 13 & 0x1FF);
  } else if (magnitude < (127u - 14u) << 23) {
    half = BitsOf(FromBits(magnitude) + 0.5f) & 0x7FF;
  } else {
    const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    half = rounded >= (127u + 16u) << 23 ? 0x7C00 : (rounded - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_REAL_H_
