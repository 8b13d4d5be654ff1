// The product of int8 matrices on AVX512-VNNI: `vpdpbusd` multiplies four unsigned bytes by four
// signed ones and adds the products to a sum of 32 bits, exactly.
//
// The right operand is the unsigned one: 128 more than it is, which is the same bits but for the
// sign. Sums are then too large by 128 times the sum of the row, which `Pack` finds. They may wrap
// around on the way; what is left after the subtraction is right.

#include "dot.h"

#if defined(__AVX512VNNI__)

#include <type_traits>

#include "streams.h"
#include "tile_avx512.h"

namespace mpjax {
namespace {

struct AddFours {
  static __m512i To(__m512i total, __m512i columns, __m512i row) {
    return _mm512_dpbusd_epi32(total, columns, row);
  }
};

inline __m512i Unsigned(__m512i bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}

// Of tiles, whose bytes are signed.
struct SignedColumns : Avx512 {
  static __m512i LoadColumns(const void* at) { return Unsigned(Load(at)); }
};

class Packer {
 public:
  explicit Packer(const Panels& to) : to_(to) {}

  void Take(__m512i bytes, int64_t four, int group) {
    if (!to_.is_left) return StoreStep(Unsigned(bytes), four, group, to_);
    total_[group] = _mm512_dpbusd_epi32(total_[group], _mm512_set1_epi8(1), bytes);
    StoreStep(bytes, four, group, to_);
  }

  void Finish(int lanes) const {
    for (int group = 0; to_.is_left && 16 * group < lanes; ++group) {
      _mm512_storeu_si512(to_.excess + 16 * group, _mm512_slli_epi32(total_[group], 7));
    }
  }

 private:
  const Panels to_;
  __m512i total_[kPackLanes / 16] = {};
};

void Pack(const Source& source, int lanes, int64_t terms, const Panels& to) {
  Packer packer(to);
  const auto pack = source.term_stride == 1 ? PackTermsFirst<Packer> : PackLanesFirst<Packer>;
  pack(source, lanes, terms, packer);
  packer.Finish(lanes);
}

// The sums of all 16 numbers of four registers.
inline __m128i AddUp(const __m512i (&of)[4]) {
  const __m512i first =
      _mm512_add_epi32(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
  const __m512i second =
      _mm512_add_epi32(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline int32_t ExcessOf(const uint8_t* row, int64_t terms) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i total[4] = {};  // each waits for itself
  int64_t term = 0;
  for (; term + 256 <= terms; term += 256) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      total[i] = _mm512_dpbusd_epi32(total[i], ones, _mm512_loadu_si512(row + term + 64 * i));
    }
  }
  for (; term < terms; term += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(MaskOf(terms - term), row + term);
    total[0] = _mm512_dpbusd_epi32(total[0], ones, bytes);
  }
  const __m512i all = _mm512_add_epi32(_mm512_add_epi32(total[0], total[1]),
                                       _mm512_add_epi32(total[2], total[3]));
  return static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(all)) << 7);
}

// `Rows` rows by `Columns` columns, one or four, 64 terms of each at a time; the sums of the columns are
// `apart`. If `Ahead`, the columns that follow are fetched meanwhile: the hardware stops at the end of a
// page.
template <int Rows, int Columns, bool Ahead>
void MultiplyLanes(const Source& left, const Source& right, int64_t terms, const int32_t* excess,
                   int64_t apart, Sum* sums) {
  __m512i total[Rows][4];
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < Columns; ++column) total[row][column] = _mm512_setzero_si512();
  }
  const auto add = [&](int64_t term, auto load) {
    __m512i columns[Columns];
#pragma GCC unroll 4
    for (int column = 0; column < Columns; ++column) {
      columns[column] = Unsigned(load(right.data + column * right.lane_stride + term));
    }
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      const __m512i bytes = load(left.data + row * left.lane_stride + term);
#pragma GCC unroll 4
      for (int column = 0; column < Columns; ++column) {
        total[row][column] = _mm512_dpbusd_epi32(total[row][column], columns[column], bytes);
      }
    }
  };
  const int64_t whole = terms / 64 * 64;
  for (int64_t term = 0; term < whole; term += 64) {
#pragma GCC unroll 4
    for (int column = 0; Ahead && column < Columns; ++column) {
      const uint8_t* next = right.data + (Columns + column) * right.lane_stride + term;
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    }
    add(term, [](const uint8_t* at) { return _mm512_loadu_si512(at); });
  }
  if (whole < terms) {
    const __mmask64 mask = MaskOf(terms - whole);
    add(whole, [mask](const uint8_t* at) { return _mm512_maskz_loadu_epi8(mask, at); });
  }
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
    Sum* to = sums + row * kWidth;
    if (Columns == 4) {
      alignas(16) int32_t found[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(found),
                      _mm_sub_epi32(AddUp(total[row]), _mm_set1_epi32(excess[row])));
      for (int column = 0; column < 4; ++column) to[column * apart].integer = found[column];
    } else {
      const __m128i most = _mm_cvtsi32_si128(_mm512_reduce_add_epi32(total[row][0]));
      to->integer = _mm_cvtsi128_si32(_mm_sub_epi32(most, _mm_cvtsi32_si128(excess[row])));
    }
  }
}

template <int Columns>
void MultiplyColumns(Source left, int64_t rows, const Source& right, int64_t terms,
                     const int32_t* excess, Sum* sums) {
  const auto multiply_four = [&](auto ahead, int64_t row) {
    constexpr bool kAhead = decltype(ahead)::value;
    const auto multiply = rows - row == 1   ? MultiplyLanes<1, Columns, kAhead>
                          : rows - row == 2 ? MultiplyLanes<2, Columns, kAhead>
                          : rows - row == 3 ? MultiplyLanes<3, Columns, kAhead>
                                            : MultiplyLanes<4, Columns, kAhead>;
    multiply(left, right, terms, excess + row, 1, sums + row * kWidth);
    left.data += 4 * left.lane_stride;
  };
  multiply_four(std::true_type(), 0);
  for (int64_t row = 4; row < rows; row += 4) multiply_four(std::false_type(), row);
}

// Up to three rows by columns in four streams, which the hardware fetches ahead on its own: columns far from
// each other, so that the next of a stream follows in memory. Returns how many columns that are.
template <int Rows>
int64_t MultiplyStreams(const Source& left, Source right, int64_t columns, int64_t terms,
                        const int32_t* excess, Sum* sums) {
  const int64_t apart = columns / 4, next = right.lane_stride;
  right.lane_stride *= apart;
  for (int64_t column = 0; column < apart; ++column, right.data += next) {
    MultiplyLanes<Rows, 4, false>(left, right, terms, excess, apart, sums + column);
  }
  return 4 * apart;
}

void MultiplyUnpacked(const Source& left, int64_t rows, Source right, int64_t columns,
                      int64_t terms, Sum* sums) {
  int32_t excess[kFewRows];
  for (int64_t row = 0; row < rows; ++row) {
    excess[row] = ExcessOf(left.data + row * left.lane_stride, terms);
  }
  int64_t column = 0;
  if (rows <= 3) {
    const auto multiply = rows == 1   ? MultiplyStreams<1>
                          : rows == 2 ? MultiplyStreams<2>
                                      : MultiplyStreams<3>;
    column = multiply(left, right, columns, terms, excess, sums);
    right.data += column * right.lane_stride;
  }
  for (; column + 4 <= columns; column += 4) {
    MultiplyColumns<4>(left, rows, right, terms, excess, sums + column);
    right.data += 4 * right.lane_stride;
  }
  for (; column < columns; ++column) {
    MultiplyColumns<1>(left, rows, right, terms, excess, sums + column);
    right.data += right.lane_stride;
  }
}

// Panels side by side: a row is loaded once for all of them, and they are read in as many streams, which
// the hardware fetches ahead on its own; that is faster than one stream which software fetches.
template <int Rows>
void MultiplyTilePanels(LeftRows left, const uint16_t* right, int64_t panel_stride, int panels,
                        int64_t steps, Sum* sums) {
  constexpr decltype(&MultiplyPanels<SignedColumns, AddFours, Rows, 1, LeftRows>) kOf[] = {
      MultiplyPanels<SignedColumns, AddFours, Rows, 1>, MultiplyPanels<SignedColumns, AddFours, Rows, 2>,
      MultiplyPanels<SignedColumns, AddFours, Rows, 3>, MultiplyPanels<SignedColumns, AddFours, Rows, 4>};
  kOf[panels - 1](left, right, panel_stride, steps, false, sums);
}

void MultiplyTileRows(const uint32_t* left, int64_t left_stride, int rows, const uint16_t* right,
                      int64_t panel_stride, int panels, int64_t steps, Sum* sums) {
  constexpr decltype(&MultiplyTilePanels<1>) kOf[kTileRowsAtOnce] = {
      MultiplyTilePanels<1>, MultiplyTilePanels<2>, MultiplyTilePanels<3>,
      MultiplyTilePanels<4>, MultiplyTilePanels<5>, MultiplyTilePanels<6>};
  kOf[rows - 1]({left, left_stride}, right, panel_stride, panels, steps, sums);
}

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target, [&](int64_t row, const Sum* at) {
    const int32_t excess = target.excess == nullptr ? 0 : target.excess[row];
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(at), _mm512_set1_epi32(excess)));
  });
}

}  // namespace

const DotKernels kAvx512Int8Dot = {4, Pack, MultiplyTile<AddFours>, MultiplyUnpacked, Write,
                                   LayOutInt8, StreamInt8, SettleInt8, UnpackedInt8Rows,
                                   MultiplyTile<AddFours, SignedColumns>, MultiplyTileRows};

}  // namespace mpjax

#endif
