// Attention of few queries. Keys and values are read once, position by position, as they lie; an output is
// added up in parts, of as many positions whatever the threads.

#include <algorithm>

#include "attention_call.h"
#include "scratch.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPositions = 16;  // of a cache that a thread takes at a time, at least
constexpr int64_t kMostParts = 16;  // of the positions that an output is summed over

float* FloatsOf(const Scratch& scratch) { return reinterpret_cast<float*>(scratch.data()); }

size_t Floats(int64_t count) { return static_cast<size_t>(2 * std::max<int64_t>(1, count)); }

// The query of a batch entry, float32 [cached heads, group, queries, depth].
void LayOutQuery(const Attention& a, const AttentionKernels& kernels, int64_t b, float* to) {
  const Stored type = StoredOf(a.queried.element_type());
  const char* from = a.Queried(b);
  for (int64_t query = 0; query < a.queries(); ++query) {
    for (int64_t head = 0; head < a.heads(); ++head, from += a.depth() * BytesOf(type)) {
      kernels.widen(type, from, a.depth(), to + (head * a.queries() + query) * a.depth());
    }
  }
}

// False if there is no memory.
bool Scores(const Attention& a, const AttentionKernels& kernels, ffi::ThreadPool& pool, int64_t batch) {
  const int64_t rows = a.heads() * a.queries(), numbers = rows * a.depth();
  const int64_t chunks = DivideUp(a.length(), kPositions);
  const Scratch query(Floats(batch * numbers)), widened(Floats(batch * chunks * a.widened_numbers()));
  const Scratch sums(Floats(batch * chunks * rows * (kPositions + 1)));
  if (query.data() == nullptr || widened.data() == nullptr || sums.data() == nullptr) return false;
  for (int64_t b = 0; b < batch; ++b) LayOutQuery(a, kernels, b, FloatsOf(query) + b * numbers);
  const int64_t out_bytes = BytesOf(a.out_type());
  For(pool, batch * chunks, batch * a.cached_numbers(), [&](int64_t i) {
    const int64_t b = i / chunks, first = i % chunks * kPositions;
    const int64_t positions = std::min(kPositions, a.length() - first);
    float* of_position = FloatsOf(sums) + i * rows * (kPositions + 1);
    float* of_row = of_position + rows;  // kPositions of each
    for (int64_t p = 0; p < positions; ++p) {
      const float* keys = a.At(kernels, b, first + p, FloatsOf(widened) + i * a.widened_numbers());
      kernels.scores(FloatsOf(query) + b * numbers, keys, a.cached_heads(), a.rows(), a.depth(),
                     of_position);
      for (int64_t row = 0; row < rows; ++row) of_row[row * kPositions + p] = of_position[row];
      if (!a.has_scale()) continue;
      const float* scales = a.ScalesAt(b, first + p);
      for (int64_t row = 0; row < rows; ++row) of_row[row * kPositions + p] *= scales[row / a.rows()];
    }
    char* out = static_cast<char*>(a.out.untyped_data()) + (b * rows * a.length() + first) * out_bytes;
    for (int64_t row = 0; row < rows; ++row) {
      kernels.narrow(of_row + row * kPositions, positions, a.out_type(),
                     out + row * a.length() * out_bytes);
    }
  });
  return true;
}

// False if there is no memory.
bool Output(const Attention& a, const AttentionKernels& kernels, ffi::ThreadPool& pool, int64_t batch) {
  const int64_t rows = a.heads() * a.queries(), numbers = rows * a.depth();
  const int64_t part = std::max(kPositions, DivideUp(a.length(), kMostParts));
  const int64_t parts = std::max<int64_t>(1, DivideUp(a.length(), part));
  const Scratch sums(Floats(batch * parts * (numbers + rows))), weights(Floats(batch * rows * a.length()));
  const Scratch widened(Floats(batch * parts * a.widened_numbers()));
  if (sums.data() == nullptr || weights.data() == nullptr || widened.data() == nullptr) return false;
  const Stored type = StoredOf(a.queried.element_type());
  for (int64_t b = 0; b < batch; ++b) {
    kernels.widen(type, a.Queried(b), rows * a.length(), FloatsOf(weights) + b * rows * a.length());
  }
  float* of_positions = FloatsOf(sums) + batch * parts * numbers;
  For(pool, batch * parts, batch * a.cached_numbers(), [&](int64_t i) {
    const int64_t b = i / parts, first = i % parts * part;
    const float* of_rows = FloatsOf(weights) + b * rows * a.length();
    float* to = FloatsOf(sums) + i * numbers;
    float* of_position = of_positions + i * rows;
    std::fill_n(to, numbers, 0.0f);
    for (int64_t p = first; p < std::min(a.length(), first + part); ++p) {
      const float* scales = a.has_scale() ? a.ScalesAt(b, p) : nullptr;
      for (int64_t row = 0; row < rows; ++row) {
        const float weight = of_rows[row * a.length() + p];
        of_position[row] = scales == nullptr ? weight : weight * scales[row / a.rows()];
      }
      const float* values = a.At(kernels, b, p, FloatsOf(widened) + i * a.widened_numbers());
      kernels.add(of_position, values, a.cached_heads(), a.rows(), a.depth(), to);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    float* total = FloatsOf(sums) + b * parts * numbers;
    for (int64_t i = 1; i < parts; ++i) {
      for (int64_t n = 0; n < numbers; ++n) total[n] += total[i * numbers + n];
    }
    char* out = static_cast<char*>(a.out.untyped_data()) + b * numbers * BytesOf(a.out_type());
    for (int64_t query = 0; query < a.queries(); ++query) {
      for (int64_t head = 0; head < a.heads(); ++head, out += a.depth() * BytesOf(a.out_type())) {
        const float* from = total + (head * a.queries() + query) * a.depth();
        kernels.narrow(from, a.depth(), a.out_type(), out);
      }
    }
  }
  return true;
}

}  // namespace

bool MultiplyFew(const Attention& a, const AttentionKernels& kernels, ffi::ThreadPool& pool,
                 int64_t batch) {
  return a.is_output ? Output(a, kernels, pool, batch) : Scores(a, kernels, pool, batch);
}

}  // namespace mpjax
