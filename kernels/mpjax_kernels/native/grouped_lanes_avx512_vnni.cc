// Rows of int8 by int4 whose lanes lie next to each other, on AVX512-VNNI: four terms of 128 lanes, two
// lanes to a byte, are interleaved as they are; masked, they are four terms of each lane in 32 bits, for
// `vpdpbusd`. The upper half of a byte stays where it is, and its products are 16 times as large.
//
// Memory is read as it lies: a few terms of all lanes of a strip, then the next few. The sums of 128
// lanes are in an order of their own until the last terms are added.

#include "grouped_lanes.h"

#if defined(__AVX512VNNI__)

#include <cstring>

#include "nibbles_avx512.h"
#include "stream_avx512.h"

namespace mpjax {
namespace {

constexpr int kAtOnce = 16;          // terms that are added before the sums are stored
constexpr int kRegisters = 8;        // of sums of a row and a block
constexpr int64_t kLinesAhead = 24;  // of memory, that are fetched

// Terms of a block of the weight, 128 lanes in 64 bytes. If it is `Whole`, they are kAtOnce.
template <bool Whole>
struct Block {
  const uint8_t* data;
  int64_t stride;
  int terms;
  __mmask64 mask;

  __m512i Load(const uint8_t* at, int term) const {
    if (Whole) return _mm512_loadu_si512(at);
    return term < terms ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_setzero_si512();
  }
};

// Where the registers of a row's sums are, in the tiles of the block.
inline int32_t* PlaceOf(int32_t* sums, int64_t rows, int64_t row, int i) {
  return sums + (i / 4 * rows + row) * kWidth + i % 4 * 16;
}

// The lower or the upper 8 of each 16 bytes of four terms, as four terms in 32 bits.
template <int Half>
inline void Interleave(const __m512i (&terms)[4], __m512i (&to)[2]) {
  const auto bytes = [](__m512i a, __m512i b) {
    return Half == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
  };
  const __m512i first = bytes(terms[0], terms[1]), second = bytes(terms[2], terms[3]);
  to[0] = _mm512_unpacklo_epi16(first, second);
  to[1] = _mm512_unpackhi_epi16(first, second);
}

// Adds the products of `Rows` rows and a half of a block.
template <int Rows, int Half>
inline void AddHalf(const __m512i (&terms)[4], const __m512i (&x)[Rows], __m512i (&total)[Rows][4]) {
  __m512i fours[2];
  Interleave<Half>(terms, fours);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i even = UnsignedNibbles(fours[i]);
    const __m512i odd = UpperNibbles(fours[i]);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      total[row][2 * i] = _mm512_dpbusd_epi32(total[row][2 * i], even, x[row]);
      total[row][2 * i + 1] = _mm512_dpbusd_epi32(total[row][2 * i + 1], odd, x[row]);
    }
  }
}

// A block: its first half, its second one, or both.
template <int Rows, bool First, bool Second, bool Prefetch, bool Whole>
void AddBlock(const Block<Whole>& block, const uint8_t* left, int64_t left_stride, bool add,
              int32_t* sums, int64_t rows) {
  __m512i first[Rows][4], second[Rows][4];
  const auto load = [&](int row, int i) {
    return add ? _mm512_loadu_si512(PlaceOf(sums, rows, row, i)) : _mm512_setzero_si512();
  };
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (First) first[row][i] = load(row, i);
      if (Second) second[row][i] = load(row, 4 + i);
    }
  }
  const int64_t stride = block.stride, three = 3 * stride;
  const uint8_t* at = block.data;
  const uint8_t* ahead = at + kLinesAhead * stride;
  for (int term = 0; term < (Whole ? kAtOnce : block.terms); term += 4) {
    if (Prefetch) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + stride), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + 2 * stride), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + three), _MM_HINT_T1);
    }
    const __m512i terms[4] = {block.Load(at, term), block.Load(at + stride, term + 1),
                              block.Load(at + 2 * stride, term + 2),
                              block.Load(at + three, term + 3)};
    at += 4 * stride;
    ahead += 4 * stride;
    __m512i x[Rows];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      int four;
      std::memcpy(&four, left + row * left_stride + term, sizeof(four));
      x[row] = _mm512_set1_epi32(four);
    }
    if (First) AddHalf<Rows, 0>(terms, x, first);
    if (Second) AddHalf<Rows, 1>(terms, x, second);
  }
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (First) _mm512_storeu_si512(PlaceOf(sums, rows, row, i), first[row][i]);
      if (Second) _mm512_storeu_si512(PlaceOf(sums, rows, row, 4 + i), second[row][i]);
    }
  }
}

template <int Rows, bool Whole>
void AddRows(const Block<Whole>& block, const uint8_t* left, int64_t left_stride, bool add,
             int32_t* sums, int64_t rows) {
  if (Rows <= 2) {
    AddBlock<Rows, true, true, true>(block, left, left_stride, add, sums, rows);
  } else {
    AddBlock<Rows, true, false, true>(block, left, left_stride, add, sums, rows);
    AddBlock<Rows, false, true, false>(block, left, left_stride, add, sums, rows);
  }
}

template <bool Whole>
void AddAllRows(const Block<Whole>& block, const LaidOutRows& left, int64_t term, bool add,
                int32_t* sums) {
  for (int64_t row = 0; row < left.rows; row += 4) {
    const int64_t here = left.rows - row;
    const auto multiply = here == 1   ? AddRows<1, Whole>
                          : here == 2 ? AddRows<2, Whole>
                          : here == 3 ? AddRows<3, Whole>
                                      : AddRows<4, Whole>;
    multiply(block, left.data + row * left.stride + term, left.stride, add, sums + row * kWidth,
             left.rows);
  }
}

// Brings the sums of a row in the order of lanes. Of a block, each second register has the odd lanes.
inline void Order(int32_t* sums, int64_t rows, int64_t row) {
  __m512i fours[2][4];  // four neighbours of every 32
  for (int i = 0; i < kRegisters; i += 2) {
    const __m512i even = _mm512_loadu_si512(PlaceOf(sums, rows, row, i));
    const __m512i odd = _mm512_srai_epi32(_mm512_loadu_si512(PlaceOf(sums, rows, row, i + 1)), 4);
    fours[i / 4][i % 4] = _mm512_unpacklo_epi32(even, odd);
    fours[i / 4][i % 4 + 1] = _mm512_unpackhi_epi32(even, odd);
  }
  for (int half = 0; half < 2; ++half) {
    InOrder(fours[half]);  // now 16 neighbours of 32 each
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(PlaceOf(sums, rows, row, 2 * i + half), fours[half][i]);
    }
  }
}

}  // namespace

void MultiplyLanesAvx512(const Weight& weight, int64_t lane, int64_t lanes, int64_t term,
                         int64_t terms, const LaidOutRows& left, int32_t* sums) {
  const int64_t line = weight.stride / 2;
  const uint8_t* data = weight.data + term * line + lane / 2;
  for (int64_t t = 0; t < terms; t += kAtOnce, data += kAtOnce * line) {
    const int here = static_cast<int>(terms - t < kAtOnce ? terms - t : kAtOnce);
    for (int64_t i = 0; i < lanes; i += kBlockLanes) {
      const uint8_t* at = data + i / 2;
      int32_t* to = sums + i * left.rows;
      if (here == kAtOnce && lanes - i >= kBlockLanes) {
        AddAllRows<true>({at, line, here, ~__mmask64{0}}, left, t, t > 0, to);
      } else {
        AddAllRows<false>({at, line, here, MaskOf((lanes - i) / 2)}, left, t, t > 0, to);
      }
    }
  }
  for (int64_t i = 0; i < lanes; i += kBlockLanes) {
    for (int64_t row = 0; row < left.rows; ++row) Order(sums + i * left.rows, left.rows, row);
  }
}

}  // namespace mpjax

#endif
