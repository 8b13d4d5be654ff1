// By the rules of `quantize.cc`, whose bits they are.

#include "quantized_rows.h"

#include "parallel.h"
#include "quantize.h"
#include "real_type.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kWorthAThread = 32768;  // numbers to quantize

size_t RowsOf(const ffi::AnyBuffer& x) {
  const auto sizes = x.dimensions();
  size_t rows = 1;
  for (size_t axis = 0; axis + 1 < sizes.size(); ++axis) rows *= static_cast<size_t>(sizes[axis]);
  return rows;
}

}  // namespace

QuantizedRows::QuantizedRows(ffi::ThreadPool& pool, const ffi::AnyBuffer& x)
    : sizes_(x.dimensions()), values_(x.element_count() / 2 + 1), scales_(2 * RowsOf(x) + 1) {
  if (!IsReal(x.element_type())) refusal_ = "lhs is not float32, bfloat16 or float16";
  if (sizes_.size() < 2) refusal_ = "lhs has fewer than two axes";
  if (!refusal_.empty() || !in_memory()) return;
  const int64_t terms = sizes_[sizes_.size() - 1], rows = static_cast<int64_t>(RowsOf(x));
  const Real type = RealOf(x.element_type());
  const char* from = static_cast<const char*>(x.untyped_data());
  uint8_t* values = reinterpret_cast<uint8_t*>(values_.data());
  float* scales = reinterpret_cast<float*>(scales_.data());
  const auto quantize = [&](int64_t row) {
    const char* of_row = from + row * terms * BytesOf(type);
    scales[row] = QuantizeByAmax(type, of_row, terms, Output::kInt8, values + row * terms);
  };
  if (rows * terms >= kWorthAThread) {
    ParallelFor(pool, rows, quantize);
  } else {
    KeepSubnormals keep;
    for (int64_t row = 0; row < rows; ++row) quantize(row);
  }
}

}  // namespace mpjax
