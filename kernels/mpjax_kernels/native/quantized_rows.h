// The rows of an array, quantized to int8 in the call that multiplies them: for few rows, of which a second
// call takes longer than to quantize them.

#ifndef MPJAX_KERNELS_NATIVE_QUANTIZED_ROWS_H_
#define MPJAX_KERNELS_NATIVE_QUANTIZED_ROWS_H_

#include <string>

#include "batch.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {

class QuantizedRows {
 public:
  // Quantizes [..., rows, terms] of floats, if it is that, by the scale of each row's amax.
  QuantizedRows(xla::ffi::ThreadPool& pool, const xla::ffi::AnyBuffer& x);

  // What is wrong with the array, or an empty string.
  const std::string& refusal() const { return refusal_; }
  bool in_memory() const { return values_.data() != nullptr && scales_.data() != nullptr; }

  View values() const { return {xla::ffi::S8, sizes_, values_.data()}; }
  View scales() const {
    return {xla::ffi::F32, sizes_.first(sizes_.size() - 1), scales_.data()};
  }

 private:
  Dimensions sizes_;
  Scratch values_, scales_;
  std::string refusal_;
};

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_QUANTIZED_ROWS_H_
