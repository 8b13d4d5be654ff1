// What the calls of attention read and write, and how their loops are run.

#ifndef MPJAX_KERNELS_NATIVE_ATTENTION_CALL_H_
#define MPJAX_KERNELS_NATIVE_ATTENTION_CALL_H_

#include <cstdint>
#include <string>

#include "attention.h"
#include "batch.h"
#include "parallel.h"
#include "real_type.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {

inline int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool IsStored(xla::ffi::DataType type) {
  return IsReal(type) || type == xla::ffi::S8 || type == xla::ffi::F8E4M3FN;
}

inline Stored StoredOf(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::F32:
      return Stored::kFloat32;
    case xla::ffi::BF16:
      return Stored::kBfloat16;
    case xla::ffi::F16:
      return Stored::kFloat16;
    case xla::ffi::S8:
      return Stored::kInt8;
    default:
      return Stored::kE4M3;
  }
}

// Sizes of both calls, and what they read.
struct Attention {
  View queried;  // query, or weights
  View cached;
  View scale;
  xla::ffi::AnyBuffer out;
  bool is_output;

  int64_t Last(const View& of, size_t axis) const {
    return of.dimensions()[of.dimensions().size() - axis];
  }
  size_t batch() const { return out.dimensions().size() - 3; }
  int64_t length() const { return Last(cached, 3); }
  int64_t cached_heads() const { return Last(cached, 2); }
  int64_t depth() const { return Last(cached, 1); }
  int64_t heads() const { return Last(queried, is_output ? 3 : 2); }
  int64_t queries() const { return Last(queried, is_output ? 2 : 3); }
  int64_t group() const { return heads() / cached_heads(); }
  int64_t rows() const { return group() * queries(); }  // that are multiplied by a head of the cache
  int64_t terms() const { return is_output ? length() : depth(); }    // of a sum
  int64_t columns() const { return is_output ? depth() : length(); }  // of a row of the result
  int64_t row_numbers() const { return cached_heads() * depth(); }  // of a position
  int64_t cached_numbers() const { return length() * row_numbers(); }
  int64_t widened_numbers() const { return stored() == Stored::kFloat32 ? 0 : row_numbers(); }
  bool has_scale() const { return Last(scale, 2) != 0; }
  Stored stored() const { return StoredOf(cached.element_type()); }
  Real out_type() const { return RealOf(out.element_type()); }

  static bool Ends(const Dimensions& sizes, int64_t first, int64_t second, int64_t third) {
    const size_t rank = sizes.size();
    return sizes[rank - 3] == first && sizes[rank - 2] == second && sizes[rank - 1] == third;
  }

  // What is wrong with it, or an empty string.
  std::string Refusal() const {
    const std::string what = is_output ? "the weights" : "the query";
    if (!IsReal(queried.element_type())) return what + " are not float32, bfloat16 or float16";
    if (!IsStored(cached.element_type())) return "the cache is not of floats, int8 or E4M3";
    if (scale.element_type() != xla::ffi::F32) return "the scale is not float32";
    if (!IsReal(out.element_type())) return "the result is not float32, bfloat16 or float16";
    const size_t rank = out.dimensions().size();
    if (rank < 3) return "the result has fewer than three axes";
    if (queried.dimensions().size() != rank || cached.dimensions().size() != rank ||
        scale.dimensions().size() != rank - 1) {
      return "operands and result differ in rank";
    }
    for (const View* each : {&queried, &cached, &scale}) {
      if (!Broadcasts(each->dimensions(), out.dimensions(), batch())) {
        return "the batches do not go together";
      }
    }
    if (cached_heads() == 0 ? heads() != 0 : heads() % cached_heads() != 0) {
      return "the heads are no multiple of those of the cache";
    }
    const bool fits = is_output ? Ends(queried.dimensions(), heads(), queries(), length()) &&
                                      Ends(out.dimensions(), queries(), heads(), depth())
                                : Ends(queried.dimensions(), queries(), heads(), depth()) &&
                                      Ends(out.dimensions(), heads(), queries(), length());
    if (!fits) return what + " and the result have shapes that do not go with the cache";
    if ((has_scale() && Last(scale, 2) != length()) || Last(scale, 1) != cached_heads()) {
      return "the scale has not an entry for each position and head";
    }
    return "";
  }

  int64_t IndexOf(const View& of, int64_t b) const {
    return BatchIndex(of.dimensions(), out.dimensions(), batch(), b);
  }

  const char* Queried(int64_t b) const {
    const int64_t numbers = heads() * queries() * terms();
    return static_cast<const char*>(queried.untyped_data()) +
           IndexOf(queried, b) * numbers * BytesOf(StoredOf(queried.element_type()));
  }

  // What is cached of a position; as float32, in `widened` if it is stored otherwise.
  const float* At(const AttentionKernels& kernels, int64_t b, int64_t position, float* widened) const {
    const int64_t first = (IndexOf(cached, b) * length() + position) * row_numbers();
    const char* data = static_cast<const char*>(cached.untyped_data()) + first * BytesOf(stored());
    if (stored() == Stored::kFloat32) return reinterpret_cast<const float*>(data);
    kernels.widen(stored(), data, row_numbers(), widened);
    return widened;
  }

  // Of the heads of a position.
  const float* ScalesAt(int64_t b, int64_t position) const {
    const int64_t row = IndexOf(scale, b) * length() + position;
    return static_cast<const float*>(scale.untyped_data()) + row * cached_heads();
  }
};

constexpr int64_t kWorthAThread = 32768;  // numbers of a cache that are read

// Runs body(i) for i in [0, count), several at once if so many numbers are worth it.
template <typename Body>
void For(xla::ffi::ThreadPool& pool, int64_t count, int64_t numbers, const Body& body) {
  if (numbers >= kWorthAThread) return ParallelFor(pool, count, body, Claims::kInRuns);
  KeepSubnormals keep;
  for (int64_t i = 0; i < count; ++i) body(i);
}

// Either product, of a batch of so many entries. Few queries take scratch: false if there is no memory.
bool MultiplyFew(const Attention& attention, const AttentionKernels& kernels, xla::ffi::ThreadPool& pool,
                 int64_t batch);
void MultiplyMany(const Attention& attention, const AttentionKernels& kernels, xla::ffi::ThreadPool& pool,
                  int64_t batch);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ATTENTION_CALL_H_
