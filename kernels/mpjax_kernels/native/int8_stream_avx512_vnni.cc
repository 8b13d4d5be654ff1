// Few rows of int8 by a matrix of int8 whose lanes lie next to each other, on AVX512-VNNI: four terms
// of 64 lanes are interleaved, so that `vpdpbusd` finds the four of a lane in 32 bits.

#if defined(__AVX512VNNI__)

#include "stream_avx512.h"

namespace mpjax {
namespace {

template <int Rows, int Terms>
struct Fours {
  static constexpr int kTermsPerStep = 4;

  template <typename Tile>
  static void Add(const Tile& tile, const uint16_t* left, __m512i (&total)[Rows][kTileRegisters]) {
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
      const int* rows = reinterpret_cast<const int*>(left) + four * kRows;
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const __m512i terms = _mm512_set1_epi32(rows[row]);
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

template <int Rows, int Terms>
void Multiply(const uint16_t* left, const Source& right, int64_t lanes, int64_t terms, int64_t stride,
              Sum* sums) {
  StreamRows<Fours<Rows, Terms>, Rows, Terms>(left, right, lanes, terms, stride, sums);
}

}  // namespace

void StreamInt8(const uint16_t* left, int rows, const Source& right, int64_t lanes, int64_t terms,
                int64_t stride, Sum* sums) {
  static_assert(kStreamRows == 4 && kStreamTerms == 16, "one case per number of rows");
  const auto multiply = rows == 1   ? Multiply<1, 8>
                        : rows == 2 ? Multiply<2, 8>
                        : rows == 3 ? Multiply<3, 16>
                                    : Multiply<4, 16>;
  multiply(left, right, lanes, terms, stride, sums);
}

void SettleInt8(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile) {
  SettleTile<AddIntegers>(sums, rows, stride, parts, tile);
}

}  // namespace mpjax

#endif
