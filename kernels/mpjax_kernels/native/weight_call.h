// What the calls `mpjax_grouped_dot` and `mpjax_weight_dot` share: a batch of products by a weight whose
// scales may vary in groups along the terms.
//
// lhs is [..., rows, terms]; the weight [..., terms, columns], or [..., columns, terms] where `terms_last`
// is true; scale float32 [..., groups, columns]; zero int8 of the shape of that, or with no groups if there
// are no zero points. Batch axes come first, and a size of 1 broadcasts. XLA holds two int4 in a byte, the
// first in its lower half.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_CALL_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_CALL_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "batch.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {

struct WeightCall {
  View lhs;
  View weight;
  View scale;
  View zero;
  xla::ffi::AnyBuffer out;
  bool terms_last;

  size_t rank() const { return out.dimensions().size(); }
  size_t batch() const { return rank() - 2; }
  int64_t rows() const { return out.dimensions()[rank() - 2]; }
  int64_t lanes() const { return out.dimensions()[rank() - 1]; }
  int64_t terms() const { return lhs.dimensions()[rank() - 1]; }
  int64_t groups() const { return scale.dimensions()[rank() - 2]; }
  bool is_int4() const { return weight.element_type() == xla::ffi::S4; }
  bool has_zero() const { return zero.dimensions()[rank() - 2] != 0; }
  int64_t products() const;  // of a result that is not empty

  // What is wrong with the dtypes of scale, zero and out, or with shapes, or an empty string.
  std::string Refusal() const;

  // The b-th matrix of an operand, each of so many entries.
  template <typename T>
  const T* At(const View& of, int64_t b, int64_t entries) const {
    const int64_t index = BatchIndex(of.dimensions(), out.dimensions(), batch(), b);
    return static_cast<const T*>(of.untyped_data()) + index * entries;
  }
};

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_CALL_H_
