// The loops of attention, which compilers vectorize; a sum is kept in 16 lanes, added up by halves, so
// that all instruction sets give the same bits. Compiled once for each of them, so all is in an unnamed
// namespace.

#ifndef MPJAX_KERNELS_NATIVE_ATTENTION_LOOPS_H_
#define MPJAX_KERNELS_NATIVE_ATTENTION_LOOPS_H_

#include <cstring>

#include "attention.h"
#include "real.h"

namespace mpjax {
namespace {

// An E4M3 as it is stored.
struct E4M3 {
  uint8_t bits;
};

inline float ToFloat(int8_t value) { return value; }

// Moved to the place of a float32's exponent and mantissa it is 2**120 times too small, subnormal
// numbers too. All bits set are NaN.
inline float ToFloat(E4M3 value) {
  const uint32_t magnitude = value.bits & 0x7Fu, sign = (value.bits & 0x80u) << 24;
  const uint32_t finite = BitsOf(FromBits(magnitude << 20) * FromBits((127u + 120u) << 23));
  return FromBits((magnitude == 0x7Fu ? 0x7FC00000u : finite) | sign);
}

template <typename T>
void WidenFrom(const void* from, int64_t count, float* __restrict to) {
  const T* __restrict numbers = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(numbers[i]);
}

void Widen(Stored type, const void* from, int64_t count, float* to) {
  switch (type) {
    case Stored::kFloat32:
      return WidenFrom<float>(from, count, to);
    case Stored::kBfloat16:
      return WidenFrom<uint16_t>(from, count, to);
    case Stored::kFloat16:
      return WidenFrom<Float16>(from, count, to);
    case Stored::kInt8:
      return WidenFrom<int8_t>(from, count, to);
    case Stored::kE4M3:
      return WidenFrom<E4M3>(from, count, to);
  }
}

void Narrow(const float* __restrict from, int64_t count, Real type, void* __restrict to) {
  uint16_t* __restrict halves = static_cast<uint16_t*>(to);
  switch (type) {
    case Real::kFloat32:
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    case Real::kBfloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = ToBfloat16(from[i]);
      return;
    case Real::kFloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = ToFloat16(from[i]);
  }
}

template <int kCount>
struct Vector {
  typedef float Lanes __attribute__((vector_size(4 * kCount)));
};

template <int kCount>
inline typename Vector<kCount>::Lanes LoadLanes(const float* from) {
  typename Vector<kCount>::Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// The lanes from the half on are added to those before.
template <int kHalf>
inline void AddHalves(float* lanes) {
  const auto sum = LoadLanes<kHalf>(lanes) + LoadLanes<kHalf>(lanes + kHalf);
  std::memcpy(lanes, &sum, sizeof(sum));
}

inline float Dot(const float* a, const float* b, int64_t count) {
  constexpr int kLanes = 16;
  Vector<kLanes>::Lanes sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += LoadLanes<kLanes>(a + i) * LoadLanes<kLanes>(b + i);
  alignas(64) float lanes[kLanes];
  std::memcpy(lanes, &sums, sizeof(lanes));
  for (int j = 0; i < count; ++i, ++j) lanes[j] += a[i] * b[i];
  AddHalves<8>(lanes);
  AddHalves<4>(lanes);
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

void Scores(const float* query, const float* key, int64_t heads, int64_t rows, int64_t depth,
            float* sums) {
  for (int64_t head = 0; head < heads; ++head, key += depth) {
    for (int64_t row = 0; row < rows; ++row, query += depth) *sums++ = Dot(query, key, depth);
  }
}

void Add(const float* weights, const float* __restrict value, int64_t heads, int64_t rows,
         int64_t depth, float* __restrict sums) {
  for (int64_t head = 0; head < heads; ++head, value += depth) {
    for (int64_t row = 0; row < rows; ++row, sums += depth) {
      const float weight = *weights++;
      for (int64_t d = 0; d < depth; ++d) sums[d] += weight * value[d];
    }
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ATTENTION_LOOPS_H_
