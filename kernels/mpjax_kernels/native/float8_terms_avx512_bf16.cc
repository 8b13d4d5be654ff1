// Few rows of float8 by a matrix of float8 with the terms of both next to each other, on AVX512-BF16:
// 64 terms of a lane are looked up at once, in an order that is the same for both, and multiplied by
// `vdpbf16ps`.

#include "streams.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include "float8_tables.h"
#include "tile_avx512.h"

namespace mpjax {
namespace {

constexpr int kRowsAtOnce = 4, kColumnsAtOnce = 4;

// So many bytes ahead, at least, columns are fetched: the hardware stops at the end of a page.
constexpr int64_t kAhead = 8192;

struct Terms {
  __m512bh numbers[2];

  Terms() = default;
  Terms(const Float8Tables& tables, const uint8_t* at, __mmask64 mask) {
    __m512i low, high;
    tables.Decode(_mm512_maskz_loadu_epi8(mask, at), low, high);
    numbers[0] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(low, high));
    numbers[1] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(low, high));
  }
};

template <int Rows, int Columns>
void Multiply(const Source& left, const Source& right, int64_t terms, Sum* sums) {
  const Float8Tables of_rows(*left.table), of_columns(*right.table);
  const int64_t at_once = Columns * right.lane_stride;
  const uint8_t* ahead = right.data + (at_once == 0 ? 0 : (kAhead / at_once + 1) * at_once);
  __m512 total[Rows][Columns] = {};
  for (int64_t term = 0; term < terms; term += 64) {
    const __mmask64 mask = MaskOf(terms - term);
#pragma GCC unroll 4
    for (int column = 0; column < Columns; ++column) {
      const uint8_t* next = ahead + column * right.lane_stride + term;
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    }
    Terms x[Rows];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      x[row] = Terms(of_rows, left.data + row * left.lane_stride + term, mask);
    }
#pragma GCC unroll 4
    for (int column = 0; column < Columns; ++column) {
      const Terms weight(of_columns, right.data + column * right.lane_stride + term, mask);
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        __m512& to = total[row][column];
        to = _mm512_dpbf16_ps(to, x[row].numbers[0], weight.numbers[0]);
        to = _mm512_dpbf16_ps(to, x[row].numbers[1], weight.numbers[1]);
      }
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int column = 0; column < Columns; ++column) {
      sums[row * kWidth + column].real = _mm512_reduce_add_ps(total[row][column]);
    }
  }
}

template <int Columns>
void MultiplyColumns(const Source& left, int64_t rows, const Source& right, int64_t terms,
                     Sum* sums) {
  static_assert(kRowsAtOnce == 4, "one case per number of rows");
  const auto multiply = rows == 1   ? Multiply<1, Columns>
                        : rows == 2 ? Multiply<2, Columns>
                        : rows == 3 ? Multiply<3, Columns>
                                    : Multiply<4, Columns>;
  multiply(left, right, terms, sums);
}

}  // namespace

void MultiplyFloat8Terms(const Source& left, int64_t rows, Source right, int64_t columns,
                         int64_t terms, Sum* sums) {
  int64_t column = 0;
  for (; column + kColumnsAtOnce <= columns; column += kColumnsAtOnce) {
    MultiplyColumns<kColumnsAtOnce>(left, rows, right, terms, sums + column);
    right.data += kColumnsAtOnce * right.lane_stride;
  }
  for (; column < columns; ++column) {
    MultiplyColumns<1>(left, rows, right, terms, sums + column);
    right.data += right.lane_stride;
  }
}

int64_t Float8Rows(int64_t) { return kRowsAtOnce; }

}  // namespace mpjax

#endif
