// The product of int8 matrices on AVX512-VNNI: `vpdpbusd` multiplies four unsigned bytes by four
// signed ones and adds the products to a sum of 32 bits, exactly.
//
// The right operand is the unsigned one: 128 more than it is, which is the same bits but for the
// sign. Sums are then too large by 128 times the sum of the row, which `Pack` finds. They may wrap
// around on the way; what is left after the subtraction is right.

#include "dot.h"

#if defined(__AVX512VNNI__)

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

inline __mmask64 MaskOf(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Takes the steps of 16 lanes one by one: stores them, and adds up the left operand's terms.
class Packer {
 public:
  Packer(uint16_t* first, uint16_t* second) : first_(first), second_(second) {}

  void Step(__m512i lanes, int64_t step) {
    if (second_ == nullptr) return StoreStep(Unsigned(lanes), step, first_, nullptr);
    total_ = _mm512_dpbusd_epi32(total_, _mm512_set1_epi8(1), lanes);
    StoreStep(lanes, step, first_, second_);
  }

  void Finish(int32_t* excess) const {
    if (second_ != nullptr) _mm512_storeu_si512(excess, _mm512_slli_epi32(total_, 7));
  }

 private:
  uint16_t* first_;
  uint16_t* second_;
  __m512i total_ = _mm512_setzero_si512();
};

// Terms next to each other: 64 terms of 16 lanes at a time, in groups of four, exchanged.
void PackTermsFirst(const Source& source, int lanes, int64_t terms, Packer& packer) {
  for (int64_t start = 0; start < terms; start += 64) {
    const __mmask64 mask = MaskOf(terms - start);
    __m512i rows[16];
    for (int lane = 0; lane < 16; ++lane) {
      const uint8_t* at = source.data + lane * source.lane_stride + start;
      rows[lane] = lane < lanes ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_setzero_si512();
    }
    Transpose(rows);
    if (terms - start >= 64) {
#pragma GCC unroll 16
      for (int step = 0; step < 16; ++step) packer.Step(rows[step], start / 4 + step);
    } else {
      const int steps = static_cast<int>((terms - start + 3) / 4);
      for (int step = 0; step < steps; ++step) packer.Step(rows[step], start / 4 + step);
    }
  }
}

// Lanes next to each other: four terms of 16 lanes at a time, [term][lane] to [lane][term]. First
// each four lanes' bytes are brought together, then turned.
void PackLanesFirst(const Source& source, int lanes, int64_t terms, Packer& packer) {
  const __mmask16 mask = static_cast<__mmask16>((1u << lanes) - 1);
  const __m512i fours =
      _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i turn = _mm512_broadcast_i32x4(
      _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
  for (int64_t term = 0; term < terms; term += 4) {
    __m128i rows[4];
    for (int t = 0; t < 4; ++t) {
      const uint8_t* at = source.data + (term + t) * source.term_stride;
      rows[t] = term + t < terms ? _mm_maskz_loadu_epi8(mask, at) : _mm_setzero_si128();
    }
    __m512i bytes = _mm512_castsi128_si512(rows[0]);
    bytes = _mm512_inserti32x4(bytes, rows[1], 1);
    bytes = _mm512_inserti32x4(bytes, rows[2], 2);
    bytes = _mm512_inserti32x4(bytes, rows[3], 3);
    bytes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, bytes), turn);
    packer.Step(bytes, term / 4);
  }
}

void Pack(const Source& source, int lanes, int64_t terms, uint16_t* first, uint16_t* second,
          int32_t* excess) {
  Packer packer(first, second);
  const auto pack = source.term_stride == 1 ? PackTermsFirst : PackLanesFirst;
  pack(source, lanes, terms, packer);
  packer.Finish(excess);
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
  __m512i total = _mm512_setzero_si512();
  for (int64_t term = 0; term < terms; term += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(MaskOf(terms - term), row + term);
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
  }
  return static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(total)) << 7);
}

// `Rows` rows by `Columns` columns, one or four, 64 terms of each at a time.
template <int Rows, int Columns>
void MultiplyLanes(const Source& left, const Source& right, int64_t terms, const int32_t* excess,
                   Sum* sums) {
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
      const __m128i found = _mm_sub_epi32(AddUp(total[row]), _mm_set1_epi32(excess[row]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), found);
    } else {
      const __m128i most = _mm_cvtsi32_si128(_mm512_reduce_add_epi32(total[row][0]));
      to->integer = _mm_cvtsi128_si32(_mm_sub_epi32(most, _mm_cvtsi32_si128(excess[row])));
    }
  }
}

template <int Columns>
void MultiplyColumns(Source left, int64_t rows, const Source& right, int64_t terms,
                     const int32_t* excess, Sum* sums) {
  for (int64_t row = 0; row < rows; row += 4) {
    const auto multiply = rows - row == 1   ? MultiplyLanes<1, Columns>
                          : rows - row == 2 ? MultiplyLanes<2, Columns>
                          : rows - row == 3 ? MultiplyLanes<3, Columns>
                                            : MultiplyLanes<4, Columns>;
    multiply(left, right, terms, excess + row, sums + row * kWidth);
    left.data += 4 * left.lane_stride;
  }
}

void MultiplyUnpacked(const Source& left, int64_t rows, Source right, int64_t columns,
                      int64_t terms, Sum* sums) {
  int32_t excess[kFewRows];
  for (int64_t row = 0; row < rows; ++row) {
    excess[row] = ExcessOf(left.data + row * left.lane_stride, terms);
  }
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    MultiplyColumns<4>(left, rows, right, terms, excess, sums + column);
    right.data += 4 * right.lane_stride;
  }
  for (; column < columns; ++column) {
    MultiplyColumns<1>(left, rows, right, terms, excess, sums + column);
    right.data += right.lane_stride;
  }
}

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target, [&](int64_t row, const Sum* at) {
    const int32_t excess = target.excess == nullptr ? 0 : target.excess[row];
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(at), _mm512_set1_epi32(excess)));
  });
}

}  // namespace

const DotKernels kAvx512Int8Dot = {4, Pack, MultiplyTile<AddFours>, MultiplyUnpacked, Write};

}  // namespace mpjax

#endif
