// Few rows by a weight whose lanes lie next to each other, read line by line of memory, on AVX-512.
// Compiled once for each instruction set, so all is in an unnamed namespace.
//
// A tile is 64 bytes of each of a few lines, of which a line is a term. The sums of its lanes are held
// in registers meanwhile, and in the first cache from tile to tile, in the order in which shifts find
// them.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_STREAM_AVX512_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_STREAM_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "stream_avx512.h"
#include "tile_avx512.h"
#include "weight.h"

namespace mpjax {
namespace {

constexpr int kTileBytes = 64;

// The lines of a tile. Bytes that are not there are zeros, unless it is `Whole`.
template <bool Whole>
struct WeightTile {
  const uint8_t* data;
  int64_t line;  // bytes from a term to the next
  int terms;
  __mmask64 bytes;

  __m512i Load(int term) const {
    const uint8_t* at = data + term * line;
    return Whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(bytes, at);
  }
  __m128i Load16(int term, int i) const {
    const uint8_t* at = data + term * line + 16 * i;
    if (Whole) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes >> (16 * i)), at);
  }
};

// Adds the products of `Rows` rows and a tile: `Kernel::Add(tile, left, left_stride, total)`.
template <typename Kernel, int Rows, typename Tile>
inline void AddWeightTile(const Tile& tile, const uint32_t* left, int64_t left_stride,
                          int64_t stride, float* sums) {
  __m512 total[Rows][Kernel::kRegisters];
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < Kernel::kRegisters; ++i) {
      total[row][i] = _mm512_loadu_ps(sums + row * stride + 16 * i);
    }
  }
  Kernel::Add(tile, left, left_stride, total);
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < Kernel::kRegisters; ++i) {
      _mm512_storeu_ps(sums + row * stride + 16 * i, total[row][i]);
    }
  }
}

// As many rows as there are, two at a time, or four.
template <typename Kernel, typename Tile>
inline void AddWeightRows(const Tile& tile, int64_t rows, const uint32_t* left, int64_t left_stride,
                          int64_t stride, float* sums) {
  if (Kernel::kRows == 4 && rows == 4) {
    return AddWeightTile<Kernel, Kernel::kRows>(tile, left, left_stride, stride, sums);
  }
  for (; rows >= 2; rows -= 2) {
    AddWeightTile<Kernel, 2>(tile, left, left_stride, stride, sums);
    left += 2 * left_stride;
    sums += 2 * stride;
  }
  if (rows == 1) AddWeightTile<Kernel, 1>(tile, left, left_stride, stride, sums);
}

// `data` are `terms` lines of `bytes` bytes.
template <typename Kernel>
void StreamLines(const uint8_t* data, int64_t line, int64_t bytes, int64_t terms,
                 const uint32_t* left, int64_t left_stride, int64_t rows, int64_t stride,
                 float* sums) {
  constexpr int kLanes = 16 * Kernel::kRegisters, kTerms = Kernel::kTerms;
  const int64_t lines = kTerms * line, ahead = (kStreamAhead / lines + 1) * lines;
  for (int64_t term = 0; term < terms; term += kTerms) {
    const int here = static_cast<int>(terms - term < kTerms ? terms - term : kTerms);
    const uint32_t* terms_of = left + term / Kernel::kTermsPerStep;
    float* to = sums;
    for (int64_t byte = 0; byte < bytes; byte += kTileBytes, to += kLanes) {
      const uint8_t* at = data + term * line + byte;
      for (int t = 0; t < here; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead + t * line), _MM_HINT_T1);
      }
      if (byte + kTileBytes <= bytes) {
        const WeightTile<true> tile = {at, line, here, ~__mmask64{0}};
        AddWeightRows<Kernel>(tile, rows, terms_of, left_stride, stride, to);
      } else {
        const WeightTile<false> tile = {at, line, here, MaskOf(bytes - byte)};
        AddWeightRows<Kernel>(tile, rows, terms_of, left_stride, stride, to);
      }
    }
  }
}

// total += 16 sums times their scales, of lanes that there are.
inline void FoldLanes(__m512 sums, const float* scales, int64_t lanes, float* total) {
  const __mmask16 mask = static_cast<__mmask16>(MaskOf(lanes < 0 ? 0 : lanes));
  const __m512 scaled = _mm512_mul_ps(sums, _mm512_maskz_loadu_ps(mask, scales));
  _mm512_mask_storeu_ps(total, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, total), scaled));
}

// Those that are in the order of the lanes.
inline void FoldInOrder(const float* sums, const float* scales, int64_t lanes, float* total) {
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    FoldLanes(_mm512_loadu_ps(sums + lane), scales + lane, lanes - lane, total + lane);
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_STREAM_AVX512_H_
