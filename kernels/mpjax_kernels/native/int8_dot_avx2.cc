// The product of int8 matrices on AVX2: `vpmaddwd` multiplies pairs of 16-bit numbers and adds their
// products in 32 bits, exactly. Bytes are widened as they are packed, or loaded (`vpmovsxbw`). There is
// an instruction for bytes, `vpmaddubsw`, but its sums of 16 bits saturate.

#include "dot.h"

#if defined(__AVX2__)

#include "int8_dot_avx2.h"

namespace mpjax {
namespace {

struct Pairs {
  static constexpr int kTerms = 16;
  static __m256i Load(const uint8_t* at) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static __m256i First(__m256i bytes) {
    return _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes));
  }
  static __m256i Left(__m256i terms) { return terms; }
  static __m256i Right(__m256i terms) { return terms; }
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(columns, row));
  }
  static int32_t ExcessOf(const uint8_t*, int64_t) { return 0; }
};

class Packer {
 public:
  explicit Packer(const Panels& to) : to_(to) {}

  // Each byte moves to the upper half of 16 bits, of which the shift makes the number.
  void Take(__m256i bytes, int64_t four, int group) {
    const __m256i first = _mm256_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13,
                                           -1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13);
    const __m256i second = _mm256_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1,
                                            15, -1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14,
                                            -1, 15);
    StoreStep(_mm256_srai_epi16(_mm256_shuffle_epi8(bytes, first), 8), 2 * four, group, to_);
    StoreStep(_mm256_srai_epi16(_mm256_shuffle_epi8(bytes, second), 8), 2 * four + 1, group, to_);
  }

  void Finish(int lanes) const {  // their sums are right
    for (int lane = 0; to_.is_left && lane < lanes; ++lane) to_.excess[lane] = 0;
  }

 private:
  const Panels to_;
};

void Pack(const Source& source, int lanes, int64_t terms, const Panels& to) {
  Packer packer(to);
  PackBy(source, lanes, terms, packer);
  packer.Finish(lanes);
}

}  // namespace

const DotKernels kAvx2Int8Dot = {2, Pack, MultiplyTile<Pairs>, MultiplyUnpacked<Pairs>,
                                 WriteIntegers, nullptr, nullptr, nullptr, UnpackedInt8Rows};

}  // namespace mpjax

#endif
