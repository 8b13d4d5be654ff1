// What products share on AVX2: packing, multiplying packed numbers, and writing sums. Compiled once
// for each instruction set, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_TILE_AVX2_H_
#define MPJAX_KERNELS_NATIVE_TILE_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "dot.h"
#include "tile_multiply.h"

namespace mpjax {
namespace {

struct Avx2 {
  using Type = __m256i;
  static constexpr int kNumbers = 8;
  static Type Zero() { return _mm256_setzero_si256(); }
  static Type Load(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
  }
  static Type LoadColumns(const void* at) { return Load(at); }
  static void Store(void* at, Type value) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), value);
  }
  static Type Broadcast(int number) { return _mm256_set1_epi32(number); }
};

// Adds products of 8 columns and a row to their sums, in float32.
struct AddFloats {
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return _mm256_castps_si256(_mm256_fmadd_ps(
        _mm256_castsi256_ps(columns), _mm256_castsi256_ps(row), _mm256_castsi256_ps(total)));
  }
};

// The first 32 bytes of `count`, and zeros where there are fewer.
inline __m256i LoadBytes(const uint8_t* at, int64_t count) {
  if (count >= 32) return Avx2::Load(at);
  alignas(32) uint8_t bytes[32] = {};
  if (count > 0) std::memcpy(bytes, at, static_cast<size_t>(count));
  return Avx2::Load(bytes);
}

// As many of the first bits of eight numbers.
inline __m256i MaskOf(int64_t count) {
  const int numbers = count >= 8 ? 8 : static_cast<int>(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(numbers), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Exchanges rows and columns of a matrix of 8 x 8 numbers of 32 bits.
inline void Transpose(__m256i (&rows)[8]) {
  __m256i pairs[8], fours[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m256i first = pairs[4 * i + j], second = pairs[4 * i + 2 + j];
      fours[4 * i + 2 * j] = _mm256_unpacklo_epi64(first, second);
      fours[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(first, second);
    }
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
    rows[4 + j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
  }
}

// Stores a step of the g-th 8 lanes.
inline void StoreStep(__m256i lanes, int64_t step, int group, const Panels& to) {
  static_assert(kRows == 8 && kColumns == 16, "one or two groups to a panel");
  uint16_t* at = to.is_left ? to.data + group * to.stride + step * kLaneNumbers * kRows
                            : to.data + group / 2 * to.stride + step * kLaneNumbers * kColumns +
                                  group % 2 * kLaneNumbers * 8;
  Avx2::Store(at, lanes);
}

constexpr int GroupsOf(int lanes) { return (lanes + kColumns - 1) / kColumns * 2; }

// Terms next to each other: 32 terms of 8 lanes at a time, in groups of four, exchanged. What four
// terms of 8 lanes are goes to `packer.Take(bytes [lane][term], terms / 4, lanes / 8)`.
template <typename Packer>
void PackTermsFirst(const Source& source, int lanes, int64_t terms, Packer& packer) {
  for (int group = 0; group < GroupsOf(lanes); ++group) {
    const uint8_t* data = source.data + 8 * group * source.lane_stride;
    for (int64_t start = 0; start < terms; start += 32) {
      __m256i rows[8];
      for (int lane = 0; lane < 8; ++lane) {
        const bool exists = 8 * group + lane < lanes;
        const uint8_t* at = data + lane * source.lane_stride + start;
        rows[lane] = exists ? LoadBytes(at, terms - start) : Avx2::Zero();
      }
      Transpose(rows);
      const int64_t left = (terms - start + 3) / 4;
      for (int four = 0; four < 8 && four < left; ++four) {
        packer.Take(rows[four], start / 4 + four, group);
      }
    }
  }
}

// Lanes next to each other: four terms of 32 lanes at a time. Bytes and then pairs of them are
// interleaved, within each 128 bits; those are then brought in order.
template <typename Packer>
void PackLanesFirst(const Source& source, int lanes, int64_t terms, Packer& packer) {
  for (int64_t term = 0; term < terms; term += 4) {
    for (int lane = 0; lane < lanes; lane += 32) {
      __m256i rows[4];
      for (int t = 0; t < 4; ++t) {
        const uint8_t* at = source.data + (term + t) * source.term_stride + lane;
        // The hardware stops at the end of a page, and the next row may be on another.
        _mm_prefetch(reinterpret_cast<const char*>(at + 8 * source.term_stride), _MM_HINT_T0);
        rows[t] = term + t < terms ? LoadBytes(at, lanes - lane) : Avx2::Zero();
      }
      const __m256i low01 = _mm256_unpacklo_epi8(rows[0], rows[1]);
      const __m256i high01 = _mm256_unpackhi_epi8(rows[0], rows[1]);
      const __m256i low23 = _mm256_unpacklo_epi8(rows[2], rows[3]);
      const __m256i high23 = _mm256_unpackhi_epi8(rows[2], rows[3]);
      const __m256i a = _mm256_unpacklo_epi16(low01, low23);
      const __m256i b = _mm256_unpackhi_epi16(low01, low23);
      const __m256i c = _mm256_unpacklo_epi16(high01, high23);
      const __m256i d = _mm256_unpackhi_epi16(high01, high23);
      const int group = lane / 8;
      packer.Take(_mm256_permute2x128_si256(a, b, 0x20), term / 4, group);
      packer.Take(_mm256_permute2x128_si256(c, d, 0x20), term / 4, group + 1);
      if (lanes - lane <= 16) continue;
      packer.Take(_mm256_permute2x128_si256(a, b, 0x31), term / 4, group + 2);
      packer.Take(_mm256_permute2x128_si256(c, d, 0x31), term / 4, group + 3);
    }
  }
}

template <typename Packer>
void PackBy(const Source& source, int lanes, int64_t terms, Packer& packer) {
  const auto pack = source.term_stride == 1 ? PackTermsFirst<Packer> : PackLanesFirst<Packer>;
  pack(source, lanes, terms, packer);
}

// Four rows by a panel at a time: eight registers of sums.
template <typename Add>
void MultiplyTile(const uint16_t* left, int rows, const uint16_t* right, int64_t panel_stride,
                  int panels, int64_t steps, bool add, Sum* sums) {
  for (int row = 0; row < rows; row += 4) {
    const auto multiply = rows - row == 1   ? MultiplyPanels<Avx2, Add, 1, 1, LeftPanel>
                          : rows - row == 2 ? MultiplyPanels<Avx2, Add, 2, 1, LeftPanel>
                                            : MultiplyPanels<Avx2, Add, 4, 1, LeftPanel>;
    for (int panel = 0; panel < panels; ++panel) {
      multiply({left + row * kLaneNumbers}, right + panel * panel_stride, panel_stride, steps, add,
               sums + row * kWidth + panel * kColumns);
    }
  }
}

// To nearest even, in integers.
inline __m128i ToBfloat16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

// Scales, casts and writes a tile, of which `load(row, sums)` makes 8 sums float32.
template <typename Load>
void WriteTile(const Sum* sums, int64_t rows, int64_t columns, const Target& target,
               const Load& load) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m256 row_scale = _mm256_set1_ps(target.row_scales[i * target.row_scale_stride]);
    for (int64_t j = 0; j < columns; j += 8) {
      const __m256i mask = MaskOf(columns - j);
      const __m256 column_scale = _mm256_maskload_ps(target.column_scales + j, mask);
      const __m256 sum = load(i, sums + i * kWidth + j);
      const __m256 first = target.columns_first ? column_scale : row_scale;
      const __m256 second = target.columns_first ? row_scale : column_scale;
      const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(sum, first), second);
      const int64_t at = i * target.row_stride + j;
      if (target.type == Real::kFloat32) {
        _mm256_maskstore_ps(static_cast<float*>(target.out) + at, mask, scaled);
        continue;
      }
      const __m128i cast = target.type == Real::kBfloat16
                               ? ToBfloat16(scaled)
                               : _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT);
      const int64_t here = columns - j < 8 ? columns - j : 8;
      std::memcpy(static_cast<uint16_t*>(target.out) + at, &cast, static_cast<size_t>(2 * here));
    }
  }
}

inline void WriteFloats(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target,
            [](int64_t, const Sum* at) { return _mm256_loadu_ps(&at->real); });
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_TILE_AVX2_H_
