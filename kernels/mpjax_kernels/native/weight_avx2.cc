// The product of an array by a weight of int8, int4 or float8 on AVX2, in float32 (`vfmadd231ps`). int8
// and int4 are widened, float8 becomes float16 on the way (`vcvtph2ps`).
//
// A few rows are multiplied by the weight as it is decoded, in registers, eight entries at a time.

#include "weight.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "floats_avx2.h"
#include "weight_loops.h"

namespace mpjax {
namespace {

constexpr int64_t kBlockTerms = 32;  // that are multiplied by all lanes before the next
constexpr int kAhead = 24;           // terms that the weight is fetched ahead

// The int4 entries from the `first`-th on as bytes, from `to` or one more on if that is odd.
void Unpack(const uint8_t* data, int64_t first, int64_t count, uint8_t* to) {
  const uint8_t* from = data + first / 2;
  const int64_t bytes = (first % 2 + count + 1) / 2;
  for (int64_t i = 0; i < bytes; i += 16) {
    const int64_t here = bytes - i < 16 ? bytes - i : 16;
    const __m128i pairs8 = _mm256_castsi256_si128(LoadBytes(from + i, here));
    const __m256i pairs = _mm256_cvtepu8_epi16(pairs8);
    const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    const __m256i nibbles = _mm256_and_si256(both, _mm256_set1_epi8(0xF));
    const __m256i eight = _mm256_set1_epi8(8);
    Avx2::Store(to + 2 * i, _mm256_sub_epi8(_mm256_xor_si256(nibbles, eight), eight));
  }
}

// A run as bytes: where it lies, or unpacked.
class RunBytes {
 public:
  Source Of(const Weight& weight, const Run& run) {
    const int64_t first = weight.terms_last ? run.lane * weight.stride + run.term
                                            : run.term * weight.stride + run.lane;
    if (!weight.is_int4) return Of(weight, weight.data + first, weight.stride);
    const int64_t lines = weight.terms_last ? run.lanes : run.terms;
    const int64_t length = weight.terms_last ? run.terms : run.lanes;
    const int64_t stride = weight.terms_last ? kRunTerms + 64 : kWidth + 64;
    for (int64_t line = 0; line < lines; ++line) {
      Unpack(weight.data, first + line * weight.stride, length, bytes_ + line * stride);
    }
    return Of(weight, bytes_ + first % 2, stride);  // the stride of int4 is even
  }

 private:
  static Source Of(const Weight& weight, const uint8_t* data, int64_t stride) {
    if (weight.terms_last) return {data, stride, 1, nullptr};
    return {data, 1, stride, nullptr};
  }

  alignas(32) uint8_t bytes_[kRunTerms * (kWidth + 64) + 64];
};

template <typename Format>
void PackAs(const Weight& weight, const Run& run, const Panels& to) {
  FloatsPacker<Format> packer(to, run.zeros, run.lanes);
  RunBytes bytes;
  PackBy(bytes.Of(weight, run), run.lanes, run.terms, packer);
}

bool IsE5M2(const Weight& weight) { return weight.table == &TableOf(true); }

void Pack(const Weight& weight, const Run& run, uint16_t* panels) {
  const int64_t steps = (run.terms + kTermsPerPack - 1) / kTermsPerPack * kTermsPerPack;
  const auto pack = weight.table == nullptr ? PackAs<Int8>
                    : IsE5M2(weight)        ? PackAs<E5M2>
                                            : PackAs<E4M3>;
  pack(weight, run, {panels, kColumns * kLaneNumbers * steps, false, nullptr});
}

// Six rows by a panel at a time: twelve registers of sums.
void Multiply(const uint32_t* left, int64_t stride, int64_t rows, const uint16_t* panels,
              int64_t steps, bool add, float* sums) {
  constexpr int kMost = 6;
  constexpr decltype(&MultiplyPanels<Avx2, AddFloats, 1, 1, LeftRows>) kOf[kMost] = {
      MultiplyPanels<Avx2, AddFloats, 1, 1, LeftRows>,
      MultiplyPanels<Avx2, AddFloats, 2, 1, LeftRows>,
      MultiplyPanels<Avx2, AddFloats, 3, 1, LeftRows>,
      MultiplyPanels<Avx2, AddFloats, 4, 1, LeftRows>,
      MultiplyPanels<Avx2, AddFloats, 5, 1, LeftRows>,
      MultiplyPanels<Avx2, AddFloats, 6, 1, LeftRows>};
  const int64_t panel_stride = kColumns * kLaneNumbers * steps;
  for (int panel = 0; panel < kWidth / kColumns; ++panel) {
    for (int64_t row = 0; row < rows; row += kMost) {
      const int64_t here = rows - row < kMost ? rows - row : kMost;
      Sum* to = reinterpret_cast<Sum*>(sums + row * kWidth + panel * kColumns);
      kOf[here - 1]({left + row * stride, stride}, panels + panel * panel_stride, panel_stride,
                    steps, add, to);
    }
  }
}

// `Rows` rows by lanes that lie next to each other, in eight registers of sums.
template <typename Format, int Rows, bool Zeros>
void MultiplyLanes(const Weight& weight, const Run& run, const float* left, int64_t left_stride,
                   float* sums) {
  constexpr int kVectors = Rows == 1 ? 8 : Rows == 2 ? 4 : 2;
  for (int64_t start = 0; start < run.terms; start += kBlockTerms) {
    const int64_t end = run.terms - start < kBlockTerms ? run.terms : start + kBlockTerms;
    for (int lane = 0; lane < run.lanes; lane += 8 * kVectors) {
      float* to = sums + lane / kWidth * Rows * kWidth + lane % kWidth;
      __m256 total[Rows][kVectors];
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const float* at = to + row * kWidth + 8 * v;
          total[row][v] = start > 0 ? _mm256_loadu_ps(at) : _mm256_setzero_ps();
        }
      }
      for (int64_t term = start; term < end; ++term) {
        const int64_t entry = (run.term + term) * weight.stride + run.lane + lane;
        const uint8_t* ahead = Format::At(weight.data, entry + kAhead * weight.stride);
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        __m256 x[Rows];
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
          x[row] = _mm256_broadcast_ss(left + row * left_stride + term);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          __m256 numbers = Format::Load(Format::At(weight.data, entry + 8 * v));
          if (Zeros) numbers = _mm256_sub_ps(numbers, _mm256_loadu_ps(run.zeros + lane + 8 * v));
#pragma GCC unroll 4
          for (int row = 0; row < Rows; ++row) {
            total[row][v] = _mm256_fmadd_ps(numbers, x[row], total[row][v]);
          }
        }
      }
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          _mm256_storeu_ps(to + row * kWidth + 8 * v, total[row][v]);
        }
      }
    }
  }
}

// The sums of all 8 numbers of four registers.
inline __m128 AddUp(const __m256 (&of)[4]) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// `Rows` rows, one or two, by four lanes whose terms lie next to each other.
template <typename Format, int Rows, bool Zeros>
void MultiplyFourLanes(const Weight& weight, const Run& run, int lane, const float* left,
                       int64_t left_stride, float* sums) {
  const uint8_t* lanes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    lanes[i] = Format::At(weight.data, (run.lane + lane + i) * weight.stride + run.term);
  }
  const int64_t next = Format::At(weight.data, 4 * weight.stride) - weight.data;
  __m256 total[Rows][4];
#pragma GCC unroll 2
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[row][i] = _mm256_setzero_ps();
  }
  const auto add = [&](const __m256 (&x)[Rows], auto load) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m256 numbers = load(lanes[i]);
      if (Zeros) numbers = _mm256_sub_ps(numbers, _mm256_broadcast_ss(run.zeros + lane + i));
#pragma GCC unroll 2
      for (int row = 0; row < Rows; ++row) {
        total[row][i] = _mm256_fmadd_ps(numbers, x[row], total[row][i]);
      }
    }
  };
  const int64_t whole = run.terms / 8 * 8;
  __m256 x[Rows];
  for (int64_t term = 0; term < whole; term += 8) {
    if (term % 64 == 0) {  // the hardware stops at the end of a page
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* ahead = Format::At(lanes[i], term) + next;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) x[row] = _mm256_loadu_ps(left + row * left_stride + term);
    add(x, [=](const uint8_t* of) { return Format::Load(Format::At(of, term)); });
  }
  if (const int64_t rest = run.terms - whole; rest > 0) {
    for (int row = 0; row < Rows; ++row) {
      x[row] = _mm256_maskload_ps(left + row * left_stride + whole, MaskOf(rest));
    }
    const int64_t bytes = Format::At(weight.data, rest) - weight.data;  // of int4 an even number
    add(x, [=](const uint8_t* of) {
      uint8_t last[8] = {};
      std::memcpy(last, Format::At(of, whole), static_cast<size_t>(bytes));
      return Format::Load(last);
    });
  }
  for (int row = 0; row < Rows; ++row) _mm_storeu_ps(sums + row * kWidth, AddUp(total[row]));
}

template <typename Format, int Rows, bool Zeros>
void MultiplyTerms(const Weight& weight, const Run& run, const float* left, int64_t stride,
                   float* sums) {
  for (int lane = 0; lane < run.lanes; lane += 4) {
    for (int row = 0; row < Rows; row += 2) {
      const float* of_rows = left + row * stride;
      float* to = sums + row * kWidth + lane;
      if (row + 1 < Rows) {
        MultiplyFourLanes<Format, 2, Zeros>(weight, run, lane, of_rows, stride, to);
      } else {
        MultiplyFourLanes<Format, 1, Zeros>(weight, run, lane, of_rows, stride, to);
      }
    }
  }
}

// More rows than four are multiplied four at a time by one strip of lanes of integers, which stays in
// the caches; to decode float8 over and over takes longer.
constexpr int64_t kMostRows = kDirectRows * kDirectLanes / kWidth;

int DirectLanes(const Weight& weight, int64_t rows, int64_t terms, bool) {
  if (rows > (weight.table == nullptr ? kMostRows : kDirectRows)) return 0;
  if (!weight.terms_last) return rows > kDirectRows ? kWidth : kDirectLanes;
  return terms >= 16 && (!weight.is_int4 || terms % 2 == 0) ? kWidth : 0;
}

template <typename Format, int Rows>
void MultiplyRows(const Weight& weight, const Run& run, const float* left, int64_t stride,
                  float* sums) {
  const bool by_terms = weight.terms_last;
  const auto multiply =
      run.zeros == nullptr
          ? (by_terms ? MultiplyTerms<Format, Rows, false> : MultiplyLanes<Format, Rows, false>)
          : (by_terms ? MultiplyTerms<Format, Rows, true> : MultiplyLanes<Format, Rows, true>);
  multiply(weight, run, left, stride, sums);
}

template <typename Format>
void MultiplyAs(const Weight& weight, const Run& run, const float* left, int64_t stride,
                int64_t rows, float* sums) {
  static_assert(kDirectRows == 4, "one case per number of rows");
  const auto multiply = rows == 1   ? MultiplyRows<Format, 1>
                        : rows == 2 ? MultiplyRows<Format, 2>
                        : rows == 3 ? MultiplyRows<Format, 3>
                                    : MultiplyRows<Format, 4>;
  multiply(weight, run, left, stride, sums);
}

void MultiplyDirect(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                    int64_t rows, float* sums) {
  if (rows > kDirectRows) {
    MultiplyDirect(weight, run, left, stride, kDirectRows, sums);
    return MultiplyDirect(weight, run, left + kDirectRows * stride, stride, rows - kDirectRows,
                          sums + kDirectRows * kWidth);
  }
  const auto multiply = weight.is_int4            ? MultiplyAs<Int4>
                        : weight.table == nullptr ? MultiplyAs<Int8>
                        : IsE5M2(weight)          ? MultiplyAs<E5M2>
                                                  : MultiplyAs<E4M3>;
  multiply(weight, run, reinterpret_cast<const float*>(left), stride, rows, sums);
}

}  // namespace

const WeightKernels kAvx2Weight = {1,           Pack,  Multiply,   DirectLanes,
                                   MultiplyDirect, Scale, WriteFloats};

}  // namespace mpjax

#endif
