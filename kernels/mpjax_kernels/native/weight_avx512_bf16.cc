// The product of a bfloat16 array by a weight on AVX512-BF16: `vdpbf16ps` multiplies pairs of
// bfloat16, which hold the integers of the weight exactly, and adds them up in float32.
//
// One or two rows are multiplied by int4 as it is decoded, in registers: `vpermw` takes the lower five
// bits of each 16 as a place in a table of 32 numbers, the sixteen of int4 twice.

#include <cstring>

#include "weight.h"

#if defined(__AVX512BF16__)

#include "weight_avx512.h"
#include "weight_streams.h"

namespace mpjax {
namespace {

constexpr int kAhead = 8;  // terms: the hardware stops at the end of a page

// One row by 256 lanes of int4, or two by 128: sixteen registers of sums, of every eighth lane.
template <int Rows>
void MultiplyInt4(const uint8_t* data, int64_t stride, int terms, const uint32_t* left,
                  int64_t left_stride, float* sums) {
  constexpr int kChunks = 2 / Rows;  // of 128 lanes
  constexpr __mmask32 kOdd = 0xAAAAAAAA;
  alignas(64) uint16_t numbers[32];
  for (int i = 0; i < 32; ++i) {
    const float number = static_cast<float>((i % 16 ^ 8) - 8);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    numbers[i] = static_cast<uint16_t>(bits >> 16);
  }
  const __m512i table = _mm512_load_si512(numbers);
  __m512 total[16] = {};
  for (int term = 0; term < terms; term += 2) {
    const uint8_t* at = data + term * stride;
    const char* ahead = reinterpret_cast<const char*>(at + kAhead * stride);
    const bool is_pair = term + 1 < terms;
    __m512bh x[Rows];
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) {
      const uint32_t pair = left[row * left_stride + term / 2];
      x[row] = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
    }
#pragma GCC unroll 2
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      _mm_prefetch(ahead + 64 * chunk, _MM_HINT_T0);
      _mm_prefetch(ahead + 64 * chunk + stride, _MM_HINT_T0);
      const __m512i first = _mm512_loadu_si512(at + 64 * chunk);
      const __m512i second = is_pair ? _mm512_loadu_si512(at + stride + 64 * chunk) : first;
      // Pairs of both terms, of the lower and of the upper half of each eight lanes.
      const __m512i halves[2] = {
          _mm512_mask_blend_epi16(kOdd, first, _mm512_slli_epi32(second, 16)),
          _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(first, 16), second)};
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512i places = _mm512_srli_epi16(halves[i / 4], 4 * (i % 4));
        const __m512i weight = _mm512_permutexvar_epi16(places, table);
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          __m512& to = total[8 * (chunk + row) + i];
          to = _mm512_dpbf16_ps(to, x[row], reinterpret_cast<__m512bh>(weight));
        }
      }
    }
  }
  StoreEighths<Rows>(total, sums);
}

int DirectLanes(const Weight& weight, int64_t rows, int64_t terms, bool has_zeros) {
  if (!weight.is_int4 || has_zeros) return 0;
  if (weight.terms_last) return rows <= kDirectRows && terms >= 16 && terms % 2 == 0 ? kWidth : 0;
  return rows == 1 ? 256 : rows == 2 ? 128 : 0;
}

void MultiplyDirect(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                    int64_t rows, float* sums) {
  if (weight.terms_last) return MultiplyInt4TermsPairs(weight, run, left, stride, rows, sums);
  const uint8_t* data = weight.data + (run.term * weight.stride + run.lane) / 2;
  const auto multiply = rows == 1 ? MultiplyInt4<1> : MultiplyInt4<2>;
  multiply(data, weight.stride / 2, run.terms, left, stride, sums);
}

}  // namespace

const WeightKernels kAvx512WeightPairs = {2,       PackRun<WeightPacker<true>>, MultiplyWeight<AddPairs>,
                                          DirectLanes, MultiplyDirect, Scale, WriteFloats,
                                          StreamWeightPairs, FoldWeightPairs};

}  // namespace mpjax

#endif
