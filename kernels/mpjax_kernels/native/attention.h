// What an instruction set brings to attention (`attention.cc`).

#ifndef MPJAX_KERNELS_NATIVE_ATTENTION_H_
#define MPJAX_KERNELS_NATIVE_ATTENTION_H_

#include <cstdint>

#include "real.h"

namespace mpjax {

// How keys and values are stored.
enum class Stored { kFloat32, kBfloat16, kFloat16, kInt8, kE4M3 };

inline int64_t BytesOf(Stored type) {
  return type == Stored::kFloat32 ? 4 : type == Stored::kBfloat16 || type == Stored::kFloat16 ? 2 : 1;
}

constexpr int kPanel = 32;  // columns of a product that are multiplied at a time

struct AttentionKernels {
  // The numbers as float32, which holds all of them.
  void (*widen)(Stored type, const void* from, int64_t count, float* to);

  // Rounded to nearest even.
  void (*narrow)(const float* from, int64_t count, Real type, void* to);

  // Of few queries and one position. A head of the cache meets `rows` rows of queries, next to each other:
  // sums[head, row] = sum over d of query[head, row, d] * key[head, d]
  void (*scores)(const float* query, const float* key, int64_t heads, int64_t rows, int64_t depth,
                 float* sums);

  // sums[head, row, d] += weights[head, row] * value[head, d]
  void (*add)(const float* weights, const float* value, int64_t heads, int64_t rows, int64_t depth,
              float* sums);

  // Of many queries, one term after the other, each rounded once with its product (`fma`):
  // sums[row, c] = sum over i < terms of left[row, i] * panel[i, c], on top of what is there if `more`.
  void (*multiply)(const float* left, int64_t left_stride, int64_t rows, const float* panel,
                   int64_t terms, bool more, float* sums, int64_t sums_stride);

  // panel[i, c] = columns[c][i] for i < count, of kPanel columns.
  void (*transpose)(const float* const* columns, int64_t count, float* panel);
};

extern const AttentionKernels kPortableAttention;
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_ATTENTION_H_
