// The call `mpjax_float8_dot`: a batch of products of float8 matrices, scaled and cast.
//
//   out[i, j] = cast((sum over t of lhs[i, t] * rhs[t, j]) * lhs_scale[i] * rhs_scale[j])
//
// lhs is stored [..., rows, terms], or [..., terms, rows] where `lhs_terms_last` is false; rhs
// [..., terms, columns], or [..., columns, terms] where `rhs_terms_last` is true. A scale is
// [..., lanes] or [..., 1]. Batch axes come first, and a size of 1 broadcasts. Sums and scaling are
// in float32.

#include "dot.h"

#include <atomic>
#include <string>

#include "isa.h"
#include "parallel.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

class PoolLoop : public Loop {
 public:
  explicit PoolLoop(ffi::ThreadPool& pool) : pool_(pool) {}
  void Run(int64_t count, void (*body)(void*, int64_t), void* data) override {
    ParallelFor(pool_, count, [=](int64_t i) { body(data, i); });
  }

 private:
  ffi::ThreadPool& pool_;
};

class PlainLoop : public Loop {
 public:
  void Run(int64_t count, void (*body)(void*, int64_t), void* data) override {
    for (int64_t i = 0; i < count; ++i) body(data, i);
  }
};

using Dimensions = ffi::AnyBuffer::Dimensions;

bool IsFloat8(ffi::DataType type) { return type == ffi::F8E4M3FN || type == ffi::F8E5M2; }

// Whether the first `count` sizes are those of the result or 1.
bool Broadcasts(const Dimensions& sizes, const Dimensions& out, size_t count) {
  for (size_t axis = 0; axis < count; ++axis) {
    if (sizes[axis] != out[axis] && sizes[axis] != 1) return false;
  }
  return true;
}

// Which matrix of an operand, whose first `count` axes are a batch, is that of the result's b-th.
int64_t BatchIndex(const Dimensions& sizes, const Dimensions& out, size_t count, int64_t b) {
  int64_t index = 0, stride = 1;
  for (size_t axis = count; axis-- > 0;) {
    if (sizes[axis] != 1) index += b % out[axis] * stride;
    stride *= sizes[axis];
    b /= out[axis];
  }
  return index;
}

// An operand as the call gives it.
struct Operand {
  const char* name;
  const ffi::AnyBuffer& values;
  const ffi::AnyBuffer& scale;
  bool terms_last;

  int64_t terms() const { return values.dimensions()[rank() - (terms_last ? 1 : 2)]; }
  int64_t lanes() const { return values.dimensions()[rank() - (terms_last ? 2 : 1)]; }
  size_t rank() const { return values.dimensions().size(); }

  // What is wrong with it, or an empty string.
  std::string Refusal(const Dimensions& out, int64_t expected_lanes, int64_t expected_terms) const {
    const std::string operand = name;
    const size_t batch = out.size() - 2;
    if (!IsFloat8(values.element_type())) return operand + " is neither E4M3FN nor E5M2";
    if (rank() != out.size() || lanes() != expected_lanes || terms() != expected_terms ||
        !Broadcasts(values.dimensions(), out, batch)) {
      return operand + " has a shape that does not go with the other operand and the result";
    }
    const auto scales = scale.dimensions();
    if (scale.element_type() != ffi::F32) return "the scale of " + operand + " is not float32";
    if (scales.size() != batch + 1 || !Broadcasts(scales, out, batch) ||
        (scales[batch] != 1 && scales[batch] != lanes())) {
      return "the scale of " + operand + " has neither one entry nor one for each of its lanes";
    }
    return "";
  }

  // The matrix that the b-th of the result is a product of.
  Matrix At(const Dimensions& out, int64_t b) const {
    const size_t batch = out.size() - 2;
    const int64_t of_values = BatchIndex(values.dimensions(), out, batch, b);
    const int64_t of_scale = BatchIndex(scale.dimensions(), out, batch, b);
    const int64_t scales = scale.dimensions()[batch];
    Matrix matrix;
    const uint8_t* first = static_cast<const uint8_t*>(values.untyped_data());
    matrix.data = first + of_values * lanes() * terms();
    matrix.lanes = lanes();
    matrix.lane_stride = terms_last ? terms() : 1;
    matrix.term_stride = terms_last ? 1 : lanes();
    matrix.table = &TableOf(values.element_type() == ffi::F8E5M2);
    matrix.scale = static_cast<const float*>(scale.untyped_data()) + of_scale * scales;
    matrix.scale_stride = scales == 1 ? 0 : 1;
    return matrix;
  }
};

const DotKernels& CurrentKernels() {
#if defined(MPJAX_HAS_AVX512_BF16)
  if (CurrentIsa() == Isa::kAvx512Bf16) return kAvx512Dot;
#endif
  return kPortableDot;
}

ffi::Error Dot(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
               ffi::AnyBuffer lhs_scale, ffi::AnyBuffer rhs_scale, ffi::Result<ffi::AnyBuffer> out,
               bool lhs_terms_last, bool rhs_terms_last) {
  const auto shape = out->dimensions();
  const auto type = out->element_type();
  const Operand left = {"lhs", lhs, lhs_scale, lhs_terms_last};
  const Operand right = {"rhs", rhs, rhs_scale, rhs_terms_last};
  if (shape.size() < 2 || left.rank() != shape.size()) {
    return ffi::Error::InvalidArgument("mpjax_float8_dot: operands and result differ in rank");
  }
  if (type != ffi::F32 && type != ffi::BF16) {
    return ffi::Error::InvalidArgument("mpjax_float8_dot: the result is not float32 or bfloat16");
  }
  const int64_t rows = shape[shape.size() - 2], columns = shape[shape.size() - 1];
  std::string wrong = left.Refusal(shape, rows, left.terms());
  if (wrong.empty()) wrong = right.Refusal(shape, columns, left.terms());
  if (!wrong.empty()) return ffi::Error::InvalidArgument("mpjax_float8_dot: " + wrong);
  if (out->element_count() == 0) return ffi::Error::Success();

  const int64_t batch = static_cast<int64_t>(out->element_count()) / (rows * columns);
  const int64_t bytes = type == ffi::BF16 ? 2 : 4;
  const auto compute = [&](int64_t b, Loop& loop) {
    char* to = static_cast<char*>(out->untyped_data()) + b * rows * columns * bytes;
    const Product product = {left.At(shape, b), right.At(shape, b), left.terms(), to,
                             type == ffi::BF16};
    return Compute(CurrentKernels(), product, loop);
  };
  std::atomic<bool> in_memory{true};
  if (batch == 1) {
    PoolLoop loop(pool);
    in_memory = compute(0, loop);
  } else {  // small matrices as a rule: each by one thread
    ParallelFor(pool, batch, [&](int64_t b) {
      PlainLoop loop;
      if (!compute(b, loop)) in_memory = false;
    });
  }
  if (in_memory) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mpjax_float8_dot: out of memory");
}

}  // namespace
}  // namespace mpjax

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mpjax_float8_dot(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_float8_dot, mpjax::Dot,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs
                                  .Arg<xla::ffi::AnyBuffer>()  // rhs
                                  .Arg<xla::ffi::AnyBuffer>()  // lhs_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // rhs_scale
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<bool>("lhs_terms_last")
                                  .Attr<bool>("rhs_terms_last"));
