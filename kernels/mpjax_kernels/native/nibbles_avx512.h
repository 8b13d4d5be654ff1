// int4 as unsigned bytes on AVX-512. Compiled once for each instruction set, so all is in an unnamed
// namespace.

#ifndef MPJAX_KERNELS_NATIVE_NIBBLES_AVX512_H_
#define MPJAX_KERNELS_NATIVE_NIBBLES_AVX512_H_

#include <immintrin.h>

namespace mpjax {
namespace {

constexpr int kAndXor = 0x6A;  // (a & b) ^ c, by `vpternlogd`

// The lower bits of each byte, 8 more than the number that they are.
inline __m512i UnsignedNibbles(__m512i bytes) {
  return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(0xF), _mm512_set1_epi8(8), kAndXor);
}

// The upper bits, 8 more than the number that they are, times 16.
inline __m512i UpperNibbles(__m512i bytes) {
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xF0));
  return _mm512_ternarylogic_epi32(bytes, upper, _mm512_set1_epi8(static_cast<char>(0x80)), kAndXor);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_NIBBLES_AVX512_H_
