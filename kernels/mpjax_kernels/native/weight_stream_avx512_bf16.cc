// Few rows in bfloat16 by lines of int4, on AVX512-BF16: `vpermw` takes the lower five bits of each 16
// as a place in a table of 32 numbers, the sixteen of int4 twice, and `vdpbf16ps` adds up two terms.

#include "weight_streams.h"

#if defined(__AVX512BF16__)

#include <cstring>

#include "weight_stream_avx512.h"

namespace mpjax {
namespace {

// The sixteen numbers twice, the first one in the lowest 16 bits.
inline __m512i Table() {
  alignas(64) uint16_t numbers[32];
  for (int i = 0; i < 32; ++i) {
    const float number = static_cast<float>((i % 16 ^ 8) - 8);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    numbers[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(numbers);
}

struct Int4Pairs {
  static constexpr int kRows = 2, kRegisters = 8, kTermsPerStep = 2;

  template <typename Tile, int Rows>
  static void Add(const Tile& tile, const uint32_t* left, int64_t left_stride,
                  __m512 (&total)[Rows][kRegisters]) {
    constexpr __mmask32 kOdd = 0xAAAAAAAA;
    const __m512i table = Table();
    for (int term = 0; term < tile.terms; term += 2) {
      const __m512i first = tile.Load(term);
      const __m512i second = term + 1 < tile.terms ? tile.Load(term + 1) : first;
      // Pairs of both terms, of the lower and of the upper half of each eight lanes.
      const __m512i halves[2] = {
          _mm512_mask_blend_epi16(kOdd, first, _mm512_slli_epi32(second, 16)),
          _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(first, 16), second)};
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i) {
        const __m512i places = _mm512_srli_epi16(halves[i / 4], 4 * (i % 4));
        const __m512i weight = _mm512_permutexvar_epi16(places, table);
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          const uint32_t pair = left[row * left_stride + term / 2];
          const __m512i x = _mm512_set1_epi32(static_cast<int>(pair));
          total[row][i] = _mm512_dpbf16_ps(total[row][i], reinterpret_cast<__m512bh>(x),
                                           reinterpret_cast<__m512bh>(weight));
        }
      }
    }
  }
};

}  // namespace

void StreamWeightPairs(const Weight& weight, const Run& run, const uint32_t* left,
                       int64_t left_stride, int64_t rows, int64_t stride, float* sums) {
  const uint8_t* data = weight.data + (run.term * weight.stride + run.lane) / 2;
  StreamLines<Int4Pairs>(data, weight.stride / 2, run.lanes / 2, run.terms, left, left_stride, rows,
                         stride, sums);
}

void FoldWeightPairs(const Weight&, const float* sums, const float* scales, int64_t lanes,
                     float* total) {
  FoldInt4(sums, scales, lanes, total);
}

}  // namespace mpjax

#endif
