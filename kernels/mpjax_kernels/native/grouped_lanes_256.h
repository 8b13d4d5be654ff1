// Rows of int8 by int4 whose lanes lie next to each other, in registers of 256 bits; as in
// `grouped_lanes_avx512_vnni.cc`, but that 64 lanes are multiplied at a time. `Int4::Add` adds the products
// of unsigned bytes and signed ones. Compiled once for each instruction set, so all is in an unnamed
// namespace.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_LANES_256_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_LANES_256_H_

#include "grouped.h"
#include "tile_avx2.h"

namespace mpjax {
namespace {

constexpr int kLaneRunTerms = 16;        // that are added before the sums are stored
constexpr int64_t kLaneLinesAhead = 24;  // of memory, that are fetched

// So many terms of 64 lanes of a weight, or of as many as there are.
struct LaneTile {
  const uint8_t* data;
  int64_t stride;
  int terms;
  int64_t lanes;

  __m256i Load(const uint8_t* at, int term) const {
    return term < terms ? LoadBytes(at, lanes / 2) : Avx2::Zero();
  }
};

// `Rows` rows by the lower or the upper 8 of each 16 bytes of a tile. The sums of a row and a tile are in
// registers of their own order: two, of even and of odd lanes, for 4 of each 16 bytes.
template <typename Int4, int Rows, int Half>
void AddLanes(const LaneTile& tile, const uint8_t* left, int64_t left_stride, bool add, int32_t* sums) {
  __m256i total[Rows][4];
  for (int row = 0; row < Rows; ++row) {
    for (int i = 0; i < 4; ++i) {
      const int32_t* at = sums + row * kWidth + 32 * Half + 8 * i;
      total[row][i] = add ? Avx2::Load(at) : Avx2::Zero();
    }
  }
  const auto interleave = [](__m256i a, __m256i b) {
    return Half == 0 ? _mm256_unpacklo_epi8(a, b) : _mm256_unpackhi_epi8(a, b);
  };
  const uint8_t* at = tile.data;
  for (int term = 0; term < tile.terms; term += 4, at += 4 * tile.stride) {
    if (Half == 0) {
      for (int t = 0; t < 4; ++t) {
        const uint8_t* ahead = at + (kLaneLinesAhead + t) * tile.stride;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      }
    }
    const __m256i first =
        interleave(tile.Load(at, term), tile.Load(at + tile.stride, term + 1));
    const __m256i second = interleave(tile.Load(at + 2 * tile.stride, term + 2),
                                      tile.Load(at + 3 * tile.stride, term + 3));
    __m256i weight[2][2];
    Int4::Decode(_mm256_unpacklo_epi16(first, second), weight[0]);
    Int4::Decode(_mm256_unpackhi_epi16(first, second), weight[1]);
    for (int row = 0; row < Rows; ++row) {
      int four;
      std::memcpy(&four, left + row * left_stride + term, sizeof(four));
      const __m256i x = _mm256_set1_epi32(four);
      for (int i = 0; i < 4; ++i) {
        total[row][i] = Int4::Add(total[row][i], weight[i / 2][i % 2], x);
      }
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int i = 0; i < 4; ++i) Avx2::Store(sums + row * kWidth + 32 * Half + 8 * i, total[row][i]);
  }
}

// Brings the sums of a row and a tile in the order of lanes.
inline void OrderLanes(int32_t* sums) {
  __m256i lanes[8];
  for (int i = 0; i < 4; ++i) {
    const __m256i even = Avx2::Load(sums + 16 * i), odd = Avx2::Load(sums + 16 * i + 8);
    const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
    lanes[i] = _mm256_permute2x128_si256(low, high, 0x20);
    lanes[4 + i] = _mm256_permute2x128_si256(low, high, 0x31);
  }
  for (int i = 0; i < 8; ++i) Avx2::Store(sums + 8 * i, lanes[i]);
}

template <typename Int4>
void MultiplyLanes256(const Weight& weight, int64_t lane, int64_t lanes, int64_t term, int64_t terms,
                      const LaidOutRows& left, int32_t* sums) {
  const int64_t line = weight.stride / 2;
  const uint8_t* data = weight.data + term * line + lane / 2;
  for (int64_t t = 0; t < terms; t += kLaneRunTerms, data += kLaneRunTerms * line) {
    const int here = static_cast<int>(terms - t < kLaneRunTerms ? terms - t : kLaneRunTerms);
    for (int64_t i = 0; i < lanes; i += kWidth) {
      const LaneTile tile = {data + i / 2, line, here, lanes - i};
      for (int64_t row = 0; row < left.rows; row += 2) {
        const bool alone = left.rows - row == 1;
        const uint8_t* rows = left.data + row * left.stride + t;
        int32_t* to = sums + i * left.rows + row * kWidth;
        const auto first = alone ? AddLanes<Int4, 1, 0> : AddLanes<Int4, 2, 0>;
        const auto second = alone ? AddLanes<Int4, 1, 1> : AddLanes<Int4, 2, 1>;
        first(tile, rows, left.stride, t > 0, to);
        second(tile, rows, left.stride, t > 0, to);
      }
    }
  }
  for (int64_t i = 0; i < (lanes + kWidth - 1) / kWidth * left.rows; ++i) OrderLanes(sums + i * kWidth);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_LANES_256_H_
