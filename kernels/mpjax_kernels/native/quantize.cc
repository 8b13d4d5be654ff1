// The call `mpjax_quantize`: tensors in float8 or int8 by a scale each, and their amaxes, in a pass.
// A matrix with a scale per row is that many tensors.
//
//   amax   = largest |x|, NaN where an entry is not finite
//   known  = scale; that of the amax where `scale` is 0; NaN where it or the amax is not finite
//   values = saturate(round(x / known)), all 0 where that is NaN
//
// A scale that is not known yet takes a pass more. The rules are those of `_quantize.py`.

#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "isa.h"
#include "parallel.h"
#include "real_type.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunk = 32768;  // entries

const QuantizeKernels& CurrentKernels() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kAvx512Quantize;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Quantize;
#endif
  return kPortableQuantize;
}

float AmaxOf(uint32_t bits) {
  float amax;
  std::memcpy(&amax, &bits, sizeof(amax));
  return std::isfinite(amax) ? amax : std::numeric_limits<float>::quiet_NaN();
}

float ScaleOf(float amax, float max) {
  if (amax == 0) return 1.0f;
  constexpr float kTiny = std::numeric_limits<float>::min();
  // Rounded up, the scale of the largest float32s would bring `max * scale` to infinity.
  const float most = std::nextafter(std::numeric_limits<float>::max() / max, 0.0f);
  // By the inverse, as XLA divides by a constant: all ways to a scale give the same bits.
  return std::min(std::max(amax * (1.0f / max), kTiny), most);
}

using Threads = ffi::ThreadPool*;  // null: this thread alone

template <typename Body>
void For(Threads threads, int64_t count, const Body& body) {
  if (threads != nullptr) return ParallelFor(*threads, count, body);
  for (int64_t i = 0; i < count; ++i) body(i);
}

// One tensor, in chunks that are quantized in parallel.
class Tensor {
 public:
  Tensor(Threads threads, Real type, const void* x, int64_t count, Output format, uint8_t* values)
      : threads_(threads), type_(type), x_(x), count_(count), format_(format), values_(values) {}

  // Computes everything from the scale that is given.
  void Run(float scale, float& known, float& amax) {
    float by = scale;
    if (by == 0) {
      amax = Amax();
      by = std::isfinite(amax) ? ScaleOf(amax, LargestOf(format_)) : amax;
      if (std::isfinite(by)) Quantize(by);
    } else {
      by = by > 0 ? std::max(by, std::numeric_limits<float>::min()) : by;
      amax = by > 0 && std::isfinite(by) ? Quantize(by) : Amax();
    }
    known = by > 0 && std::isfinite(amax) ? by : std::numeric_limits<float>::quiet_NaN();
    if (!std::isfinite(known)) std::memset(values_, 0, static_cast<size_t>(count_));
  }

 private:
  float Amax() {
    return LargestOfChunks([&](const char* x, int64_t, int64_t count) {
      return CurrentKernels().largest(type_, x, count);
    });
  }

  float Quantize(float scale) {
    return LargestOfChunks([&](const char* x, int64_t first, int64_t count) {
      return CurrentKernels().quantize(type_, x, count, scale, format_, values_ + first);
    });
  }

  template <typename Pass>
  float LargestOfChunks(const Pass& pass) {
    const int64_t bytes = BytesOf(type_);
    std::atomic<uint32_t> largest{0};
    For(threads_, (count_ + kChunk - 1) / kChunk, [&](int64_t i) {
      const int64_t first = i * kChunk, count = std::min(kChunk, count_ - first);
      const char* x = static_cast<const char*>(x_) + first * bytes;
      const uint32_t found = pass(x, first, count);
      uint32_t seen = largest.load();
      while (found > seen && !largest.compare_exchange_weak(seen, found)) {
      }
    });
    return AmaxOf(largest.load());
  }

  const Threads threads_;
  const Real type_;
  const void* const x_;
  const int64_t count_;
  const Output format_;
  uint8_t* const values_;
};

// What is wrong with the arguments, or null. There are as many tensors as amaxes.
const char* Refusal(const ffi::AnyBuffer& x, const ffi::AnyBuffer& scale,
                    const ffi::AnyBuffer& values, const ffi::AnyBuffer& known,
                    const ffi::AnyBuffer& amax) {
  if (!IsReal(x.element_type())) return "x is not float32, bfloat16 or float16";
  const ffi::DataType type = values.element_type();
  if (type != ffi::F8E4M3FN && type != ffi::F8E5M2 && type != ffi::S8) {
    return "the values are neither E4M3FN nor E5M2 nor int8";
  }
  for (const ffi::AnyBuffer* each : {&scale, &known, &amax}) {
    if (each->element_type() != ffi::F32) return "scale and amax must be float32";
    if (each->element_count() != amax.element_count()) return "scale and amax differ in size";
  }
  if (values.element_count() != x.element_count()) return "x and values differ in size";
  if (amax.element_count() != 0 && x.element_count() % amax.element_count() != 0) {
    return "the tensors with a scale each differ in size";
  }
  return nullptr;
}

ffi::Error QuantizeTensors(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                           ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> known,
                           ffi::Result<ffi::AnyBuffer> amax) {
  const char* refusal = Refusal(x, scale, *values, *known, *amax);
  if (refusal != nullptr) {
    return ffi::Error::InvalidArgument(std::string("mpjax_quantize: ") + refusal);
  }
  const int64_t tensors = static_cast<int64_t>(amax->element_count());
  if (tensors == 0) return ffi::Error::Success();
  const int64_t count = static_cast<int64_t>(x.element_count()) / tensors;
  const Output format = values->element_type() == ffi::S8       ? Output::kInt8
                        : values->element_type() == ffi::F8E5M2 ? Output::kE5M2
                                                                : Output::kE4M3;
  const Real type = RealOf(x.element_type());
  const int64_t bytes = BytesOf(type);
  const float* scales = static_cast<const float*>(scale.untyped_data());
  const auto quantize = [&](int64_t i, Threads threads) {
    Tensor tensor(threads, type, static_cast<const char*>(x.untyped_data()) + i * count * bytes,
                  count, format, static_cast<uint8_t*>(values->untyped_data()) + i * count);
    tensor.Run(scales[i], static_cast<float*>(known->untyped_data())[i],
               static_cast<float*>(amax->untyped_data())[i]);
  };
  KeepSubnormals keep;
  if (count > kChunk) {
    for (int64_t i = 0; i < tensors; ++i) quantize(i, &pool);
    return ffi::Error::Success();
  }
  const int64_t at_once = kChunk / std::max<int64_t>(1, count);  // tensors of a chunk
  ParallelFor(pool, (tensors + at_once - 1) / at_once, [&](int64_t chunk) {
    const int64_t first = chunk * at_once, end = std::min(tensors, first + at_once);
    for (int64_t i = first; i < end; ++i) quantize(i, nullptr);
  });
  return ffi::Error::Success();
}

}  // namespace

float QuantizeByAmax(Real type, const void* x, int64_t count, Output format, uint8_t* values) {
  float known, amax;
  Tensor(nullptr, type, x, count, format, values).Run(0, known, amax);
  return known;
}

}  // namespace mpjax

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mpjax_quantize(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_quantize, mpjax::QuantizeTensors,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>()  // values
                                  .Ret<xla::ffi::AnyBuffer>()  // known
                                  .Ret<xla::ffi::AnyBuffer>());  // amax
