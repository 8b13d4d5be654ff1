// The product of float8 matrices on AVX2, in float32: decoded as they are packed, one term to a step.

#include "dot.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "floats_avx2.h"

namespace mpjax {
namespace {

template <typename Format>
void PackAs(const Source& source, int lanes, int64_t terms, const Panels& to) {
  FloatsPacker<Format> packer(to);
  PackBy(source, lanes, terms, packer);
}

void Pack(const Source& source, int lanes, int64_t terms, const Panels& to) {
  const auto pack = source.table == &TableOf(true) ? PackAs<E5M2> : PackAs<E4M3>;
  pack(source, lanes, terms, to);
}

}  // namespace

const DotKernels kAvx2Float8Dot = {1, Pack, MultiplyTile<AddFloats>, nullptr, WriteFloats};

}  // namespace mpjax

#endif
