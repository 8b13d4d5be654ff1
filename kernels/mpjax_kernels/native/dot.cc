// The calls `mpjax_float8_dot` and `mpjax_int8_dot`: a batch of products of 8-bit matrices, scaled
// and cast.
//
//   out[i, j] = cast((sum over t of lhs[i, t] * rhs[t, j]) * lhs_scale[i] * rhs_scale[j])
//
// lhs is stored [..., rows, terms], or [..., terms, rows] where `lhs_terms_last` is false; rhs
// [..., terms, columns], or [..., columns, terms] where `rhs_terms_last` is true. A scale is
// [..., lanes] or [..., 1]. Batch axes come first, and a size of 1 broadcasts. Sums are
// in float32, or in int32 where they are of int8, and scaled in float32.

#include "dot.h"

#include <atomic>
#include <string>

#include "batch.h"
#include "isa.h"
#include "parallel.h"
#include "product.h"
#include "real_type.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

class PoolLoop : public Loop {
 public:
  explicit PoolLoop(ffi::ThreadPool& pool) : pool_(pool) {}
  void Run(int64_t count, void (*body)(void*, int64_t), void* data, Claims claims) override {
    ParallelFor(pool_, count, [=](int64_t i) { body(data, i); }, claims);
  }

 private:
  ffi::ThreadPool& pool_;
};

class PlainLoop : public Loop {
 public:
  void Run(int64_t count, void (*body)(void*, int64_t), void* data, Claims) override {
    for (int64_t i = 0; i < count; ++i) body(data, i);
  }
};

// What a call multiplies.
struct Family {
  const char* call;
  const char* formats;
  bool (*has)(ffi::DataType type);
  const DotKernels& (*kernels)();
};

const DotKernels& Float8Kernels() {
#if defined(MPJAX_HAS_AVX512_BF16)
  if (CurrentIsa() >= Isa::kAvx512Bf16) return kAvx512Float8Dot;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Float8Dot;
#endif
  return kPortableFloat8Dot;
}

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

bool IsFloat8(ffi::DataType type) { return type == ffi::F8E4M3FN || type == ffi::F8E5M2; }
bool IsInt8(ffi::DataType type) { return type == ffi::S8; }

constexpr Family kFloat8 = {"mpjax_float8_dot", "E4M3FN or E5M2", IsFloat8, Float8Kernels};
constexpr Family kInt8 = {"mpjax_int8_dot", "int8", IsInt8, Int8Kernels};

// Less work is done before another thread is awake: in multiplications, of which a byte that comes
// from memory takes the time of so many.
constexpr double kWorthAThread = 4e6, kMultiplicationsPerByte = 8;

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
  std::string Refusal(const Family& family, const Dimensions& out, int64_t expected_lanes,
                      int64_t expected_terms) const {
    const std::string operand = name;
    const size_t batch = out.size() - 2;
    if (!family.has(values.element_type())) return operand + " is not " + family.formats;
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
    const ffi::DataType type = values.element_type();
    matrix.table = IsFloat8(type) ? &TableOf(type == ffi::F8E5M2) : nullptr;
    matrix.scale = static_cast<const float*>(scale.untyped_data()) + of_scale * scales;
    matrix.scale_stride = scales == 1 ? 0 : 1;
    return matrix;
  }
};

ffi::Error Dot(const Family& family, ffi::ThreadPool pool, const Operand& left,
               const Operand& right, ffi::AnyBuffer out) {
  const auto shape = out.dimensions();
  const auto type = out.element_type();
  const auto invalid = [&](const std::string& why) {
    return ffi::Error::InvalidArgument(std::string(family.call) + ": " + why);
  };
  if (shape.size() < 2 || left.rank() != shape.size()) {
    return invalid("operands and result differ in rank");
  }
  if (!IsReal(type)) return invalid("the result is not float32, bfloat16 or float16");
  const int64_t rows = shape[shape.size() - 2], columns = shape[shape.size() - 1];
  std::string wrong = left.Refusal(family, shape, rows, left.terms());
  if (wrong.empty()) wrong = right.Refusal(family, shape, columns, left.terms());
  if (!wrong.empty()) return invalid(wrong);
  if (out.element_count() == 0) return ffi::Error::Success();

  const int64_t batch = static_cast<int64_t>(out.element_count()) / (rows * columns);
  const Real real = RealOf(type);
  const auto compute = [&](int64_t b, Loop& loop) {
    char* to = static_cast<char*>(out.untyped_data()) + b * rows * columns * BytesOf(real);
    const Product product = {left.At(shape, b), right.At(shape, b), left.terms(), to, real};
    return Compute(family.kernels(), product, loop);
  };
  std::atomic<bool> in_memory{true};
  const auto alone = [&](int64_t b) {
    PlainLoop loop;
    if (!compute(b, loop)) in_memory = false;
  };
  const double work = static_cast<double>(out.element_count()) * static_cast<double>(left.terms());
  const size_t bytes_read = left.values.element_count() + right.values.element_count();
  if (work + kMultiplicationsPerByte * static_cast<double>(bytes_read) < kWorthAThread) {
    KeepSubnormals keep;
    for (int64_t b = 0; b < batch; ++b) alone(b);
  } else if (batch == 1) {
    PoolLoop loop(pool);
    in_memory = compute(0, loop);
  } else {  // small matrices as a rule: each by one thread
    ParallelFor(pool, batch, alone);
  }
  if (in_memory) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(family.call) + ": no memory");
}

template <const Family& family>
ffi::Error Call(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                ffi::AnyBuffer lhs_scale, ffi::AnyBuffer rhs_scale, ffi::Result<ffi::AnyBuffer> out,
                bool lhs_terms_last, bool rhs_terms_last) {
  return Dot(family, pool, {"lhs", lhs, lhs_scale, lhs_terms_last},
             {"rhs", rhs, rhs_scale, rhs_terms_last}, *out);
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
