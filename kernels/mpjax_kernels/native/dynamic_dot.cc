// The call `mpjax_dynamic_int8_dot`: rows of an array, quantized to int8 by the scale of each one's amax
// (`quantized_rows.h`), by a matrix of int8 (`dot.cc`).
//
//   out[i, j] = cast((sum over t of lhs_int8[i, t] * rhs[t, j]) * lhs_scale[i] * rhs_scale[j])
//
// lhs is [..., rows, terms], of floats; all else as in `mpjax_int8_dot`.

#include <string>

#include "dot_call.h"
#include "quantized_rows.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr Family kFamily = {"mpjax_dynamic_int8_dot", "int8", IsInt8, Int8Kernels};

ffi::Error DynamicDot(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                      ffi::AnyBuffer rhs_scale, ffi::Result<ffi::AnyBuffer> out,
                      bool rhs_terms_last) {
  const std::string call = std::string(kFamily.call) + ": ";
  const QuantizedRows rows(pool, lhs);
  if (!rows.refusal().empty()) return ffi::Error::InvalidArgument(call + rows.refusal());
  if (!rows.in_memory()) return ffi::Error(ffi::ErrorCode::kResourceExhausted, call + "no memory");
  const Operand left("lhs", rows.values(), rows.scales(), true);
  const Operand right("rhs", rhs, rhs_scale, rhs_terms_last);
  const std::string wrong = Refusal(kFamily, left, right, *out);
  if (!wrong.empty()) return ffi::Error::InvalidArgument(call + wrong);
  return Multiply(kFamily, pool, left, right, *out);
}

}  // namespace
}  // namespace mpjax

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mpjax_dynamic_int8_dot(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_dynamic_int8_dot, mpjax::DynamicDot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs
                                  .Arg<xla::ffi::AnyBuffer>()  // rhs
                                  .Arg<xla::ffi::AnyBuffer>()  // rhs_scale
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<bool>("rhs_terms_last"));
