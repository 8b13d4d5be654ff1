// The call `mpjax_weight_dot`: a batch of products of an array by a weight of int8, int4 or float8,
// whose scales may vary in groups along the terms, scaled and cast.
//
// lhs is float32, bfloat16 or float16; `weight_call.h` has the shapes. Sums are in float32.

#include <cstring>
#include <string>

#include "batch_loop.h"
#include "isa.h"
#include "real_type.h"
#include "weight_call.h"
#include "weight_product.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

// Less work is done before another thread is awake.
constexpr double kWorthAThread = 5e5;
constexpr int64_t kWorthConverting = int64_t{1} << 18;  // numbers of the array, by several threads

const WeightKernels& InFloat32([[maybe_unused]] bool is_float8) {
#if defined(MPJAX_HAS_AVX512_BF16)
  if (is_float8 && CurrentIsa() >= Isa::kAvx512Bf16) return kAvx512Float8Weight;
#endif
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (!is_float8 && CurrentIsa() >= Isa::kAvx512Vnni) return kAvx512Weight;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Weight;
#endif
  return kPortableWeight;
}

const WeightKernels& Best(bool is_float8) {
#if defined(MPJAX_HAS_AVX512_BF16)
  if (CurrentIsa() >= Isa::kAvx512Bf16) {
    return is_float8 ? kAvx512Float8WeightPairs : kAvx512WeightPairs;
  }
#endif
  return InFloat32(is_float8);
}

bool IsFloat8(ffi::DataType type) { return type == ffi::F8E4M3FN || type == ffi::F8E5M2; }

struct Call : WeightCall {
  // What is wrong with it, or an empty string.
  std::string Refusal() const {
    if (!IsReal(lhs.element_type())) return "lhs is not float32, bfloat16 or float16";
    const auto type = weight.element_type();
    if (type != ffi::S8 && !is_int4() && !IsFloat8(type)) {
      return "the weight is not int8, int4, E4M3FN or E5M2";
    }
    const std::string wrong = WeightCall::Refusal();
    if (!wrong.empty()) return wrong;
    if (is_int4() && (terms_last ? terms() : lanes()) % 2 != 0) {
      return "the last axis of an int4 weight is odd";
    }
    if (has_zero() && IsFloat8(type)) return "a float8 weight has no zero points";
    return "";
  }

  const DecodeTable* table() const {
    const auto type = weight.element_type();
    return IsFloat8(type) ? &TableOf(type == ffi::F8E5M2) : nullptr;
  }

  WeightProduct Product(int64_t b) const {
    const Real left_type = RealOf(lhs.element_type()), out_type = RealOf(out.element_type());
    const int64_t matrix = terms() * lanes(), scales = groups() * lanes();
    char* to = static_cast<char*>(out.untyped_data());
    WeightProduct p;
    p.left = At<char>(lhs, b, rows() * terms() * BytesOf(left_type));
    p.left_type = left_type;
    p.rows = rows();
    p.terms = terms();
    p.weight = {At<uint8_t>(weight, b, is_int4() ? matrix / 2 : matrix), is_int4(), terms_last,
                terms_last ? terms() : lanes(), table()};
    p.lanes = lanes();
    p.groups = groups();
    p.scale = At<float>(scale, b, scales);
    p.zero = has_zero() ? At<int8_t>(zero, b, scales) : nullptr;
    p.out = to + b * rows() * lanes() * BytesOf(out_type);
    p.out_type = out_type;
    return p;
  }
};

ffi::Error WeightDot(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer weight,
                     ffi::AnyBuffer scale, ffi::AnyBuffer zero, ffi::Result<ffi::AnyBuffer> result,
                     bool weight_terms_last) {
  const ffi::AnyBuffer out = *result;
  const Call call = {{lhs, weight, scale, zero, out, weight_terms_last}};
  const std::string wrong = call.Refusal();
  if (!wrong.empty()) return ffi::Error::InvalidArgument("mpjax_weight_dot: " + wrong);
  if (out.element_count() == 0) return ffi::Error::Success();
  if (call.terms() == 0) {
    std::memset(out.untyped_data(), 0, out.size_bytes());
    return ffi::Error::Success();
  }
  const int64_t batch = call.products();
  const bool is_float8 = call.table() != nullptr;
  const double work = static_cast<double>(out.element_count()) * static_cast<double>(call.terms());
  const bool are_many_rows = call.rows() * call.terms() >= kWorthConverting;
  const Shared shared = work < kWorthAThread ? Shared::kNothing
                        : are_many_rows      ? Shared::kRowsAndTiles
                                             : Shared::kTiles;
  const bool in_memory = ComputeBatch(pool, batch, shared, [&](int64_t b) {
    return WeightTiles(InFloat32(is_float8), Best(is_float8), call.Product(b));
  });
  if (in_memory) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mpjax_weight_dot: no memory");
}

}  // namespace
}  // namespace mpjax

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mpjax_weight_dot(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_weight_dot, mpjax::WeightDot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs
                                  .Arg<xla::ffi::AnyBuffer>()  // weight
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // zero
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<bool>("weight_terms_last"));
