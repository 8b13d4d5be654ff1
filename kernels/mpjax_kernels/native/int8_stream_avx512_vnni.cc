// Few rows of int8 by a matrix of int8 whose lanes lie next to each other, on AVX512-VNNI: four terms
// of 64 lanes are interleaved, so that `vpdpbusd` finds the four of a lane in 32 bits.

#include "streams.h"

#if defined(__AVX512VNNI__)

#include <cstring>

#include "stream_avx512.h"

namespace mpjax {
namespace {

template <int Terms>
struct Fours {
  static constexpr int kTermsPerStep = 4;

  template <typename Tile, int Rows>
  void Add(const Tile& tile, const StreamRows& rows,
           __m512i (&total)[Rows][kTileRegisters]) const {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 4
    for (int four = 0; four < Terms / 4; ++four) {
      __m512i loaded[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) loaded[t] = _mm512_xor_si512(tile.Load(4 * four + t), sign);
      const __m512i low01 = _mm512_unpacklo_epi8(loaded[0], loaded[1]);
      const __m512i high01 = _mm512_unpackhi_epi8(loaded[0], loaded[1]);
      const __m512i low23 = _mm512_unpacklo_epi8(loaded[2], loaded[3]);
      const __m512i high23 = _mm512_unpackhi_epi8(loaded[2], loaded[3]);
      const __m512i lanes[kTileRegisters] = {
          _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
          _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const __m512i terms = rows.Broadcast(row, four);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRegisters; ++i) {
          total[row][i] = _mm512_dpbusd_epi32(total[row][i], lanes[i], terms);
        }
      }
    }
  }
};

struct AddIntegers {
  static __m512i To(__m512i total, __m512i part) { return _mm512_add_epi32(total, part); }
};

}  // namespace

// The sums are too large by 128 times that of the row, as the right operand is taken for unsigned.
int32_t LayOutInt8(const Source& row, int64_t terms, uint32_t* steps) {
  uint8_t* to = reinterpret_cast<uint8_t*>(steps);
  const int64_t padded = (terms + kStreamTerms - 1) / kStreamTerms * kStreamTerms;
  std::memset(to + terms, 0, static_cast<size_t>(padded - terms));
  if (row.term_stride == 1) {
    std::memcpy(to, row.data, static_cast<size_t>(terms));
  } else {
    for (int64_t term = 0; term < terms; ++term) to[term] = row.data[term * row.term_stride];
  }
  __m512i total = _mm512_setzero_si512();
  for (int64_t term = 0; term < terms; term += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(MaskOf(terms - term), to + term);
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
  }
  return static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(total)) << 7);
}

void StreamInt8(const uint32_t* left, int64_t left_stride, int rows, const Source& right,
                int64_t lanes, int64_t terms, int64_t sum_stride, Sum* sums) {
  static_assert(kStreamRows == 4 && kStreamTerms == 16, "one case per number of rows");
  const StreamRows few = {left, left_stride};
  switch (rows) {
    case 1:
      return StreamAll<1, 8>(Fours<8>(), few, right, lanes, terms, sum_stride, sums);
    case 2:
      return StreamAll<2, 8>(Fours<8>(), few, right, lanes, terms, sum_stride, sums);
    case 3:
      return StreamAll<3, 16>(Fours<16>(), few, right, lanes, terms, sum_stride, sums);
    default:
      return StreamAll<4, 16>(Fours<16>(), few, right, lanes, terms, sum_stride, sums);
  }
}

void SettleInt8(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile) {
  SettleTile<AddIntegers>(sums, rows, stride, parts, tile);
}

}  // namespace mpjax

#endif
