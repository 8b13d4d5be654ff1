// A product of two 8-bit matrices with its scales, whatever they are stored like.

#ifndef MPJAX_KERNELS_NATIVE_PRODUCT_H_
#define MPJAX_KERNELS_NATIVE_PRODUCT_H_

#include <cstdint>

#include "claims.h"
#include "dot.h"

namespace mpjax {

struct Matrix {
  const uint8_t* data;
  int64_t lanes;        // rows of the left operand, columns of the right one
  int64_t lane_stride;  // one of the two is 1
  int64_t term_stride;
  const DecodeTable* table;  // of float8; null for int8
  const float* scale;    // of lane i: scale[i * scale_stride]
  int64_t scale_stride;  // 0 or 1
  // Whether it lies in tiles of kColumns lanes by kTileTerms terms, [lanes / 16, terms / 4, 16, 4]: panels,
  // one after the other. Then it has no strides.
  bool in_tiles = false;
};

struct Product {
  Matrix left;
  Matrix right;
  int64_t terms;
  void* out;  // [left.lanes, right.lanes]
  Real out_type;
};

// Calls a function of an index for all indices below a count, perhaps in parallel.
class Loop {
 public:
  virtual ~Loop() = default;
  virtual void Run(int64_t count, void (*body)(void* data, int64_t i), void* data,
                   Claims claims) = 0;

  template <typename Body>
  void operator()(int64_t count, Body& body, Claims claims) {
    Run(count, [](void* data, int64_t i) { (*static_cast<Body*>(data))(i); }, &body, claims);
  }
};

// Computes the product; false if there was no memory for it.
bool Compute(const DotKernels& kernels, Product product, Loop& loop);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_PRODUCT_H_
