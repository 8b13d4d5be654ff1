// What products by a weight share on AVX-512: decoding into panels, and multiplying those.
// Compiled once for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_AVX512_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "tile_avx512.h"
#include "weight_loops.h"

namespace mpjax {
namespace {

// Four terms of 16 lanes, as bytes, to float32, less the zero points: one term in each step, or two
// in bfloat16, which holds all 9-bit integers that these are.
template <bool Pairs>
class WeightPacker {
 public:
  static constexpr bool kPairs = Pairs;

  WeightPacker(const Weight&, const Run& run, const Panels& to)
      : to_(to), has_zeros_(run.zeros != nullptr) {
    for (int group = 0; has_zeros_ && 16 * group < run.lanes; ++group) {
      const __mmask16 mask = static_cast<__mmask16>(MaskOf(run.lanes - 16 * group));
      zeros_[group] = _mm512_maskz_loadu_ps(mask, run.zeros + 16 * group);
    }
  }

  void Take(__m512i bytes, int64_t four, int group) {
    const __m512 terms[4] = {Term<0>(bytes, group), Term<1>(bytes, group), Term<2>(bytes, group),
                             Term<3>(bytes, group)};
#pragma GCC unroll 4
    for (int t = 0; t < 4; t += Pairs ? 2 : 1) {
      if (!Pairs) {
        StoreStep(_mm512_castps_si512(terms[t]), 4 * four + t, group, to_);
      } else {
        const __m512i first = _mm512_srli_epi32(_mm512_castps_si512(terms[t]), 16);
        const __m512i second = _mm512_castps_si512(terms[t + 1]);
        StoreStep(_mm512_mask_blend_epi16(0xAAAAAAAA, first, second), 2 * four + t / 2, group, to_);
      }
    }
  }

 private:
  template <int T>
  __m512 Term(__m512i bytes, int group) const {
    const __m512i high = T == 3 ? bytes : _mm512_slli_epi32(bytes, 24 - 8 * T);
    const __m512 term = _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
    return has_zeros_ ? _mm512_sub_ps(term, zeros_[group]) : term;
  }

  const Panels to_;
  const bool has_zeros_;
  __m512 zeros_[kWidth / 16] = {};
};

// The int4 entries from the `first`-th on as bytes, from `to` or one more on if that is odd.
inline void Unpack(const uint8_t* data, int64_t first, int64_t count, uint8_t* to) {
  const uint8_t* from = data + first / 2;
  const int64_t bytes = (first % 2 + count + 1) / 2;
  for (int64_t i = 0; i < bytes; i += 32) {
    const __mmask32 mask = static_cast<__mmask32>(MaskOf(bytes - i));
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, from + i));
    const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
    const __m512i nibbles = _mm512_and_si512(both, _mm512_set1_epi8(0xF));
    const __m512i eight = _mm512_set1_epi8(8);
    _mm512_storeu_si512(to + 2 * i, _mm512_sub_epi8(_mm512_xor_si512(nibbles, eight), eight));
  }
}

// A run as bytes: where it lies, or unpacked.
class RunBytes {
 public:
  Source Of(const Weight& weight, const Run& run) {
    const int64_t first = weight.terms_last ? run.lane * weight.stride + run.term
                                            : run.term * weight.stride + run.lane;
    if (!weight.is_int4) return Source_(weight, weight.data + first, weight.stride);
    const int64_t lines = weight.terms_last ? run.lanes : run.terms;
    const int64_t length = weight.terms_last ? run.terms : run.lanes;
    const int64_t stride = weight.terms_last ? kRunTerms + 64 : kWidth + 64;
    for (int64_t line = 0; line < lines; ++line) {
      if (!weight.terms_last) {  // the next line may be on another page
        const uint8_t* ahead = weight.data + (first + (line + 8) * weight.stride) / 2;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      }
      Unpack(weight.data, first + line * weight.stride, length, bytes_ + line * stride);
    }
    return Source_(weight, bytes_ + first % 2, stride);  // the stride of int4 is even
  }

 private:
  static Source Source_(const Weight& weight, const uint8_t* data, int64_t stride) {
    if (weight.terms_last) return {data, stride, 1, nullptr};
    return {data, 1, stride, nullptr};
  }

  alignas(64) uint8_t bytes_[kRunTerms * (kWidth + 64) + 64];
};

template <typename Packer>
void PackRun(const Weight& weight, const Run& run, uint16_t* panels) {
  const int64_t terms = (run.terms + kTermsPerPack - 1) / kTermsPerPack * kTermsPerPack;
  const int64_t steps = Packer::kPairs ? terms / 2 : terms;
  Packer packer(weight, run, {panels, kColumns * kLaneNumbers * steps, false, nullptr});
  RunBytes bytes;
  const Source source = bytes.Of(weight, run);
  const auto pack = source.term_stride == 1 ? PackTermsFirst<Packer> : PackLanesFirst<Packer>;
  pack(source, run.lanes, run.terms, packer);
}

// `Rows` rows by four panels, in 24 registers of sums at most.
template <typename Add, int Rows>
void MultiplyWeightRows(const uint32_t* left, int64_t stride, const uint16_t* panels, int64_t steps,
                        bool add, float* sums) {
  constexpr int kPanels = kWidth / kColumns;
  __m512i total[Rows][kPanels];
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      const float* at = sums + row * kWidth + panel * kColumns;
      total[row][panel] = add ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
    }
  }
  const int64_t panel_numbers = kColumns * kLaneNumbers * steps;
  for (int64_t step = 0; step < steps; ++step) {
    __m512i columns[kPanels];
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      const int64_t at = panel * panel_numbers + step * kLaneNumbers * kColumns;
      columns[panel] = _mm512_loadu_si512(panels + at);
    }
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
      const __m512i terms = _mm512_set1_epi32(static_cast<int>(left[row * stride + step]));
#pragma GCC unroll 4
      for (int panel = 0; panel < kPanels; ++panel) {
        total[row][panel] = Add::To(total[row][panel], columns[panel], terms);
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      _mm512_storeu_si512(sums + row * kWidth + panel * kColumns, total[row][panel]);
    }
  }
}

template <typename Add>
void MultiplyWeight(const uint32_t* left, int64_t stride, int64_t rows, const uint16_t* panels,
                    int64_t steps, bool add, float* sums) {
  constexpr int kMost = 6;
  constexpr decltype(&MultiplyWeightRows<Add, 1>) kOf[kMost] = {
      MultiplyWeightRows<Add, 1>, MultiplyWeightRows<Add, 2>, MultiplyWeightRows<Add, 3>,
      MultiplyWeightRows<Add, 4>, MultiplyWeightRows<Add, 5>, MultiplyWeightRows<Add, 6>};
  for (int64_t row = 0; row < rows; row += kMost) {
    const int64_t here = rows - row < kMost ? rows - row : kMost;
    kOf[here - 1](left + row * stride, stride, panels, steps, add, sums + row * kWidth);
  }
}

// Stores sums of one row by 256 lanes, or of two by 128: each register has every eighth of 128.
template <int Rows>
void StoreEighths(const __m512 (&total)[16], float* sums) {
  __m512i lanes[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) lanes[i] = _mm512_castps_si512(total[i]);
  Transpose(lanes);  // now eight neighbours of the first eight registers, and of the others
#pragma GCC unroll 16
  for (int eight = 0; eight < 16; ++eight) {
    for (int half = 0; half < 2; ++half) {
      const int lane = 8 * eight + (Rows == 1 ? 128 * half : 0), row = Rows == 1 ? 0 : half;
      float* to = sums + (lane / kWidth * Rows + row) * kWidth + lane % kWidth;
      const __m512d pair = _mm512_castsi512_pd(lanes[eight]);
      const __m256d of = half == 0 ? _mm512_castpd512_pd256(pair) : _mm512_extractf64x4_pd(pair, 1);
      _mm256_storeu_pd(reinterpret_cast<double*>(to), of);
    }
  }
}

inline void WriteFloats(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target,
            [](int64_t, const Sum* at) { return _mm512_loadu_ps(at); });
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_AVX512_H_
