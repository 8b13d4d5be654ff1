// The calls `mpjax_float8_dot` and `mpjax_int8_dot`: a batch of products of 8-bit matrices, scaled
// and cast.
//
//   out[i, j] = cast((sum over t of lhs[i, t] * rhs[t, j]) * lhs_scale[i] * rhs_scale[j])
//
// lhs is stored [..., rows, terms], or [..., terms, rows] where `lhs_terms_last` is false; rhs
// [..., terms, columns], or [..., columns, terms] where `rhs_terms_last` is true. A scale is
// [..., lanes] or [..., 1]. Batch axes come first, and a size of 1 broadcasts. Sums are
// in float32, or in int32 where they are of int8, and scaled in float32.

#include <string>

#include "dot_call.h"
#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

const DotKernels& Float8Kernels() {
#if defined(MPJAX_HAS_AVX512_BF16)
  if (CurrentIsa() >= Isa::kAvx512Bf16) return kAvx512Float8Dot;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Float8Dot;
#endif
  return kPortableFloat8Dot;
}

bool IsFloat8(ffi::DataType type) { return type == ffi::F8E4M3FN || type == ffi::F8E5M2; }

}  // namespace

const DotKernels& Int8Kernels() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kAvx512Int8Dot;
#endif
#if defined(MPJAX_HAS_AVX_VNNI)
  if (CurrentIsa() == Isa::kAvxVnni && HasAvxVnni()) return kAvxVnniInt8Dot;
#endif
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() == Isa::kAvxVnni) return kAvx512Int8Dot256;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Int8Dot;
#endif
  return kPortableInt8Dot;
}

bool IsInt8(ffi::DataType type) { return type == ffi::S8; }

namespace {

constexpr Family kFloat8 = {"mpjax_float8_dot", "E4M3FN or E5M2", IsFloat8, Float8Kernels};
constexpr Family kInt8 = {"mpjax_int8_dot", "int8", IsInt8, Int8Kernels};

template <const Family& family>
ffi::Error Call(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                ffi::AnyBuffer lhs_scale, ffi::AnyBuffer rhs_scale, ffi::Result<ffi::AnyBuffer> out,
                bool lhs_terms_last, bool rhs_terms_last) {
  const Operand left("lhs", lhs, lhs_scale, lhs_terms_last);
  const Operand right("rhs", rhs, rhs_scale, rhs_terms_last);
  const std::string wrong = Refusal(family, left, right, *out);
  if (!wrong.empty()) return ffi::Error::InvalidArgument(std::string(family.call) + ": " + wrong);
  return Multiply(family, pool, left, right, *out);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // lhs
      .Arg<ffi::AnyBuffer>()  // rhs
      .Arg<ffi::AnyBuffer>()  // lhs_scale
      .Arg<ffi::AnyBuffer>()  // rhs_scale
      .Ret<ffi::AnyBuffer>()  // out
      .Attr<bool>("lhs_terms_last")
      .Attr<bool>("rhs_terms_last");
}

}  // namespace
}  // namespace mpjax

#define MPJAX_EXPORTED extern "C" __attribute__((visibility("default")))

MPJAX_EXPORTED XLA_FFI_Error* mpjax_float8_dot(XLA_FFI_CallFrame* call_frame);
MPJAX_EXPORTED XLA_FFI_Error* mpjax_int8_dot(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_float8_dot, mpjax::Call<mpjax::kFloat8>, mpjax::Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_int8_dot, mpjax::Call<mpjax::kInt8>, mpjax::Binding());
