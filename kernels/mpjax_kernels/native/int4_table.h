// The numbers of int4 in bfloat16, for look-ups by five bits of 16 (`vpermw`). Compiled once for each
// instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_INT4_TABLE_H_
#define MPJAX_KERNELS_NATIVE_INT4_TABLE_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mpjax {
namespace {

// The sixteen numbers twice, the first one in the lowest 16 bits.
inline __m512i Int4Table() {
  alignas(64) uint16_t numbers[32];
  for (int i = 0; i < 32; ++i) {
    const float number = static_cast<float>((i % 16 ^ 8) - 8);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    numbers[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(numbers);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_INT4_TABLE_H_
