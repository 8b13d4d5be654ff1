// The product in groups in registers of 256 bits. A block says how the weight is decoded and multiplied:
//
//   Decode(bytes, to)      makes 32 bytes of the weight two registers, or the first of them
//   To(total, weight, row) adds products; where two groups may share a block, in each 128 bits those of
//                          one of its halves
//
// Compiled once for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_256_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_256_H_

#include "grouped_lanes_256.h"
#include "grouped_loops.h"
#include "int8_dot_avx2.h"

namespace mpjax {
namespace {

constexpr int64_t kBytesAhead = 4096;  // at least, that are fetched: the hardware stops at a page's end

// int4 is masked, and shifted and masked: the even of 64 terms and the odd ones, and rows are laid out
// like that. With their sign bits turned around the numbers are 8 more than they are.
struct Nibbles {
  static constexpr int kTerms = 64, kTermsPerByte = 2, kBias = 8, kMostParts = 2;
  static void Decode(__m256i bytes, __m256i (&to)[2]) {
    const __m256i mask = _mm256_set1_epi8(0xF);
    const __m256i turned = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x88)));
    to[0] = _mm256_and_si256(turned, mask);
    to[1] = _mm256_and_si256(_mm256_srli_epi16(turned, 4), mask);
  }
};

// `Rows` rows by four lanes and all groups.
template <typename Block, int Rows, int Parts>
void MultiplyFour(const uint8_t* const (&lanes)[4], int64_t ahead, const Groups& groups,
                  const uint8_t* rows, int64_t row_stride, int64_t all_rows, int32_t* sums) {
  const int64_t unit = Parts == 1 ? groups.terms : Block::kTerms;
  const int64_t blocks = (unit + Block::kTerms - 1) / Block::kTerms;
  const int64_t all = groups.count * groups.terms;
  for (int64_t g = 0; g < groups.count; g += Parts) {
    const int64_t first = g * groups.terms, last = first + unit < all ? first + unit : all;
    __m256i total[Rows][4];
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) total[row][lane] = Avx2::Zero();
    }
    for (int64_t block = 0, term = first; block < blocks; ++block, term += Block::kTerms) {
      const int64_t byte = term / Block::kTermsPerByte;
      const int64_t bytes = (last - term) / Block::kTermsPerByte;
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) {
        _mm_prefetch(reinterpret_cast<const char*>(lanes[lane] + ahead + byte), _MM_HINT_T1);
        __m256i weight[2];
        Block::Decode(LoadBytes(lanes[lane] + byte, bytes), weight);
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          total[row][lane] = Block::To(total[row][lane], weight, rows + row * row_stride);
        }
      }
      rows += Block::kTerms;
    }
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) {  // in each 128 bits the sums of four lanes
      const __m256i pairs = _mm256_hadd_epi32(total[row][0], total[row][1]);
      const __m256i fours = _mm256_hadd_epi32(pairs, _mm256_hadd_epi32(total[row][2], total[row][3]));
      const __m128i low = _mm256_castsi256_si128(fours), high = _mm256_extracti128_si256(fours, 1);
      __m128i* to = reinterpret_cast<__m128i*>(sums + (g * all_rows + row) * kWidth);
      _mm_storeu_si128(to, Parts == 1 ? _mm_add_epi32(low, high) : low);
      if (Parts == 2 && g + 1 < groups.count) {
        to = reinterpret_cast<__m128i*>(sums + ((g + 1) * all_rows + row) * kWidth);
        _mm_storeu_si128(to, high);
      }
    }
  }
}

template <typename Block>
void Multiply(const Weight& weight, int64_t lane, int lanes, int64_t term, const Groups& groups,
              const LaidOutRows& left, int32_t* sums) {
  const int64_t four = 4 * weight.stride / Block::kTermsPerByte;
  const int64_t ahead = (kBytesAhead / (four + 1) + 1) * four;
  for (int i = 0; i < lanes; i += 4) {
    const uint8_t* at[4];
    for (int j = 0; j < 4; ++j) {  // beyond the lanes, those before
      const int64_t entry = (lane + (i + j < lanes ? i + j : lanes - 1)) * weight.stride + term;
      at[j] = weight.data + entry / Block::kTermsPerByte;
    }
    for (int64_t row = 0; row < left.rows; row += 2) {
      const auto multiply = left.rows - row == 1
                                ? groups.parts == 1 ? MultiplyFour<Block, 1, 1> : MultiplyFour<Block, 1, 2>
                            : groups.parts == 1 ? MultiplyFour<Block, 2, 1>
                                                : MultiplyFour<Block, 2, 2>;
      multiply(at, ahead, groups, left.data + row * left.stride, left.stride, left.rows,
               sums + row * kWidth + i);
    }
  }
}

template <typename Int8Block, typename Int4Block>
constexpr GroupedKernels GroupedKernelsBy(const DotKernels& dot) {
  return {&dot,
          {Int8Block::kTerms, Int8Block::kMostParts, Int8Block::kBias, Multiply<Int8Block>},
          {Int4Block::kTerms, Int4Block::kMostParts, Int4Block::kBias, Multiply<Int4Block>},
          MultiplyLanes256<Int4Block>,
          nullptr,
          Unpack,
          Settle,
          WriteFloats};
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_256_H_
