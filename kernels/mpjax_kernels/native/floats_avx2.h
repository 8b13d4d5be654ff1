// What is stored in 8 or 4 bits as float32 on AVX2 and F16C, and panels of it. Compiled once for each
// instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_FLOATS_AVX2_H_
#define MPJAX_KERNELS_NATIVE_FLOATS_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "tile_avx2.h"

namespace mpjax {
namespace {

// Formats of 8 bits: `Of` makes float32 of the first eight bytes. `At` is where an entry is, and `Load`
// reads the eight from there on.
template <typename Format>
struct InBytes {
  static const uint8_t* At(const uint8_t* data, int64_t entry) { return data + entry; }
  static __m256 Load(const uint8_t* at) {
    return Format::Of(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
};

struct Int8 : InBytes<Int8> {
  static __m256 Of(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
};

// The upper half of a float16: `vcvtph2ps` makes float32 of them, subnormal numbers too.
struct E5M2 : InBytes<E5M2> {
  static __m256 Of(__m128i bytes) {
    return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
  }
};

// A float16 that is 2**8 times too small, but for the largest magnitude, which is NaN: all bits are.
struct E4M3 : InBytes<E4M3> {
  static __m256 Of(__m128i bytes) {
    const __m128i moved = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
    const __m128i halves = _mm_and_si128(moved, _mm_set1_epi16(static_cast<short>(0xBF80)));
    const __m128i largest = _mm_set1_epi16(0x3F80);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(halves, largest), largest);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(halves, nan)), _mm256_set1_ps(256));
  }
};

// Two to a byte, and the first entry is the first of a byte: each moves to the upper end of 32 bits.
struct Int4 {
  static const uint8_t* At(const uint8_t* data, int64_t entry) { return data + entry / 2; }
  static __m256 Load(const uint8_t* at) {
    int bits;
    std::memcpy(&bits, at, sizeof(bits));
    const __m256i places = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256i upper = _mm256_sllv_epi32(_mm256_set1_epi32(bits), places);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 28));
  }
};

// Four terms of 8 lanes, as bytes, to four steps in float32, less the zero points of so many lanes, if
// there are any.
template <typename Format>
class FloatsPacker {
 public:
  explicit FloatsPacker(const Panels& to, const float* zeros = nullptr, int lanes = 0)
      : to_(to), has_zeros_(zeros != nullptr) {
    for (int group = 0; has_zeros_ && 8 * group < lanes; ++group) {
      zeros_[group] = _mm256_maskload_ps(zeros + 8 * group, MaskOf(lanes - 8 * group));
    }
  }

  // Bytes [lane][term] are brought in the order [term][lane].
  void Take(__m256i bytes, int64_t four, int group) {
    const __m256i by_term = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i terms = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, by_term), order);
    const __m128i low = _mm256_castsi256_si128(terms), high = _mm256_extracti128_si256(terms, 1);
    const __m128i each[4] = {low, _mm_unpackhi_epi64(low, low), high,
                             _mm_unpackhi_epi64(high, high)};
    for (int t = 0; t < 4; ++t) {
      __m256 numbers = Format::Of(each[t]);
      if (has_zeros_) numbers = _mm256_sub_ps(numbers, zeros_[group]);
      StoreStep(_mm256_castps_si256(numbers), 4 * four + t, group, to_);
    }
  }

 private:
  const Panels to_;
  const bool has_zeros_;
  __m256 zeros_[kPackLanes / 8] = {};
};

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_FLOATS_AVX2_H_
