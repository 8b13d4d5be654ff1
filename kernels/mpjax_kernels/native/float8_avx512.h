// float8 to bfloat16 on AVX512-VBMI: `vpermi2b` looks up 64 numbers at once in a table of 128 bytes,
// which are all the magnitudes that there are: two look-ups, of the upper and of the lower byte,
// decode 64 numbers. Compiled once for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_FLOAT8_AVX512_H_
#define MPJAX_KERNELS_NATIVE_FLOAT8_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "float8.h"

namespace mpjax {
namespace {

class Decoder {
 public:
  explicit Decoder(const DecodeTable& table) {
    for (int half = 0; half < 2; ++half) {
      high_[half] = _mm512_loadu_si512(table.high + 64 * half);
      low_[half] = _mm512_loadu_si512(table.low + 64 * half);
    }
    alignas(64) uint8_t order[2][64];
    for (int lane = 0; lane < 16; ++lane) {
      for (int term = 0; term < 4; ++term) {
        uint8_t* place = order[term / 2] + 4 * lane + 2 * (term % 2);
        place[0] = static_cast<uint8_t>(4 * lane + term);       // of the lower bytes
        place[1] = static_cast<uint8_t>(64 + 4 * lane + term);  // of the upper ones
      }
    }
    for (int pair = 0; pair < 2; ++pair) order_[pair] = _mm512_load_si512(order[pair]);
  }

  // Four terms of 16 lanes, [lane][term], as two pairs of terms of 16 lanes each.
  void Decode(__m512i bytes, __m512i& first, __m512i& second) const {
    const __m512i high = High(bytes), low = Low(bytes);
    first = _mm512_permutex2var_epi8(low, order_[0], high);
    second = _mm512_permutex2var_epi8(low, order_[1], high);
  }

  // The first and the last eight of each 16 bytes.
  void DecodeHalves(__m512i bytes, __m512i& first, __m512i& last) const {
    const __m512i high = High(bytes), low = Low(bytes);
    first = _mm512_unpacklo_epi8(low, high);
    last = _mm512_unpackhi_epi8(low, high);
  }

 private:
  __m512i High(__m512i bytes) const {
    const __m512i magnitude = _mm512_permutex2var_epi8(high_[0], bytes, high_[1]);
    const __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
    return _mm512_or_si512(magnitude, sign);
  }

  __m512i Low(__m512i bytes) const { return _mm512_permutex2var_epi8(low_[0], bytes, low_[1]); }

  __m512i high_[2], low_[2], order_[2];
};

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_FLOAT8_AVX512_H_
