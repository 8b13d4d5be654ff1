// The product in groups on AVX512-VNNI: `vpdpbusd` multiplies four unsigned bytes by four signed ones
// and adds the products to a sum of 32 bits, exactly. The weight is the unsigned one: int4 with its sign
// bit turned around is 8 more than it is, and int8 is 128 more.
//
// A register of int4 is masked, and shifted and masked, and so holds the even of 128 terms and the odd
// ones: rows are laid out like that, and nothing is unpacked.

#include "grouped.h"

#if defined(__AVX512VNNI__)

#include "grouped_lanes.h"
#include "grouped_loops.h"
#include "nibbles_avx512.h"
#include "tile_avx512.h"

namespace mpjax {
namespace {

constexpr int64_t kBytesAhead = 4096;  // at least, that are fetched: the hardware stops at a page's end

// The products of a block are at most 15 * 128, and eight of them make a sum in a register.
struct Int4Block {
  static constexpr int kTerms = 128, kVectors = 2, kTermsPerByte = 2;
  static constexpr bool kSmall = true;
  static void Decode(__m512i bytes, __m512i (&to)[kVectors]) {
    to[0] = UnsignedNibbles(bytes);
    to[1] = UnsignedNibbles(_mm512_srli_epi16(bytes, 4));
  }
};

struct Int8Block {
  static constexpr int kTerms = 64, kVectors = 1, kTermsPerByte = 1;
  static constexpr bool kSmall = false;
  static void Decode(__m512i bytes, __m512i (&to)[kVectors]) {
    to[0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};

// The sums of four lanes, in each 128 bits those of as many of the numbers of four registers. Small
// numbers are those of 16 bits of which sums of two are too: packed, and multiplied by one (`vpmaddwd`).
template <bool Small>
inline __m512i AddUpFours(const __m512i (&of)[4]) {
  if (Small) {
    const auto add = [](__m512i a, __m512i b) {
      return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
    };
    return add(add(of[0], of[1]), add(of[2], of[3]));
  }
  const __m512i first =
      _mm512_add_epi32(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
  const __m512i second =
      _mm512_add_epi32(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second),
                          _mm512_unpackhi_epi64(first, second));
}

// Stores them for each of the groups that share a block, as far as these exist.
template <int Parts>
void Store(__m512i fours, int64_t groups, int64_t stride, int32_t* sums) {
  const auto store = [&](int part, __m128i lanes) {
    if (part < groups) _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + part * stride), lanes);
  };
  if (Parts == 4) {
    store(0, _mm512_castsi512_si128(fours));
    store(1, _mm512_extracti32x4_epi32(fours, 1));
    store(2, _mm512_extracti32x4_epi32(fours, 2));
    store(3, _mm512_extracti32x4_epi32(fours, 3));
    return;
  }
  const __m256i low = _mm512_castsi512_si256(fours), high = _mm512_extracti64x4_epi64(fours, 1);
  const auto add = [](__m256i of) {
    return _mm_add_epi32(_mm256_castsi256_si128(of), _mm256_extracti128_si256(of, 1));
  };
  if (Parts == 1) return store(0, add(_mm256_add_epi32(low, high)));
  store(0, add(low));
  store(1, add(high));
}

// Adds the products of a block of `Rows` rows and four lanes, which `load(lane)` loads.
template <typename Block, int Rows, typename Load>
inline void AddBlock(const Load& load, const uint8_t* rows, int64_t stride, __m512i (&total)[Rows][4]) {
  __m512i weight[4][Block::kVectors];
#pragma GCC unroll 4
  for (int lane = 0; lane < 4; ++lane) Block::Decode(load(lane), weight[lane]);
#pragma GCC unroll 2
  for (int v = 0; v < Block::kVectors; ++v) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      const __m512i x = _mm512_loadu_si512(rows + row * stride + 64 * v);
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) {
        total[row][lane] = _mm512_dpbusd_epi32(total[row][lane], weight[lane][v], x);
      }
    }
  }
}

// `Rows` rows by four lanes and all groups. `Single` says that none is more than a block.
template <typename Block, int Rows, int Parts, bool Single>
void MultiplyFour(const uint8_t* const (&lanes)[4], int64_t ahead, const Groups& groups,
                  const LaidOutRows& left, int32_t* sums) {
  constexpr bool kSmall = Single && Block::kSmall;
  const uint8_t* const first[4] = {lanes[0], lanes[1], lanes[2], lanes[3]};
  const int64_t count = groups.count, all = count * groups.terms / Block::kTermsPerByte;
  const int64_t unit = Parts == 1 ? groups.terms / Block::kTermsPerByte : 64;
  const int64_t stride = left.stride;
  const uint8_t* rows = left.data;
  for (int64_t g = 0, byte = 0; g < count; g += Parts, sums += Parts * Rows * kWidth) {
    const int64_t last = byte + unit < all ? byte + unit : all;
    __m512i total[Rows][4];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) total[row][lane] = _mm512_setzero_si512();
    }
    const auto load = [&](int lane) {
      _mm_prefetch(reinterpret_cast<const char*>(first[lane] + ahead + byte), _MM_HINT_T1);
      return _mm512_loadu_si512(first[lane] + byte);
    };
    while (byte + 64 <= last) {
      AddBlock<Block, Rows>(load, rows, stride, total);
      byte += 64;
      rows += Block::kTerms;
      if (Single) break;
    }
    if (byte < last) {
      const __mmask64 mask = MaskOf(last - byte);
      const auto load_some = [&](int lane) {
        return _mm512_maskz_loadu_epi8(mask, first[lane] + byte);
      };
      AddBlock<Block, Rows>(load_some, rows, stride, total);
      byte = last;
      rows += Block::kTerms;
    }
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      Store<Parts>(AddUpFours<kSmall>(total[row]), count - g, Rows * kWidth, sums + row * kWidth);
    }
  }
}

template <typename Block, int Rows>
void MultiplyFours(const Weight& weight, int64_t lane, int lanes, int64_t term, const Groups& groups,
                  const LaidOutRows& left, int32_t* sums) {
  const auto multiply = groups.parts == 2               ? MultiplyFour<Block, Rows, 2, true>
                        : groups.parts == 4             ? MultiplyFour<Block, Rows, 4, true>
                        : groups.terms <= Block::kTerms ? MultiplyFour<Block, Rows, 1, true>
                                                        : MultiplyFour<Block, Rows, 1, false>;
  const int64_t four = 4 * weight.stride / Block::kTermsPerByte;
  const int64_t ahead = (kBytesAhead / (four + 1) + 1) * four;
  for (int i = 0; i < lanes; i += 4) {
    const uint8_t* at[4];
    for (int j = 0; j < 4; ++j) {  // beyond the lanes, those before
      const int64_t entry = (lane + (i + j < lanes ? i + j : lanes - 1)) * weight.stride + term;
      at[j] = weight.data + entry / Block::kTermsPerByte;
    }
    multiply(at, ahead, groups, left, sums + i);
  }
}

template <typename Block>
void Multiply(const Weight& weight, int64_t lane, int lanes, int64_t term, const Groups& groups,
              const LaidOutRows& left, int32_t* sums) {
  const decltype(&MultiplyFours<Block, 1>) of_rows[] = {
      MultiplyFours<Block, 1>, MultiplyFours<Block, 2>, MultiplyFours<Block, 3>,
      MultiplyFours<Block, 4>};
  of_rows[left.rows - 1](weight, lane, lanes, term, groups, left, sums);
}

constexpr int kPackAhead = 256;  // bytes of a lane, a page of which may be another's

// 128 terms of 16 lanes at a time, turned in numbers of 32 bits, which are eight terms.
void PackEights(const uint8_t* data, int64_t stride, int lanes, int64_t terms, const Panels& to) {
  for (int group = 0; 16 * group < lanes; ++group) {
    for (int64_t start = 0; start < terms; start += 128) {
      const __mmask64 mask = MaskOf((terms - start) / 2);
      __m512i rows[16];
      for (int lane = 0; lane < 16; ++lane) {
        const bool exists = 16 * group + lane < lanes;
        const uint8_t* at = data + (16 * group + lane) * stride + start / 2;
        rows[lane] = exists ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_setzero_si512();
        _mm_prefetch(reinterpret_cast<const char*>(at + kPackAhead), _MM_HINT_T0);
      }
      Transpose(rows);
      const auto store = [&](int eight) {
        const int64_t step = start / 4 + 2 * eight;
        StoreStep(UnsignedNibbles(rows[eight]), step, group, to);
        StoreStep(UnsignedNibbles(_mm512_srli_epi16(rows[eight], 4)), step + 1, group, to);
      };
      if (terms - start >= 128) {
#pragma GCC unroll 16
        for (int eight = 0; eight < 16; ++eight) store(eight);
      } else {
        for (int eight = 0; 8 * eight < terms - start; ++eight) store(eight);
      }
    }
  }
}

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target,
            [](int64_t, const Sum* at) { return _mm512_loadu_ps(at); });
}

}  // namespace

const GroupedKernels kAvx512Grouped = {&kAvx512Int8Dot,
                                       {Int8Block::kTerms, 4, 128, Multiply<Int8Block>},
                                       {Int4Block::kTerms, 4, 8, Multiply<Int4Block>},
                                       MultiplyLanesAvx512, PackEights, Unpack, Settle, Write};

}  // namespace mpjax

#endif
