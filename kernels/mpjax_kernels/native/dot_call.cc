// The loop over a batch: one product is cut up, several are given to a thread each.

#include "dot_call.h"

#include <atomic>

#include "isa.h"
#include "parallel.h"
#include "real_type.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

bool IsFloat8(ffi::DataType type) { return type == ffi::F8E4M3FN || type == ffi::F8E5M2; }

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

// Less work is done before another thread is awake: in multiplications, of which a byte that comes
// from memory takes the time of so many.
constexpr double kWorthAThread = 4e6, kMultiplicationsPerByte = 8;

}  // namespace

Operand::Operand(const char* name, const View& values, const View& scale, bool terms_last)
    : name(name),
      type(values.element_type()),
      sizes(values.dimensions()),
      values(values.untyped_data()),
      scale_type(scale.element_type()),
      scale_sizes(scale.dimensions()),
      scale(scale.untyped_data()),
      terms_last(terms_last) {}

int64_t Operand::count() const {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

int64_t Operand::SizeOf(size_t axis, size_t in_tiles) const {
  if (!this->in_tiles()) return sizes[rank() - axis];
  return sizes[rank() - in_tiles] * sizes[rank() - in_tiles - 2];
}

std::string Operand::Refusal(const Family& family, const Dimensions& out, int64_t expected_lanes,
                             int64_t expected_terms) const {
  const std::string operand = name;
  const size_t batch = out.size() - 2;
  if (!family.has(type)) return operand + " is not " + family.formats;
  const bool is_int8_in_tiles = in_tiles() && IsInt8(type) && family.kernels().multiply_tiles;
  if (in_tiles() && !is_int8_in_tiles) {
    return operand + " is in tiles, which kernels of this instruction set and format do not read";
  }
  if (in_tiles() && (sizes[rank() - 2] != kColumns || sizes[rank() - 1] != kTileTerms)) {
    return operand + " is in tiles of another size than 16 x 4";
  }
  if (rank() != out.size() + (in_tiles() ? 2 : 0) || lanes() != expected_lanes || terms() != expected_terms ||
      !Broadcasts(sizes, out, batch)) {
    return operand + " has a shape that does not go with the other operand and the result";
  }
  if (scale_type != ffi::F32) return "the scale of " + operand + " is not float32";
  if (scale_sizes.size() != batch + 1 || !Broadcasts(scale_sizes, out, batch) ||
      (scale_sizes[batch] != 1 && scale_sizes[batch] != lanes())) {
    return "the scale of " + operand + " has neither one entry nor one for each of its lanes";
  }
  return "";
}

Matrix Operand::At(const Dimensions& out, int64_t b) const {
  const size_t batch = out.size() - 2;
  const int64_t of_values = BatchIndex(sizes, out, batch, b);
  const int64_t of_scale = BatchIndex(scale_sizes, out, batch, b);
  const int64_t scales = scale_sizes[batch];
  Matrix matrix;
  const uint8_t* first = static_cast<const uint8_t*>(values);
  matrix.data = first + of_values * lanes() * terms();
  matrix.lanes = lanes();
  matrix.lane_stride = terms_last ? terms() : 1;
  matrix.term_stride = terms_last ? 1 : lanes();
  matrix.table = IsFloat8(type) ? &TableOf(type == ffi::F8E5M2) : nullptr;
  matrix.scale = static_cast<const float*>(scale) + of_scale * scales;
  matrix.scale_stride = scales == 1 ? 0 : 1;
  matrix.in_tiles = in_tiles();
  return matrix;
}

std::string Refusal(const Family& family, const Operand& left, const Operand& right,
                    const ffi::AnyBuffer& out) {
  const auto shape = out.dimensions();
  if (shape.size() < 2 || left.rank() != shape.size() || left.in_tiles()) return "operands and result differ in rank";
  if (!IsReal(out.element_type())) return "the result is not float32, bfloat16 or float16";
  const int64_t rows = shape[shape.size() - 2], columns = shape[shape.size() - 1];
  const std::string wrong = left.Refusal(family, shape, rows, left.terms());
  return wrong.empty() ? right.Refusal(family, shape, columns, left.terms()) : wrong;
}

ffi::Error Multiply(const Family& family, ffi::ThreadPool& pool, const Operand& left,
                    const Operand& right, ffi::AnyBuffer out) {
  const auto shape = out.dimensions();
  if (out.element_count() == 0) return ffi::Error::Success();
  const int64_t rows = left.lanes(), columns = right.lanes(), terms = left.terms();
  const int64_t batch = static_cast<int64_t>(out.element_count()) / (rows * columns);
  const Real real = RealOf(out.element_type());
  const auto compute = [&](int64_t b, Loop& loop) {
    char* to = static_cast<char*>(out.untyped_data()) + b * rows * columns * BytesOf(real);
    return Compute(family.kernels(), {left.At(shape, b), right.At(shape, b), terms, to, real}, loop);
  };
  std::atomic<bool> in_memory{true};
  const auto alone = [&](int64_t b) {
    PlainLoop loop;
    if (!compute(b, loop)) in_memory = false;
  };
  const double work = static_cast<double>(out.element_count()) * static_cast<double>(terms);
  const double bytes_read = static_cast<double>(left.count() + right.count());
  if (work + kMultiplicationsPerByte * bytes_read < kWorthAThread) {
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

}  // namespace mpjax
