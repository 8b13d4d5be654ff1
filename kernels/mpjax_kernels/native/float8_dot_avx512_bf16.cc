// The product of float8 matrices on AVX512-BF16: `vdpbf16ps` multiplies pairs of bfloat16, which
// hold every float8 exactly, and adds them up in float32.

#include "dot.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include "float8_avx512.h"
#include "streams.h"
#include "tile_avx512.h"

namespace mpjax {
namespace {

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

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target,
            [](int64_t, const Sum* at) { return _mm512_loadu_ps(at); });
}

}  // namespace

const DotKernels kAvx512Float8Dot = {2, Pack, MultiplyTile<AddPairs>, MultiplyFloat8Terms,
                                     Write, LayOutFloat8, StreamFloat8, SettleFloat8, Float8Rows};

}  // namespace mpjax

#endif
