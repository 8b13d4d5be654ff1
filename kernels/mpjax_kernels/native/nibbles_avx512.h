// int4 as unsigned bytes on AVX-512. Compiled once for each instruction set, so all is in an unnamed
// namespace.

#ifndef MPJAX_KERNELS_NATIVE_NIBBLES_AVX512_H_
#define MPJAX_KERNELS_NATIVE_NIBBLES_AVX512_H_

#include <immintrin.h>

namespace mpjax {
namespace {

// The lower bits of each byte, 8 more than the number that they are.
inline __m512i UnsignedNibbles(__m512i bytes) {
  constexpr int kAndXor = 0x6A;  // (a & b) ^ c
  return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(0xF), _mm512_set1_epi8(8), kAndXor);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_NIBBLES_AVX512_H_
