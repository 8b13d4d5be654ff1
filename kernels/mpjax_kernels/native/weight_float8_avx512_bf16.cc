// The product of an array by a weight of float8 on AVX512-BF16 and AVX512-VBMI. The weight is decoded
// to bfloat16, which holds it exactly: a bfloat16 array is multiplied by `vdpbf16ps`, one of float32 in
// float32, whose upper halves those numbers are.
//
// A few rows are multiplied by 64 bytes of the weight at a time, as they are decoded in registers.

#include "weight.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include <type_traits>

#include "float8_avx512.h"
#include "weight_avx512.h"
#include "weight_terms_avx512.h"

namespace mpjax {
namespace {

constexpr int kAhead = 24;  // terms: the hardware stops at the end of a page

template <bool Pairs>
using Add = std::conditional_t<Pairs, AddPairs, AddFloats>;

template <bool Pairs>
class Float8Packer {
 public:
  static constexpr bool kPairs = Pairs;

  Float8Packer(const Weight& weight, const Run&, const Panels& to)
      : decoder_(*weight.table), to_(to) {}

  void Take(__m512i bytes, int64_t four, int group) {
    __m512i pairs[2];
    decoder_.Decode(bytes, pairs[0], pairs[1]);
    for (int p = 0; p < 2; ++p) {
      if (Pairs) {
        StoreStep(pairs[p], 2 * four + p, group, to_);
      } else {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
        StoreStep(_mm512_slli_epi32(pairs[p], 16), 4 * four + 2 * p, group, to_);
        StoreStep(_mm512_and_si512(pairs[p], upper), 4 * four + 2 * p + 1, group, to_);
      }
    }
  }

 private:
  const Decoder decoder_;
  const Panels to_;
};

// 64 bytes as four registers: of pairs of neighbours in the first two, or of float32 in all. The b-th
// 128 bits of the q-th are of the bytes 16 b + 8 q or 16 b + 4 q and on.
template <bool Pairs>
inline void DecodeAll(const Decoder& decoder, __m512i bytes, __m512i (&to)[4]) {
  if (Pairs) return decoder.DecodeHalves(bytes, to[0], to[1]);
  __m512i halves[2];
  decoder.DecodeHalves(bytes, halves[0], halves[1]);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    to[2 * half] = _mm512_unpacklo_epi16(_mm512_setzero_si512(), halves[half]);
    to[2 * half + 1] = _mm512_unpackhi_epi16(_mm512_setzero_si512(), halves[half]);
  }
}

// `Rows` rows by `Chunks` times 64 lanes that lie next to each other. Pairs of terms are bytes of two
// rows of the weight, interleaved.
template <bool Pairs, int Rows, int Chunks>
void MultiplyLanes(const Weight& weight, const Run& run, const uint32_t* left, int64_t left_stride,
                   float* sums) {
  const Decoder decoder(*weight.table);
  const uint8_t* data = weight.data + run.term * weight.stride + run.lane;
  __m512i total[Rows][Chunks][4] = {};
  for (int term = 0; term < run.terms; term += Pairs ? 2 : 1) {
    const uint8_t* at = data + term * weight.stride;
    const char* ahead = reinterpret_cast<const char*>(at + kAhead * weight.stride);
    const bool is_pair = term + 1 < run.terms;
    const uint32_t* x = left + (Pairs ? term / 2 : term);
#pragma GCC unroll 4
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      _mm_prefetch(ahead + 64 * chunk, _MM_HINT_T1);
      if (Pairs) _mm_prefetch(ahead + 64 * chunk + weight.stride, _MM_HINT_T1);
      const __m512i first = _mm512_loadu_si512(at + 64 * chunk);
      __m512i numbers[4];
      if (Pairs) {
        const __m512i second =
            is_pair ? _mm512_loadu_si512(at + weight.stride + 64 * chunk) : _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi8(first, second);
        const __m512i high = _mm512_unpackhi_epi8(first, second);
        decoder.DecodeHalves(low, numbers[0], numbers[1]);
        decoder.DecodeHalves(high, numbers[2], numbers[3]);
      } else {
        DecodeAll<Pairs>(decoder, first, numbers);
      }
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const __m512i terms = _mm512_set1_epi32(static_cast<int>(x[row * left_stride]));
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          __m512i& to = total[row][chunk][q];
          to = Add<Pairs>::To(to, numbers[q], terms);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int chunk = 0; chunk < Chunks; ++chunk) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      float* to = sums + (chunk * Rows + row) * kWidth;
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {  // 16 b + 4 q
        const __m512i lanes = total[row][chunk][q];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * q), _mm512_castsi512_si128(lanes));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 + 4 * q),
                         _mm512_extracti32x4_epi32(lanes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32 + 4 * q),
                         _mm512_extracti32x4_epi32(lanes, 2));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 48 + 4 * q),
                         _mm512_extracti32x4_epi32(lanes, 3));
      }
    }
  }
}

// Bytes in an order that leaves what `DecodeAll` makes of them in theirs.
template <bool Pairs>
inline __m512i InOrder(__m512i bytes) {
  if (Pairs) return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}

// `Rows` rows by four lanes, whose terms lie next to each other; 64 terms at a time.
template <bool Pairs, int Rows>
void MultiplyFourLanesOfTerms(const Decoder& decoder, const uint8_t* lanes, int64_t stride,
                              int terms, const uint32_t* left, int64_t left_stride, float* sums) {
  constexpr int kParts = Pairs ? 2 : 4;  // registers of 64 terms
  __m512i total[Rows][4] = {};
  const auto add = [&](int64_t term, int64_t count) {
    const __mmask64 mask = MaskOf(count);
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane) {
      const uint8_t* at = lanes + lane * stride + term;
      _mm_prefetch(reinterpret_cast<const char*>(at + 4 * stride), _MM_HINT_T0);
      __m512i numbers[4];
      DecodeAll<Pairs>(decoder, InOrder<Pairs>(_mm512_maskz_loadu_epi8(mask, at)), numbers);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const int64_t steps = (Pairs ? (count + 1) / 2 : count) - 16 * part;
        const __mmask16 exist = static_cast<__mmask16>(MaskOf(steps < 0 ? 0 : steps));
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
          const uint32_t* x = left + row * left_stride + (Pairs ? term / 2 : term) + 16 * part;
          const __m512i x_terms = _mm512_maskz_loadu_epi32(exist, x);
          total[row][lane] = Add<Pairs>::To(total[row][lane], numbers[part], x_terms);
        }
      }
    }
  };
  const int64_t whole = terms / 64 * 64;
  for (int64_t term = 0; term < whole; term += 64) add(term, 64);
  if (whole < terms) add(whole, terms - whole);
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
    __m512 of_row[4];
    for (int lane = 0; lane < 4; ++lane) of_row[lane] = _mm512_castsi512_ps(total[row][lane]);
    _mm_storeu_ps(sums + row * kWidth, AddUp(of_row));
  }
}

template <bool Pairs, int Rows>
void MultiplyTermsOfFloat8(const Weight& weight, const Run& run, const uint32_t* left,
                           int64_t left_stride, float* sums) {
  const Decoder decoder(*weight.table);
  for (int lane = 0; lane < run.lanes; lane += 4) {
    const uint8_t* lanes = weight.data + (run.lane + lane) * weight.stride + run.term;
    MultiplyFourLanesOfTerms<Pairs, Rows>(decoder, lanes, weight.stride, run.terms, left,
                                          left_stride, sums + lane);
  }
}

// More rows than four are multiplied four at a time by one strip of lanes, which stays in the caches:
// to decode it once more takes less time than to write it down.
constexpr int64_t kMostRows = kDirectRows * kDirectLanes / kWidth;

int DirectLanes(const Weight& weight, int64_t rows, int64_t terms, bool) {
  if (rows > kMostRows || (weight.terms_last && terms < 16)) return 0;
  return weight.terms_last || rows > 2 ? kWidth : rows == 2 ? 128 : 256;
}

template <bool Pairs>
void MultiplyDirect(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                    int64_t rows, float* sums) {
  static_assert(kDirectRows == 4, "one case per number of rows");
  if (rows > kDirectRows) {
    MultiplyDirect<Pairs>(weight, run, left, stride, kDirectRows, sums);
    return MultiplyDirect<Pairs>(weight, run, left + kDirectRows * stride, stride,
                                 rows - kDirectRows, sums + kDirectRows * kWidth);
  }
  const bool by_terms = weight.terms_last, is_wide = run.lanes > kWidth;
  const auto one = is_wide ? MultiplyLanes<Pairs, 1, 4> : MultiplyLanes<Pairs, 1, 1>;
  const auto two = is_wide ? MultiplyLanes<Pairs, 2, 2> : MultiplyLanes<Pairs, 2, 1>;
  const auto multiply =
      rows == 1   ? (by_terms ? MultiplyTermsOfFloat8<Pairs, 1> : one)
      : rows == 2 ? (by_terms ? MultiplyTermsOfFloat8<Pairs, 2> : two)
      : rows == 3 ? (by_terms ? MultiplyTermsOfFloat8<Pairs, 3> : MultiplyLanes<Pairs, 3, 1>)
                  : (by_terms ? MultiplyTermsOfFloat8<Pairs, 4> : MultiplyLanes<Pairs, 4, 1>);
  multiply(weight, run, left, stride, sums);
}

}  // namespace

const WeightKernels kAvx512Float8Weight = {1,           PackRun<Float8Packer<false>>,
                                           MultiplyWeight<AddFloats>,
                                           DirectLanes, MultiplyDirect<false>,
                                           Scale,       WriteFloats};
const WeightKernels kAvx512Float8WeightPairs = {2,           PackRun<Float8Packer<true>>,
                                                MultiplyWeight<AddPairs>,
                                                DirectLanes, MultiplyDirect<true>,
                                                Scale,       WriteFloats};

}  // namespace mpjax

#endif
