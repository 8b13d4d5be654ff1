// The calls `mpjax_attention_scores` and `mpjax_attention_output`: attention to keys and values as a cache
// holds them, position by position, each with all of its heads.
//
//   scores[h, q, p] = (sum over d of query[q, h, d] * key[p, h / group, d]) * key_scale[p, h / group]
//   output[q, h, d] = sum over p of (weights[h, q, p] * value_scale[p, h / group]) * value[p, h / group, d]
//
// `group` is how many heads of a query share one of the cache. Products and sums are float32. Few queries
// (`attention_few.cc`) are bound by the reading of the cache, many (`attention_many.cc`) by the arithmetic.
//
// query is [..., queries, heads, depth], the keys and values are [..., length, cached heads, depth], their
// scale float32 [..., length, cached heads], or of no positions if they have none, and the weights and
// scores [..., heads, queries, length]. Batch axes come first, and a size of 1 broadcasts.

#include <string>

#include "attention_call.h"
#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kFewRows = 8;  // by a head of the cache

const AttentionKernels& Kernels() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kAvx512Attention;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Attention;
#endif
  return kPortableAttention;
}

ffi::Error Compute(const char* name, ffi::ThreadPool& pool, const Attention& a) {
  const std::string call = std::string(name) + ": ", wrong = a.Refusal();
  if (!wrong.empty()) return ffi::Error::InvalidArgument(call + wrong);
  ffi::AnyBuffer out = a.out;
  if (out.element_count() == 0) return ffi::Error::Success();
  const auto sizes = out.dimensions();
  int64_t batch = 1;
  for (size_t axis = 0; axis < a.batch(); ++axis) batch *= sizes[axis];
  KeepSubnormals keep;
  if (a.rows() > kFewRows) {
    MultiplyMany(a, Kernels(), pool, batch);
  } else if (!MultiplyFew(a, Kernels(), pool, batch)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, call + "no memory");
  }
  return ffi::Error::Success();
}

ffi::Error AttentionScores(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                           ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out) {
  return Compute("mpjax_attention_scores", pool, {query, key, scale, *out, false});
}

ffi::Error AttentionOutput(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::AnyBuffer value,
                           ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out) {
  return Compute("mpjax_attention_output", pool, {weights, value, scale, *out, true});
}

}  // namespace
}  // namespace mpjax

#define MPJAX_EXPORTED extern "C" __attribute__((visibility("default")))

MPJAX_EXPORTED XLA_FFI_Error* mpjax_attention_scores(XLA_FFI_CallFrame* call_frame);
MPJAX_EXPORTED XLA_FFI_Error* mpjax_attention_output(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_attention_scores, mpjax::AttentionScores,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>());  // scores

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_attention_output, mpjax::AttentionOutput,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // weights
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>());  // output
