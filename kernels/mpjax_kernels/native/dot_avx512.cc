// The product of float8 matrices on AVX512-BF16: `vdpbf16ps` multiplies pairs of bfloat16, which
// hold every float8 exactly, and adds them up in float32.
//
// `vpermi2b` (AVX512-VBMI) looks up 64 numbers at once in a table of 128 bytes, which are all the
// magnitudes that there are: two look-ups, of the upper and of the lower byte, decode 64 numbers.

#include "dot.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include <immintrin.h>

namespace mpjax {
namespace {

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

class Decoder {
 public:
  explicit Decoder(const DecodeTable& table) {
    for (int half = 0; half < 2; ++half) {
      high_[half] = _mm512_loadu_si512(table.high + 64 * half);
      low_[half] = _mm512_loadu_si512(table.low + 64 * half);
    }
    alignas(64) uint8_t order[2][64];
    for (int lane = 0; lane < 16; ++lane) {
      for (int term = 0; term < 4; ++term) {
        uint8_t* place = order[term / 2] + 4 * lane + 2 * (term % 2);
        place[0] = static_cast<uint8_t>(4 * lane + term);       // of the lower bytes
        place[1] = static_cast<uint8_t>(64 + 4 * lane + term);  // of the upper ones
      }
    }
    for (int pair = 0; pair < 2; ++pair) order_[pair] = _mm512_load_si512(order[pair]);
  }

  // Four terms of 16 lanes, [lane][term], as two pairs of terms of 16 lanes each.
  void Decode(__m512i bytes, __m512i& first, __m512i& second) const {
    const __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
    __m512i high = _mm512_permutex2var_epi8(high_[0], bytes, high_[1]);
    const __m512i low = _mm512_permutex2var_epi8(low_[0], bytes, low_[1]);
    high = _mm512_or_si512(high, sign);
    first = _mm512_permutex2var_epi8(low, order_[0], high);
    second = _mm512_permutex2var_epi8(low, order_[1], high);
  }

 private:
  __m512i high_[2], low_[2], order_[2];
};

inline void Store(__m512i pair, int64_t index, uint16_t* first, uint16_t* second) {
  if (second == nullptr) {
    _mm512_storeu_si512(first + index * 2 * kColumns, pair);
    return;
  }
  const int64_t at = index * 2 * kRows;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + at), _mm512_castsi512_si256(pair));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second + at), _mm512_extracti64x4_epi64(pair, 1));
}

// Terms next to each other: 64 terms of 16 lanes at a time, in groups of four, exchanged.
void PackTermsFirst(const Decoder& decoder, const Source& source, int lanes, int64_t terms,
                    uint16_t* first, uint16_t* second) {
  for (int64_t start = 0; start < terms; start += 64) {
    const int64_t here = terms - start < 64 ? terms - start : 64;
    const __mmask64 mask = here == 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1;
    __m512i rows[16];
    for (int lane = 0; lane < 16; ++lane) {
      const uint8_t* at = source.data + lane * source.lane_stride + start;
      rows[lane] = lane < lanes ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_setzero_si512();
    }
    Transpose(rows);
    const int groups = static_cast<int>((here + 3) / 4);
    for (int group = 0; group < groups; ++group) {
      __m512i pairs[2];
      decoder.Decode(rows[group], pairs[0], pairs[1]);
      for (int p = 0; p < 2; ++p) Store(pairs[p], start / 2 + 2 * group + p, first, second);
    }
  }
}

// Lanes next to each other: four terms of 16 lanes at a time.
void PackLanesFirst(const Decoder& decoder, const Source& source, int lanes, int64_t terms,
                    uint16_t* first, uint16_t* second) {
  const __mmask16 mask = static_cast<__mmask16>((1u << lanes) - 1);
  alignas(64) uint8_t indices[64];  // [term][lane] to [lane][term]
  for (int i = 0; i < 64; ++i) indices[i] = static_cast<uint8_t>(16 * (i % 4) + i / 4);
  const __m512i order = _mm512_load_si512(indices);
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
    __m512i pairs[2];
    decoder.Decode(_mm512_permutexvar_epi8(order, bytes), pairs[0], pairs[1]);
    for (int p = 0; p < 2; ++p) Store(pairs[p], term / 2 + p, first, second);
  }
}

void Pack(const DecodeTable& table, const Source& source, int lanes, int64_t terms, uint16_t* first,
          uint16_t* second) {
  const Decoder decoder(table);
  const auto pack = source.term_stride == 1 ? PackTermsFirst : PackLanesFirst;
  pack(decoder, source, lanes, terms, first, second);
}

// kRows rows by `Panels` panels of 16 columns: up to 24 registers of sums.
template <int Panels>
void MultiplyPanels(const uint16_t* left, const uint16_t* right, int64_t panel_stride,
                    int64_t pairs, bool add, float* sums) {
  __m512 total[kRows][Panels];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
    for (int panel = 0; panel < Panels; ++panel) {
      const float* at = sums + row * kWidth + panel * kColumns;
      total[row][panel] = add ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh columns[Panels];
#pragma GCC unroll 3
    for (int panel = 0; panel < Panels; ++panel) {
      const uint16_t* at = right + panel * panel_stride + pair * 2 * kColumns;
      columns[panel] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(at));
    }
    const int* rows = reinterpret_cast<const int*>(left + pair * 2 * kRows);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(rows[row]));
#pragma GCC unroll 3
      for (int panel = 0; panel < Panels; ++panel) {
        total[row][panel] = _mm512_dpbf16_ps(total[row][panel], both, columns[panel]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
    for (int panel = 0; panel < Panels; ++panel) {
      _mm512_storeu_ps(sums + row * kWidth + panel * kColumns, total[row][panel]);
    }
  }
}

void Multiply(const uint16_t* left, const uint16_t* right, int64_t panel_stride, int panels,
              int64_t pairs, bool add, float* sums) {
  static_assert(kColumnPanels == 3, "one case per number of panels");
  switch (panels) {
    case 1:
      return MultiplyPanels<1>(left, right, panel_stride, pairs, add, sums);
    case 2:
      return MultiplyPanels<2>(left, right, panel_stride, pairs, add, sums);
    default:
      return MultiplyPanels<3>(left, right, panel_stride, pairs, add, sums);
  }
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

void WriteBfloat16(__m512 values, __mmask16 mask, uint16_t* out) {
  _mm256_mask_storeu_epi16(out, mask, ToBfloat16(values));
}

void WriteFloat32(__m512 values, __mmask16 mask, bool is_large, float* out) {
  if (is_large && mask == 0xFFFF && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    _mm512_stream_ps(out, values);
  } else {
    _mm512_mask_storeu_ps(out, mask, values);
  }
}

void Write(const float* sums, int64_t rows, int64_t columns, const Target& target) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 row_scale = _mm512_set1_ps(target.row_scales[i * target.row_scale_stride]);
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t here = columns - j < 16 ? columns - j : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1);
      const __m512 column_scale = _mm512_maskz_loadu_ps(mask, target.column_scales + j);
      const __m512 sum = _mm512_loadu_ps(sums + i * kWidth + j);
      const __m512 first = target.columns_first ? column_scale : row_scale;
      const __m512 second = target.columns_first ? row_scale : column_scale;
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum, first), second);
      const int64_t at = i * target.row_stride + j;
      if (target.is_bfloat16) {
        WriteBfloat16(scaled, mask, static_cast<uint16_t*>(target.out) + at);
      } else {
        WriteFloat32(scaled, mask, target.is_large, static_cast<float*>(target.out) + at);
      }
    }
  }
  if (target.is_large) _mm_sfence();
}

}  // namespace

const DotKernels kAvx512Dot = {"avx512_bf16", Pack, Multiply, Write};

}  // namespace mpjax

#endif
