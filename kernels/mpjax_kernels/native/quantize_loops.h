// The loops of the cast to 8 bits, in integers that compilers vectorize. Compiled once for each
// instruction set, so all is in an unnamed namespace.
//
// Half of the last place that is kept, less one bit if that is even, and the cut after it round to
// nearest even; a carry out of the mantissa adds one to the exponent, as it should. Subnormal
// numbers are multiples of the smallest one, which is the last place of `smallest * 2**23`: the sum
// with that has them as its last bits, rounded by the addition. Integers are found likewise.

#ifndef MPJAX_KERNELS_NATIVE_QUANTIZE_LOOPS_H_
#define MPJAX_KERNELS_NATIVE_QUANTIZE_LOOPS_H_

#include "quantize.h"

namespace mpjax {
namespace {

template <typename T>
uint32_t LargestOf(const T* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = BitsOf(ToFloat(x[i])) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <typename T, int kMantissa, int kBias>
uint32_t QuantizeTo(const T* __restrict x, int64_t count, float scale, float max,
                    uint8_t* __restrict values) {
  constexpr int kDrop = 23 - kMantissa, kDifference = 127 - kBias;
  constexpr uint32_t kLeastNormal = static_cast<uint32_t>(kDifference + 1) << 23;
  const float shift = FromBits(static_cast<uint32_t>(kDifference + 1 - kMantissa + 23) << 23);
  const uint32_t limit = BitsOf(max);
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = BitsOf(ToFloat(x[i]));
    const uint32_t given = bits & 0x7FFFFFFFu;
    largest = given > largest ? given : largest;
    uint32_t magnitude = BitsOf(FromBits(given) / scale);
    magnitude = magnitude > limit ? limit : magnitude;
    const uint32_t odd = (magnitude >> kDrop) & 1u;
    const uint32_t rounded = (magnitude + odd + ((1u << (kDrop - 1)) - 1u)) >> kDrop;
    const uint32_t normal = rounded - (static_cast<uint32_t>(kDifference) << kMantissa);
    const uint32_t subnormal = BitsOf(FromBits(magnitude) + shift);  // bits above the last 8 go
    const uint32_t result = magnitude >= kLeastNormal ? normal : subnormal;
    values[i] = static_cast<uint8_t>((result & 0x7Fu) | ((bits >> 24) & 0x80u));
  }
  return largest;
}

template <typename T>
uint32_t QuantizeToInt8(const T* __restrict x, int64_t count, float scale,
                        uint8_t* __restrict values) {
  const float shift = 3 << 22;  // beside it a last place is 1, and negative numbers borrow from it
  // XLA multiplies by the inverse of a scale that many numbers share, which rounds some ties
  // otherwise than a division.
  const float inverse = 1.0f / scale;
  const uint32_t limit = BitsOf(LargestOf(Output::kInt8));
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = BitsOf(ToFloat(x[i]));
    const uint32_t given = bits & 0x7FFFFFFFu;
    largest = given > largest ? given : largest;
    uint32_t magnitude = BitsOf(FromBits(given) * inverse);
    magnitude = magnitude > limit ? limit : magnitude;
    const float value = FromBits(magnitude | (bits & 0x80000000u));
    values[i] = static_cast<uint8_t>(BitsOf(value + shift));
  }
  return largest;
}

template <typename T>
uint32_t QuantizeAs(Output format, const void* x, int64_t count, float scale, uint8_t* values) {
  const T* from = static_cast<const T*>(x);
  switch (format) {
    case Output::kE4M3:
      return QuantizeTo<T, 3, 7>(from, count, scale, kE4M3.max, values);
    case Output::kE5M2:
      return QuantizeTo<T, 2, 15>(from, count, scale, kE5M2.max, values);
    default:
      return QuantizeToInt8(from, count, scale, values);
  }
}

uint32_t Largest(Real type, const void* x, int64_t count) {
  switch (type) {
    case Real::kFloat32:
      return LargestOf(static_cast<const float*>(x), count);
    case Real::kBfloat16:
      return LargestOf(static_cast<const uint16_t*>(x), count);
    default:
      return LargestOf(static_cast<const Float16*>(x), count);
  }
}

uint32_t Quantize(Real type, const void* x, int64_t count, float scale, Output format,
                  uint8_t* values) {
  const auto quantize = type == Real::kFloat32    ? QuantizeAs<float>
                        : type == Real::kBfloat16 ? QuantizeAs<uint16_t>
                                                  : QuantizeAs<Float16>;
  return quantize(format, x, count, scale, values);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_QUANTIZE_LOOPS_H_
