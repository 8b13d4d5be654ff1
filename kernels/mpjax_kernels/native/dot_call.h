// What the calls of products of 8-bit matrices share: their operands, checked, and the loop over a batch.

#ifndef MPJAX_KERNELS_NATIVE_DOT_CALL_H_
#define MPJAX_KERNELS_NATIVE_DOT_CALL_H_

#include <string>

#include "batch.h"
#include "dot.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {

// What a call multiplies.
struct Family {
  const char* call;
  const char* formats;
  bool (*has)(xla::ffi::DataType type);
  const DotKernels& (*kernels)();
};

// The kernels for int8 of the instruction set at hand.
const DotKernels& Int8Kernels();
bool IsInt8(xla::ffi::DataType type);

// A stack of 8-bit matrices with their scales, [batch..., lanes] or [batch..., 1]. One with two more axes is
// in tiles, [batch..., lanes / 16, terms / 4, 16, 4].
struct Operand {
  const char* name;
  xla::ffi::DataType type;
  Dimensions sizes;
  const void* values;
  xla::ffi::DataType scale_type;
  Dimensions scale_sizes;
  const void* scale;
  bool terms_last;

  Operand(const char* name, const View& values, const View& scale, bool terms_last);

  int64_t count() const;  // of its numbers
  size_t rank() const { return sizes.size(); }
  bool in_tiles() const { return rank() == scale_sizes.size() + 3; }
  int64_t terms() const { return SizeOf(terms_last ? 1 : 2, 1); }
  int64_t lanes() const { return SizeOf(terms_last ? 2 : 1, 2); }
  // That of an axis, counted from the end; of what is in tiles as if their terms came last.
  int64_t SizeOf(size_t axis, size_t in_tiles) const;

  // What is wrong with it, or an empty string.
  std::string Refusal(const Family& family, const Dimensions& out, int64_t expected_lanes,
                      int64_t expected_terms) const;

  // The matrix that the b-th of the result is a product of.
  Matrix At(const Dimensions& out, int64_t b) const;
};

// Why a call cannot multiply them, or an empty string.
std::string Refusal(const Family& family, const Operand& left, const Operand& right,
                    const xla::ffi::AnyBuffer& out);

// Multiplies what is not refused.
xla::ffi::Error Multiply(const Family& family, xla::ffi::ThreadPool& pool, const Operand& left,
                         const Operand& right, xla::ffi::AnyBuffer out);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_DOT_CALL_H_
