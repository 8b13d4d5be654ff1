// Few rows of float8 by a matrix of float8 whose lanes lie next to each other, on AVX512-BF16: two
// terms of 64 lanes are looked up in tables of the upper and of the lower byte (`vpermi2b`), and
// interleaved, so that `vdpbf16ps` finds the two of a lane in 32 bits.

#include "streams.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include <cstring>

#include "float8_tables.h"
#include "stream_avx512.h"

namespace mpjax {
namespace {

template <int Terms>
class Pairs {
 public:
  static constexpr int kTermsPerStep = 2;

  explicit Pairs(const DecodeTable& table) : tables_(table) {}

  template <typename Tile, int Rows>
  void Add(const Tile& tile, const StreamRows& rows,
           __m512i (&total)[Rows][kTileRegisters]) const {
#pragma GCC unroll 8
    for (int pair = 0; pair < Terms / 2; ++pair) {
      // Sixteen bits of each lane, of the lower and of the upper eight of every 16, of both terms.
      __m512i lower[2], upper[2];
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        __m512i low, high;
        tables_.Decode(tile.Load(2 * pair + t), low, high);
        lower[t] = _mm512_unpacklo_epi8(low, high);
        upper[t] = _mm512_unpackhi_epi8(low, high);
      }
      const __m512i lanes[kTileRegisters] = {
          _mm512_unpacklo_epi16(lower[0], lower[1]), _mm512_unpackhi_epi16(lower[0], lower[1]),
          _mm512_unpacklo_epi16(upper[0], upper[1]), _mm512_unpackhi_epi16(upper[0], upper[1])};
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const __m512i terms = rows.Broadcast(row, pair);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRegisters; ++i) {
          total[row][i] = _mm512_castps_si512(_mm512_dpbf16_ps(
              _mm512_castsi512_ps(total[row][i]), reinterpret_cast<__m512bh>(terms),
              reinterpret_cast<__m512bh>(lanes[i])));
        }
      }
    }
  }

 private:
  const Float8Tables tables_;
};

struct AddParts {
  static __m512i To(__m512i total, __m512i part) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(total), _mm512_castsi512_ps(part)));
  }
};

}  // namespace

int32_t LayOutFloat8(const Source& row, int64_t terms, uint32_t* steps) {
  uint8_t* to = reinterpret_cast<uint8_t*>(steps);
  const int64_t padded = (terms + kStreamTerms - 1) / kStreamTerms * kStreamTerms;
  std::memset(to + 2 * terms, 0, static_cast<size_t>(2 * (padded - terms)));
  const Float8Tables tables(*row.table);
  for (int64_t term = 0; term < terms; term += 64) {
    const int64_t count = terms - term < 64 ? terms - term : 64;
    alignas(64) uint8_t bytes[64] = {}, lower[64], upper[64];
    for (int64_t i = 0; i < count; ++i) bytes[i] = row.data[(term + i) * row.term_stride];
    __m512i low, high;
    tables.Decode(_mm512_load_si512(bytes), low, high);
    _mm512_store_si512(lower, low);
    _mm512_store_si512(upper, high);
    for (int64_t i = 0; i < count; ++i) {
      to[2 * (term + i)] = lower[i];
      to[2 * (term + i) + 1] = upper[i];
    }
  }
  return 0;
}

void StreamFloat8(const uint32_t* left, int64_t left_stride, int rows, const Source& right,
                  int64_t lanes, int64_t terms, int64_t sum_stride, Sum* sums) {
  static_assert(kStreamRows == 4 && kStreamTerms == 16, "one case per number of rows");
  const StreamRows few = {left, left_stride};
  const Pairs<8> eight(*right.table);
  const Pairs<16> sixteen(*right.table);
  switch (rows) {
    case 1:
      return StreamAll<1, 8>(eight, few, right, lanes, terms, sum_stride, sums);
    case 2:
      return StreamAll<2, 8>(eight, few, right, lanes, terms, sum_stride, sums);
    case 3:
      return StreamAll<3, 16>(sixteen, few, right, lanes, terms, sum_stride, sums);
    default:
      return StreamAll<4, 16>(sixteen, few, right, lanes, terms, sum_stride, sums);
  }
}

void SettleFloat8(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile) {
  SettleTile<AddParts>(sums, rows, stride, parts, tile);
}

}  // namespace mpjax

#endif
