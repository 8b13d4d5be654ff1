// What streams share on AVX-512: turning what is loaded, and bringing sums in order.
// Compiled once for each instruction set, so all is in an unnamed namespace.
//
// Bytes of neighbouring rows of memory are interleaved within each 128 bits, which is half of what it
// takes to turn them. So the sums of a tile come in another order: the i-th of its four registers has
// columns 4 i to 4 i + 3 of every 16.

#ifndef MPJAX_KERNELS_NATIVE_STREAM_AVX512_H_
#define MPJAX_KERNELS_NATIVE_STREAM_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "dot.h"
#include "tile_avx512.h"

namespace mpjax {
namespace {

constexpr int kTileRegisters = kWidth / 16;

// So many bytes ahead, at least, the matrix is fetched: the hardware stops at the end of a page.
constexpr int64_t kStreamAhead = 8192;

// A tile of a few terms of the right operand: 64 lanes in each row of memory. Terms and lanes that
// are not there are zeros, unless it is `Whole`.
template <bool Whole>
struct StreamTile {
  const uint8_t* data;
  int64_t stride;  // from a term to the next
  int64_t terms;
  __mmask64 lanes;

  __m512i Load(int term) const {
    if (Whole) return _mm512_loadu_si512(data + term * stride);
    if (term >= terms) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi8(lanes, data + term * stride);
  }
};

// A few rows that are laid out.
struct StreamRows {
  const uint32_t* steps;
  int64_t stride;

  __m512i Broadcast(int row, int step) const {
    return _mm512_set1_epi32(static_cast<int>(steps[row * stride + step]));
  }
};

// Adds the products of `Rows` rows and a tile, in registers: `kernel.Add(tile, rows, total)`.
template <int Rows, typename Kernel, typename Tile>
inline void AddTile(const Kernel& kernel, const Tile& tile, const StreamRows& rows, int64_t stride,
                    Sum* sums) {
  __m512i total[Rows][kTileRegisters];
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kTileRegisters; ++i) {
      total[row][i] = _mm512_loadu_si512(sums + row * stride + 16 * i);
    }
  }
  kernel.Add(tile, rows, total);
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kTileRegisters; ++i) {
      _mm512_storeu_si512(sums + row * stride + 16 * i, total[row][i]);
    }
  }
}

// `Terms` terms at a time, of all lanes, tile by tile.
template <int Rows, int Terms, typename Kernel>
void StreamAll(const Kernel& kernel, StreamRows rows, const Source& right, int64_t lanes,
               int64_t terms, int64_t stride, Sum* sums) {
  const int64_t line = right.term_stride, ahead = (kStreamAhead / (Terms * line) + 1) * Terms * line;
  for (int64_t term = 0; term < terms; term += Terms) {
    const uint8_t* data = right.data + term * line;
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
#pragma GCC unroll 16
      for (int t = 0; t < Terms; ++t) {
        const uint8_t* next = data + lane + ahead + t * line;
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      }
      if (term + Terms <= terms && lane + kWidth <= lanes) {
        const StreamTile<true> tile = {data + lane, line, Terms, ~__mmask64{0}};
        AddTile<Rows>(kernel, tile, rows, stride, sums + lane);
      } else {
        const StreamTile<false> tile = {data + lane, line, terms - term, MaskOf(lanes - lane)};
        AddTile<Rows>(kernel, tile, rows, stride, sums + lane);
      }
    }
    rows.steps += Terms / Kernel::kTermsPerStep;
  }
}

// The sums of a tile of four registers in the order of its columns.
inline void InOrder(__m512i (&of)[kTileRegisters]) {
  const __m512i low01 = _mm512_shuffle_i32x4(of[0], of[1], 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(of[0], of[1], 0xEE);
  const __m512i low23 = _mm512_shuffle_i32x4(of[2], of[3], 0x44);
  const __m512i high23 = _mm512_shuffle_i32x4(of[2], of[3], 0xEE);
  of[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
  of[1] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
  of[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
  of[3] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
}

// Adds up a tile of all parts, `Add::To` two registers at a time.
template <typename Add>
void SettleTile(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile) {
  for (int row = 0; row < rows; ++row) {
    __m512i total[kTileRegisters];
    for (int i = 0; i < kTileRegisters; ++i) {
      const Sum* at = sums + row * stride + 16 * i;
      total[i] = _mm512_loadu_si512(at);
      for (int64_t part = 1; part < parts; ++part) {
        total[i] = Add::To(total[i], _mm512_loadu_si512(at + part * rows * stride));
      }
    }
    InOrder(total);
    for (int i = 0; i < kTileRegisters; ++i) {
      _mm512_storeu_si512(tile + row * kWidth + 16 * i, total[i]);
    }
  }
}

}  // namespace

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_STREAM_AVX512_H_
