// The product of an array by a weight of 8 bits or int4, and what an instruction set brings to it.

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_H_

#include <cstdint>

#include "dot.h"

namespace mpjax {

// Terms are decoded for kWidth lanes of the weight (its output channels) at a time, at most so many:
// panels of kColumns lanes, of what is multiplied in each step in 32 bits: two terms in bfloat16 or
// one in float32. Rows of the array have the same order, and zeros up to a multiple of kTermsPerPack
// after the terms of each group.
inline constexpr int kRunTerms = 256;
// So many rows by so many lanes, or as many products, at most are multiplied without panels.
inline constexpr int kDirectRows = 4;
inline constexpr int kDirectLanes = 256;
inline constexpr int kPlaces = 128;  // sums of a stream are a multiple of so many

// A matrix of int8, of float8, or of int4: two to a byte, the first in its lower half.
struct Weight {
  const uint8_t* data;
  bool is_int4;
  bool terms_last;  // entry (lane, term) is the (lane * stride + term)-th, else (term * stride + lane)
  int64_t stride;
  const DecodeTable* table;  // of float8; null for integers
};

// The entries of lanes and terms that share their scales, and zero points (or null) as float32.
struct Run {
  int64_t lane;
  int lanes;
  int64_t term;
  int terms;
  const float* zeros;
};

struct WeightKernels {
  int terms_per_step;

  // Decodes a run of kWidth lanes and kRunTerms terms at most. Each panel is followed by the next.
  void (*pack)(const Weight& weight, const Run& run, uint16_t* panels);

  // sums[row * kWidth + lane] = or, if `add`, += the products of rows, `stride` steps apart, and four
  // panels of `steps` steps each.
  void (*multiply)(const uint32_t* left, int64_t stride, int64_t rows, const uint16_t* panels,
                   int64_t steps, bool add, float* sums);

  // How many lanes `multiply_direct` takes of a weight, beside so many rows and in runs of so many
  // terms, with zero points or not; 0: it does not.
  int (*direct_lanes)(const Weight& weight, int64_t rows, int64_t terms, bool has_zeros);

  // sums[(lane / kWidth * rows + row) * kWidth + lane % kWidth] = the products of a run of so many
  // lanes, and any number of terms, decoded in registers.
  void (*multiply_direct)(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                          int64_t rows, float* sums);

  // total = or, if `add`, += the sums of kWidth lanes times their scales.
  void (*scale)(const float* sums, int64_t rows, const float* scales, bool add, float* total);

  // Casts and writes a tile.
  void (*write)(const Sum* sums, int64_t rows, int64_t columns, const Target& target);

  // sums[row * sum_stride + place] += the products of kDirectRows rows at most and a run of any number
  // of lanes and terms, of a weight whose lanes lie next to each other. The places have an order of
  // their own; there are up to kPlaces - 1 more of them than lanes. Null if there is no such way.
  void (*stream)(const Weight& weight, const Run& run, const uint32_t* left, int64_t stride,
                 int64_t rows, int64_t sum_stride, float* sums);

  // total[lane] += the sums that `stream` left for a row, times the scales of the lanes.
  void (*fold)(const Weight& weight, const float* sums, const float* scales, int64_t lanes,
               float* total);
};

extern const WeightKernels kPortableWeight;
extern const WeightKernels kAvx2Weight;
// Of integers, and of float8, multiplied in float32 or in bfloat16.
extern const WeightKernels kAvx512Weight;
extern const WeightKernels kAvx512WeightPairs;
extern const WeightKernels kAvx512Float8Weight;
extern const WeightKernels kAvx512Float8WeightPairs;

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_H_
