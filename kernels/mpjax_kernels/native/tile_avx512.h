// What products share on AVX-512: turning a block of numbers, and scaling, casting and writing sums.
// Compiled once for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_TILE_AVX512_H_
#define MPJAX_KERNELS_NATIVE_TILE_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "dot.h"
#include "tile_multiply.h"

namespace mpjax {
namespace {

struct Avx512 {
  using Type = __m512i;
  static constexpr int kNumbers = 16;
  static Type Zero() { return _mm512_setzero_si512(); }
  static Type Load(const void* at) { return _mm512_loadu_si512(at); }
  static Type LoadColumns(const void* at) { return Load(at); }
  static void Store(void* at, Type value) { _mm512_storeu_si512(at, value); }
  static Type Broadcast(int number) { return _mm512_set1_epi32(number); }
};

// Exchanges rows and columns of a matrix of 16 x 16 numbers of 32 bits.
inline void Transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m512i first = pairs[4 * i + j], second = pairs[4 * i + 2 + j];
      fours[4 * i + 2 * j] = _mm512_unpacklo_epi64(first, second);
      fours[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(first, second);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xDD);
    rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

inline __mmask64 MaskOf(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Stores a step of the g-th 16 lanes.
inline void StoreStep(__m512i lanes, int64_t step, int group, const Panels& to) {
  if (!to.is_left) {
    uint16_t* at = to.data + group * to.stride + step * kLaneNumbers * kColumns;
    return _mm512_storeu_si512(at, lanes);
  }
  uint16_t* at = to.data + 2 * group * to.stride + step * kLaneNumbers * kRows;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + to.stride),
                      _mm512_extracti64x4_epi64(lanes, 1));
}

// Terms next to each other: 64 terms of 16 lanes at a time, in groups of four, exchanged. What four
// terms of 16 lanes are goes to `packer.Take(bytes [lane][term], terms / 4, lanes / 16)`.
template <typename Packer>
void PackTermsFirst(const Source& source, int lanes, int64_t terms, Packer& packer) {
  for (int group = 0; 16 * group < lanes; ++group) {
    const uint8_t* data = source.data + 16 * group * source.lane_stride;
    for (int64_t start = 0; start < terms; start += 64) {
      const __mmask64 mask = MaskOf(terms - start);
      __m512i rows[16];
      for (int lane = 0; lane < 16; ++lane) {
        const uint8_t* at = data + lane * source.lane_stride + start;
        const bool exists = 16 * group + lane < lanes;
        rows[lane] = exists ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_setzero_si512();
      }
      Transpose(rows);
      if (terms - start >= 64) {
#pragma GCC unroll 16
        for (int four = 0; four < 16; ++four) packer.Take(rows[four], start / 4 + four, group);
      } else {
        const int fours = static_cast<int>((terms - start + 3) / 4);
        for (int four = 0; four < fours; ++four) packer.Take(rows[four], start / 4 + four, group);
      }
    }
  }
}

// Four terms of at most 64 lanes, [term][lane] to [lane][term], which `packer` takes. Bytes and then
// pairs of them are interleaved, within each 128 bits; those are then brought in order.
template <typename Packer>
inline void PackFour(const __m512i (&rows)[4], int lanes, int64_t four, int group, Packer& packer) {
  const __m512i low01 = _mm512_unpacklo_epi8(rows[0], rows[1]);
  const __m512i high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(rows[2], rows[3]);
  const __m512i high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
  const __m512i a = _mm512_unpacklo_epi16(low01, low23);
  const __m512i b = _mm512_unpackhi_epi16(low01, low23);
  const __m512i c = _mm512_unpacklo_epi16(high01, high23);
  const __m512i d = _mm512_unpackhi_epi16(high01, high23);
  const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), ab2 = _mm512_shuffle_i32x4(a, b, 0xEE);
  const __m512i cd = _mm512_shuffle_i32x4(c, d, 0x44), cd2 = _mm512_shuffle_i32x4(c, d, 0xEE);
  packer.Take(_mm512_shuffle_i32x4(ab, cd, 0x88), four, group);
  if (lanes > 16) packer.Take(_mm512_shuffle_i32x4(ab, cd, 0xDD), four, group + 1);
  if (lanes > 32) packer.Take(_mm512_shuffle_i32x4(ab2, cd2, 0x88), four, group + 2);
  if (lanes > 48) packer.Take(_mm512_shuffle_i32x4(ab2, cd2, 0xDD), four, group + 3);
}

// Lanes next to each other: four terms of all lanes at a time.
template <typename Packer>
void PackLanesFirst(const Source& source, int lanes, int64_t terms, Packer& packer) {
  for (int64_t term = 0; term < terms; term += 4) {
    for (int lane = 0; lane < lanes; lane += 64) {
      const __mmask64 mask = MaskOf(lanes - lane);
      __m512i rows[4];
      for (int t = 0; t < 4; ++t) {
        const uint8_t* at = source.data + (term + t) * source.term_stride + lane;
        const bool exists = term + t < terms;
        // The hardware stops at the end of a page, and the next row may be on another.
        _mm_prefetch(reinterpret_cast<const char*>(at + 8 * source.term_stride), _MM_HINT_T0);
        rows[t] = exists ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_setzero_si512();
      }
      PackFour(rows, lanes - lane, term / 4, lane / 16, packer);
    }
  }
}

// Adds products of 16 columns and a row to their sums: in float32, or pairs of bfloat16.
struct AddFloats {
  static __m512i To(__m512i total, __m512i columns, __m512i row) {
    return _mm512_castps_si512(_mm512_fmadd_ps(
        _mm512_castsi512_ps(columns), _mm512_castsi512_ps(row), _mm512_castsi512_ps(total)));
  }
};

#if defined(__AVX512BF16__)
struct AddPairs {
  static __m512i To(__m512i total, __m512i columns, __m512i row) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(total),
                                                reinterpret_cast<__m512bh>(row),
                                                reinterpret_cast<__m512bh>(columns)));
  }
};
#endif

template <typename V, typename Add, int Rows>
void MultiplyRows(const uint16_t* left, const uint16_t* right, int64_t panel_stride, int panels,
                  int64_t steps, bool add, Sum* sums) {
  static_assert(kColumnPanels == 3, "one case per number of panels");
  switch (panels) {
    case 1:
      return MultiplyPanels<V, Add, Rows, 1>(LeftPanel{left}, right, panel_stride, steps, add, sums);
    case 2:
      return MultiplyPanels<V, Add, Rows, 2>(LeftPanel{left}, right, panel_stride, steps, add, sums);
    default:
      return MultiplyPanels<V, Add, Rows, 3>(LeftPanel{left}, right, panel_stride, steps, add, sums);
  }
}

// As many rows as there are: up to 24 registers of sums.
template <typename Add, typename V = Avx512>
void MultiplyTile(const uint16_t* left, int rows, const uint16_t* right, int64_t panel_stride,
                  int panels, int64_t steps, bool add, Sum* sums) {
  constexpr decltype(&MultiplyRows<V, Add, 1>) kOf[kRows] = {
      MultiplyRows<V, Add, 1>, MultiplyRows<V, Add, 2>, MultiplyRows<V, Add, 3>,
      MultiplyRows<V, Add, 4>, MultiplyRows<V, Add, 5>, MultiplyRows<V, Add, 6>,
      MultiplyRows<V, Add, 7>, MultiplyRows<V, Add, 8>};
  kOf[rows - 1](left, right, panel_stride, panels, steps, add, sums);
}

// To nearest even, in integers: `vcvtneps2bf16` would flush subnormal numbers to zero.
inline __m256i ToBfloat16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void WriteFloat32(__m512 values, __mmask16 mask, bool is_large, float* out) {
  if (is_large && mask == 0xFFFF && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    _mm512_stream_ps(out, values);
  } else {
    _mm512_mask_storeu_ps(out, mask, values);
  }
}

// Scales, casts and writes a tile, of which `load(row, sums)` makes 16 sums float32.
template <typename Load>
void WriteTile(const Sum* sums, int64_t rows, int64_t columns, const Target& target,
               const Load& load) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 row_scale = _mm512_set1_ps(target.row_scales[i * target.row_scale_stride]);
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t here = columns - j < 16 ? columns - j : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1);
      const __m512 column_scale = _mm512_maskz_loadu_ps(mask, target.column_scales + j);
      const __m512 sum = load(i, sums + i * kWidth + j);
      const __m512 first = target.columns_first ? column_scale : row_scale;
      const __m512 second = target.columns_first ? row_scale : column_scale;
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum, first), second);
      const int64_t at = i * target.row_stride + j;
      if (target.type == Real::kFloat32) {
        WriteFloat32(scaled, mask, target.is_large, static_cast<float*>(target.out) + at);
      } else {
        const bool is_bfloat16 = target.type == Real::kBfloat16;
        const __m256i cast = is_bfloat16 ? ToBfloat16(scaled)
                                         : _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(target.out) + at, mask, cast);
      }
    }
  }
  if (target.is_large) _mm_sfence();
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_TILE_AVX512_H_
