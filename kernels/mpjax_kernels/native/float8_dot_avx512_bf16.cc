// The product of float8 matrices on AVX512-BF16: `vdpbf16ps` multiplies pairs of bfloat16, which
// hold every float8 exactly, and adds them up in float32.
//
// `vpermi2b` (AVX512-VBMI) looks up 64 numbers at once in a table of 128 bytes, which are all the
// magnitudes that there are: two look-ups, of the upper and of the lower byte, decode 64 numbers.

#include "dot.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include "streams.h"
#include "tile_avx512.h"

namespace mpjax {
namespace {

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

class Packer {
 public:
  Packer(const DecodeTable& table, const Panels& to) : decoder_(table), to_(to) {}

  void Take(__m512i bytes, int64_t four, int group) {
    __m512i pairs[2];
    decoder_.Decode(bytes, pairs[0], pairs[1]);
    for (int p = 0; p < 2; ++p) StoreStep(pairs[p], 2 * four + p, group, to_);
  }

 private:
  const Decoder decoder_;
  const Panels to_;
};

void Pack(const Source& source, int lanes, int64_t terms, const Panels& to) {
  Packer packer(*source.table, to);
  const auto pack = source.term_stride == 1 ? PackTermsFirst<Packer> : PackLanesFirst<Packer>;
  pack(source, lanes, terms, packer);
}

struct AddPairs {
  static __m512i To(__m512i total, __m512i columns, __m512i row) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(total),
                                                reinterpret_cast<__m512bh>(row),
                                                reinterpret_cast<__m512bh>(columns)));
  }
};

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target,
            [](int64_t, const Sum* at) { return _mm512_loadu_ps(at); });
}

}  // namespace

const DotKernels kAvx512Float8Dot = {2, Pack, MultiplyTile<AddPairs>, MultiplyFloat8Terms,
                                     Write, LayOutFloat8, StreamFloat8, SettleFloat8, Float8Rows};

}  // namespace mpjax

#endif
