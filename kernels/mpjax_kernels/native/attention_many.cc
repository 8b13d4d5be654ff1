// Attention of many queries: products of matrices, whose operands stay as they lie.
//
// A thread takes the columns of a head's product by 32, positions of the scores or numbers of the output. It
// copies what the cache has of them into a panel, 128 terms at a time, so that the columns of a term lie next
// to each other, in float32 and times their scales; then it multiplies rows of the query or weights by it.

#include <algorithm>
#include <cstring>

#include "attention_call.h"

namespace mpjax {
namespace {

constexpr int64_t kTerms = 128;  // of a panel, which stays in the first cache
constexpr int64_t kRows = 96;    // that are multiplied by all panels of a part, and stay in the second
constexpr int64_t kColumns = 4 * kPanel;  // of a part of the output, at most
constexpr int64_t kCacheWay = 512;        // numbers, or half of a way of the first cache

// What a thread computes: rows of a head of the cache by columns.
class Part {
 public:
  Part(const Attention& attention, const AttentionKernels& set, int64_t entry, int64_t of, int64_t first,
       int64_t count)
      : a(attention), kernels(set), b(entry), head(of), column(first), columns(count),
        cached(static_cast<const char*>(a.cached.untyped_data()) +
               (a.IndexOf(a.cached, b) * a.cached_numbers() + head * a.depth()) * BytesOf(a.stored())),
        scales(a.has_scale() ? a.ScalesAt(b, 0) + head : nullptr), queried(a.Queried(b)) {}

  void Multiply(int64_t first_row, int64_t end_row) const;

 private:
  const Attention& a;
  const AttentionKernels& kernels;
  const int64_t b, head, column, columns;
  const char* const cached;  // of the head
  const float* const scales;
  const char* const queried;  // of all heads

  // Numbers of a position, as they are meant, in `to` if they are not stored so.
  const float* Numbers(int64_t position, int64_t first, int64_t count, float* to) const {
    const char* stored = cached + (position * a.row_numbers() + first) * BytesOf(a.stored());
    if (a.stored() == Stored::kFloat32 && scales == nullptr) {
      return reinterpret_cast<const float*>(stored);
    }
    kernels.widen(a.stored(), stored, count, to);
    if (scales != nullptr) {
      const float scale = scales[position * a.cached_heads()];
      for (int64_t i = 0; i < count; ++i) to[i] *= scale;
    }
    return to;
  }

  // The columns from column + c on. Those that are not there are zero.
  void FillPanel(int64_t c, int64_t first, int64_t count, float* panel) const {
    alignas(64) float numbers[kPanel * kTerms];
    const int64_t there = std::min<int64_t>(kPanel, columns - c);
    if (a.is_output) {
      for (int64_t i = 0; i < count; ++i, panel += kPanel) {
        const float* from = Numbers(first + i, column + c, there, numbers);
        if (there == kPanel) {
          std::memcpy(panel, from, kPanel * sizeof(float));
        } else {
          std::fill(std::copy_n(from, there, panel), panel + kPanel, 0.0f);
        }
      }
      return;
    }
    const float* of_columns[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      float* to = numbers + i * kTerms;
      if (i >= there) std::fill_n(to, count, 0.0f);
      of_columns[i] = i < there ? Numbers(column + c + i, first, count, to) : to;
    }
    kernels.transpose(of_columns, count, panel);
  }

  // Where a row is in an array [queries, heads] or [heads, queries], counted in rows.
  int64_t RowOf(bool queries_first, int64_t row) const {
    const int64_t first = head * a.group();
    if (!queries_first) return first * a.queries() + row;
    return row % a.queries() * a.heads() + first + row / a.queries();
  }

  // From one row to the next, in rows; 0 if that differs.
  int64_t Stride(bool queries_first) const {
    return !queries_first ? 1 : a.group() == 1 ? a.heads() : 0;
  }

  // Terms of some rows, where they lie if they are float32 and lie evenly, and not where the first cache can
  // hold but a few of them; or else in `to`.
  const float* Left(int64_t row, int64_t rows, int64_t term, int64_t count, float* to,
                    int64_t* stride) const {
    const bool queries_first = !a.is_output;
    const Stored type = StoredOf(a.queried.element_type());
    const auto at = [&](int64_t i) {
      return queried + (RowOf(queries_first, row + i) * a.terms() + term) * BytesOf(type);
    };
    const int64_t numbers = Stride(queries_first) * a.terms();
    if (type == Stored::kFloat32 && numbers % kCacheWay != 0) {
      *stride = numbers;
      return reinterpret_cast<const float*>(at(0));
    }
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = at(i);
      kernels.widen(type, from, count, to + i * *stride);
      const int64_t bytes = count * BytesOf(type);
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + bytes + line);
    }
    return to;
  }

  char* Out(int64_t row) const {
    const int64_t first = b * a.heads() * a.queries() + RowOf(a.is_output, row);
    return static_cast<char*>(a.out.untyped_data()) +
           (first * a.columns() + column) * BytesOf(a.out_type());
  }

  // Where sums can be written from a row on, and their stride; null if they are to be rounded or are few.
  float* Direct(int64_t row, int64_t* stride) const {
    if (a.out_type() != Real::kFloat32 || columns % kPanel != 0 || Stride(a.is_output) == 0) return nullptr;
    *stride = Stride(a.is_output) * a.columns();
    return reinterpret_cast<float*>(Out(row));
  }

  void Write(int64_t row, int64_t rows, const float* sums) const {
    for (int64_t i = 0; i < rows; ++i) {
      kernels.narrow(sums + i * kColumns, columns, a.out_type(), Out(row + i));
    }
  }
};

void Part::Multiply(int64_t first_row, int64_t end_row) const {
  alignas(64) float panel[kTerms * kPanel];
  alignas(64) float left[kRows * kTerms];
  alignas(64) float sums[kRows * kColumns];
  const int64_t all = a.terms();
  const bool is_one_panel = columns <= kPanel && all <= kTerms;
  if (is_one_panel) FillPanel(0, 0, all, panel);
  for (int64_t row = first_row; row < end_row; row += kRows) {
    const int64_t rows = std::min(kRows, end_row - row);
    int64_t stride = kColumns;
    float* direct = Direct(row, &stride);
    float* to = direct != nullptr ? direct : sums;
    int64_t term = 0;
    do {  // once if there are no terms
      const int64_t count = std::min(kTerms, all - term);
      int64_t left_stride = kTerms;
      const float* numbers = Left(row, rows, term, count, left, &left_stride);
      for (int64_t c = 0; c < columns; c += kPanel) {
        if (!is_one_panel) FillPanel(c, term, count, panel);
        kernels.multiply(numbers, left_stride, rows, panel, count, term > 0, to + c, stride);
      }
      term += kTerms;
    } while (term < all);
    if (direct == nullptr) Write(row, rows, sums);
  }
}

}  // namespace

void MultiplyMany(const Attention& a, const AttentionKernels& kernels, xla::ffi::ThreadPool& pool,
                  int64_t batch) {
  const int64_t columns = a.is_output ? kColumns : kPanel, parts = DivideUp(a.columns(), columns);
  const int64_t rows = a.is_output ? kRows : a.rows(), runs = DivideUp(a.rows(), rows);
  For(pool, batch * a.cached_heads() * parts * runs, batch * a.cached_numbers() * a.rows() / 8,
      [&](int64_t i) {
        const int64_t row = i % runs * rows, column = i / runs % parts * columns;
        const int64_t head = i / runs / parts;
        const Part part(a, kernels, head / a.cached_heads(), head % a.cached_heads(), column,
                        std::min(columns, a.columns() - column));
        part.Multiply(row, std::min(a.rows(), row + rows));
      });
}

}  // namespace mpjax
