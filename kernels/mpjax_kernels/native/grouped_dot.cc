// The call `mpjax_grouped_dot`: a batch of products of int8 by a weight of int8 or int4 whose scales may
// vary in groups along the terms, scaled and cast.
//
// lhs is int8, and its scale float32 [..., rows] or [..., 1]; `weight_call.h` has the other operands.
//
// In `mpjax_dynamic_grouped_dot` lhs is of floats, without a scale, and is quantized in the call, by the
// scale of each row's amax (`quantized_rows.h`).

#include <cstring>
#include <string>

#include "batch.h"
#include "batch_loop.h"
#include "grouped_product.h"
#include "isa.h"
#include "quantized_rows.h"
#include "real_type.h"
#include "weight_call.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

// Less work is done before another thread is awake: in multiplications, of which a byte of the weight
// takes the time of so many.
constexpr double kWorthAThread = 4e6, kMultiplicationsPerByte = 8;

const GroupedKernels& Kernels() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kAvx512Grouped;
#endif
#if defined(MPJAX_HAS_AVX_VNNI)
  if (CurrentIsa() == Isa::kAvxVnni && HasAvxVnni()) return kAvxVnniGrouped;
#endif
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() == Isa::kAvxVnni) return kAvx512Grouped256;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Grouped;
#endif
  return kPortableGrouped;
}

struct Call : WeightCall {
  View lhs_scale;

  int64_t row_scales() const { return lhs_scale.dimensions()[batch()]; }

  // What is wrong with it, or an empty string.
  std::string Refusal() const {
    if (lhs.element_type() != ffi::S8) return "lhs is not int8";
    if (weight.element_type() != ffi::S8 && !is_int4()) return "the weight is not int8 or int4";
    if (lhs_scale.element_type() != ffi::F32) return "the scale of lhs is not float32";
    const std::string wrong = WeightCall::Refusal();
    if (!wrong.empty()) return wrong;
    const auto row_sizes = lhs_scale.dimensions();
    if (row_sizes.size() != rank() - 1 || !Broadcasts(row_sizes, out.dimensions(), batch()) ||
        (row_scales() != 1 && row_scales() != rows())) {
      return "the scale of lhs has neither one entry nor one for each row";
    }
    if (is_int4() && (terms_last ? terms() / groups() : lanes()) % 2 != 0) {
      return "the last axis of an int4 weight, or a group along it, is odd";
    }
    return "";
  }

  GroupedProduct Product(int64_t b) const {
    const int64_t matrix = terms() * lanes(), scales = groups() * lanes();
    GroupedProduct p;
    p.left = At<uint8_t>(lhs, b, rows() * terms());
    p.rows = rows();
    p.terms = terms();
    p.row_scale = At<float>(lhs_scale, b, row_scales());
    p.row_scale_stride = row_scales() == 1 ? 0 : 1;
    p.weight = {At<uint8_t>(weight, b, is_int4() ? matrix / 2 : matrix), is_int4(), terms_last,
                terms_last ? terms() : lanes(), nullptr};
    p.lanes = lanes();
    p.groups = groups();
    p.scale = At<float>(scale, b, scales);
    p.zero = has_zero() ? At<int8_t>(zero, b, scales) : nullptr;
    p.out_type = RealOf(out.element_type());
    p.out = static_cast<char*>(out.untyped_data()) + b * rows() * lanes() * BytesOf(p.out_type);
    return p;
  }
};

// Computes a call by its name, once it is checked.
ffi::Error Compute(const std::string& name, ffi::ThreadPool& pool, const Call& call) {
  const std::string wrong = call.Refusal();
  if (!wrong.empty()) return ffi::Error::InvalidArgument(name + ": " + wrong);
  ffi::AnyBuffer out = call.out;
  if (out.element_count() == 0) return ffi::Error::Success();
  if (call.terms() == 0) {
    std::memset(out.untyped_data(), 0, out.size_bytes());
    return ffi::Error::Success();
  }
  const int64_t batch = call.products();
  const double terms = static_cast<double>(call.terms());
  const double weight = terms * static_cast<double>(call.lanes());
  const double work = static_cast<double>(out.element_count()) * terms + kMultiplicationsPerByte * weight;
  // Of one tile of rows the loop over them is this thread's alone.
  const Shared shared = work < kWorthAThread ? Shared::kNothing : Shared::kRowsAndTiles;
  const bool in_memory = ComputeBatch(pool, batch, shared, [&](int64_t b) {
    return GroupedTiles(Kernels(), call.Product(b), batch > 1 ? 1 : pool.num_threads());
  });
  if (in_memory) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, name + ": no memory");
}

ffi::Error GroupedDot(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer weight,
                      ffi::AnyBuffer lhs_scale, ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                      ffi::Result<ffi::AnyBuffer> out, bool weight_terms_last) {
  return Compute("mpjax_grouped_dot", pool,
                 {{lhs, weight, scale, zero, *out, weight_terms_last}, lhs_scale});
}

ffi::Error DynamicGroupedDot(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer weight,
                             ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                             ffi::Result<ffi::AnyBuffer> out, bool weight_terms_last) {
  const std::string name = "mpjax_dynamic_grouped_dot";
  const QuantizedRows rows(pool, lhs);
  if (!rows.refusal().empty()) return ffi::Error::InvalidArgument(name + ": " + rows.refusal());
  if (!rows.in_memory()) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, name + ": no memory");
  }
  return Compute(name, pool, {{rows.values(), weight, scale, zero, *out, weight_terms_last},
                              rows.scales()});
}

}  // namespace
}  // namespace mpjax

#define MPJAX_EXPORTED extern "C" __attribute__((visibility("default")))

MPJAX_EXPORTED XLA_FFI_Error* mpjax_grouped_dot(XLA_FFI_CallFrame* call_frame);
MPJAX_EXPORTED XLA_FFI_Error* mpjax_dynamic_grouped_dot(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_grouped_dot, mpjax::GroupedDot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs
                                  .Arg<xla::ffi::AnyBuffer>()  // weight
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // zero
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<bool>("weight_terms_last"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_dynamic_grouped_dot, mpjax::DynamicGroupedDot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs
                                  .Arg<xla::ffi::AnyBuffer>()  // weight
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // zero
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<bool>("weight_terms_last"));
