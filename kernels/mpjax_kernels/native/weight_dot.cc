// The call `mpjax_weight_dot`: a batch of products of an array by a weight of int8, int4 or float8,
// whose scales may vary in groups along the terms, scaled and cast.
//
// lhs is float32, bfloat16 or float16 [..., rows, terms]; the weight [..., terms, columns], or [..., columns,
// terms] where `weight_terms_last` is true; scale float32 [..., groups, columns]; zero int8 of the
// shape of scale, or with no groups if there are no zero points. Batch axes come first, and a size of
// 1 broadcasts. XLA holds two int4 in a byte, the first in its lower half. Sums are in float32.

#include <cstring>
#include <string>

#include "batch.h"
#include "batch_loop.h"
#include "isa.h"
#include "real_type.h"
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

struct Call {
  const ffi::AnyBuffer& lhs;
  const ffi::AnyBuffer& weight;
  const ffi::AnyBuffer& scale;
  const ffi::AnyBuffer& zero;
  const ffi::AnyBuffer& out;
  bool terms_last;

  size_t rank() const { return out.dimensions().size(); }
  size_t batch() const { return rank() - 2; }
  int64_t rows() const { return out.dimensions()[rank() - 2]; }
  int64_t lanes() const { return out.dimensions()[rank() - 1]; }
  int64_t terms() const { return lhs.dimensions()[rank() - 1]; }
  int64_t groups() const { return scale.dimensions()[rank() - 2]; }
  bool has_zero() const { return zero.dimensions()[rank() - 2] != 0; }

  static bool Ends(const ffi::AnyBuffer& of, int64_t first, int64_t second) {
    const auto sizes = of.dimensions();
    return sizes[sizes.size() - 2] == first && sizes[sizes.size() - 1] == second;
  }

  // What is wrong with it, or an empty string.
  std::string Refusal() const {
    if (!IsReal(lhs.element_type())) return "lhs is not float32, bfloat16 or float16";
    if (!IsReal(out.element_type())) return "the result is not float32, bfloat16 or float16";
    const auto type = weight.element_type();
    if (type != ffi::S8 && type != ffi::S4 && !IsFloat8(type)) {
      return "the weight is not int8, int4, E4M3FN or E5M2";
    }
    if (scale.element_type() != ffi::F32) return "the scale is not float32";
    if (zero.element_type() != ffi::S8) return "the zero points are not int8";
    if (rank() < 2) return "the result has fewer than two axes";
    for (const ffi::AnyBuffer* operand : {&lhs, &weight, &scale, &zero}) {
      const auto sizes = operand->dimensions();
      if (sizes.size() != rank()) return "operands and result differ in rank";
      if (!Broadcasts(sizes, out.dimensions(), batch())) return "the batches do not go together";
    }
    if (!Ends(lhs, rows(), terms())) return "lhs has not the rows of the result";
    const bool fits = terms_last ? Ends(weight, lanes(), terms()) : Ends(weight, terms(), lanes());
    if (!fits) return "the weight has a shape that does not go with lhs and the result";
    if (type == ffi::S4 && (terms_last ? terms() : lanes()) % 2 != 0) {
      return "the last axis of an int4 weight is odd";
    }
    if (groups() < 1 || terms() % groups() != 0 || !Ends(scale, groups(), lanes())) {
      return "the scale is not [groups, columns], of groups that divide the terms";
    }
    if (!Ends(zero, has_zero() ? groups() : 0, lanes())) {
      return "the zero points have not the shape of the scale";
    }
    if (has_zero() && IsFloat8(type)) return "a float8 weight has no zero points";
    return "";
  }

  template <typename T>
  const T* At(const ffi::AnyBuffer& of, int64_t b, int64_t numbers) const {
    const int64_t index = BatchIndex(of.dimensions(), out.dimensions(), batch(), b);
    return static_cast<const T*>(of.untyped_data()) + index * numbers;
  }

  const DecodeTable* table() const {
    const auto type = weight.element_type();
    return IsFloat8(type) ? &TableOf(type == ffi::F8E5M2) : nullptr;
  }

  WeightProduct Product(int64_t b) const {
    const bool is_int4 = weight.element_type() == ffi::S4;
    const Real left_type = RealOf(lhs.element_type()), out_type = RealOf(out.element_type());
    const int64_t matrix = terms() * lanes(), scales = groups() * lanes();
    char* to = static_cast<char*>(out.untyped_data());
    WeightProduct p;
    p.left = At<char>(lhs, b, rows() * terms() * BytesOf(left_type));
    p.left_type = left_type;
    p.rows = rows();
    p.terms = terms();
    p.weight = {At<uint8_t>(weight, b, is_int4 ? matrix / 2 : matrix), is_int4, terms_last,
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
  const Call call = {lhs, weight, scale, zero, out, weight_terms_last};
  const std::string wrong = call.Refusal();
  if (!wrong.empty()) return ffi::Error::InvalidArgument("mpjax_weight_dot: " + wrong);
  if (out.element_count() == 0) return ffi::Error::Success();
  if (call.terms() == 0) {
    std::memset(out.untyped_data(), 0, out.size_bytes());
    return ffi::Error::Success();
  }
  const int64_t batch = static_cast<int64_t>(out.element_count()) / (call.rows() * call.lanes());
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
