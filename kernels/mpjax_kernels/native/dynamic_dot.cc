// The call `mpjax_dynamic_int8_dot`: rows of an array, quantized to int8 by the scale of each one's amax
// (`quantize.cc`), by a matrix of int8 (`dot.cc`).
//
//   out[i, j] = cast((sum over t of lhs_int8[i, t] * rhs[t, j]) * lhs_scale[i] * rhs_scale[j])
//
// lhs is [..., rows, terms], of floats; all else as in `mpjax_int8_dot`. It is for few rows: a second
// call takes longer than to quantize them.

#include <string>

#include "dot_call.h"
#include "parallel.h"
#include "quantize.h"
#include "real_type.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr Family kFamily = {"mpjax_dynamic_int8_dot", "int8", IsInt8, Int8Kernels};
constexpr int64_t kWorthAThread = 32768;  // numbers to quantize

ffi::Error Invalid(const std::string& why) {
  return ffi::Error::InvalidArgument(std::string(kFamily.call) + ": " + why);
}

ffi::Error DynamicDot(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                      ffi::AnyBuffer rhs_scale, ffi::Result<ffi::AnyBuffer> out,
                      bool rhs_terms_last) {
  if (!IsReal(lhs.element_type())) return Invalid("lhs is not float32, bfloat16 or float16");
  const auto sizes = lhs.dimensions();
  if (sizes.size() < 2) return Invalid("lhs has fewer than two axes");
  const int64_t numbers = static_cast<int64_t>(lhs.element_count());
  const int64_t terms = sizes[sizes.size() - 1];
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < sizes.size(); ++axis) rows *= sizes[axis];
  Scratch values(static_cast<size_t>(numbers / 2 + 1)), scales(static_cast<size_t>(2 * rows + 1));
  if (values.data() == nullptr || scales.data() == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(kFamily.call) + ": no memory");
  }
  uint8_t* to = reinterpret_cast<uint8_t*>(values.data());
  float* scale = reinterpret_cast<float*>(scales.data());
  const Operand left("lhs", sizes, to, scale), right("rhs", rhs, rhs_scale, rhs_terms_last);
  const std::string wrong = Refusal(kFamily, left, right, *out);
  if (!wrong.empty()) return Invalid(wrong);

  const Real type = RealOf(lhs.element_type());
  const char* from = static_cast<const char*>(lhs.untyped_data());
  const auto quantize = [&](int64_t row) {
    const char* x = from + row * terms * BytesOf(type);
    scale[row] = QuantizeByAmax(type, x, terms, Output::kInt8, to + row * terms);
  };
  if (numbers >= kWorthAThread) {
    ParallelFor(pool, rows, quantize);
  } else {
    KeepSubnormals keep;
    for (int64_t row = 0; row < rows; ++row) quantize(row);
  }
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
