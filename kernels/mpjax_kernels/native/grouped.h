// What an instruction set brings to the product of int8 by a weight of int8 or int4 in groups of terms.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_H_

#include <cstdint>

#include "dot.h"
#include "weight.h"

namespace mpjax {

// Groups of neighbouring terms of a weight, and rows that are multiplied by them.
struct Groups {
  int64_t count;
  int64_t terms;  // of each
  int parts;      // groups that share a block: 1, 2 or 4; if it is 1, every group begins a block
};

// Rows in blocks of as many terms as a register holds of the weight, with zeros after the last one. In
// blocks for int4 the even terms come first, and then the odd ones.
struct LaidOutRows {
  const uint8_t* data;
  int64_t stride;  // bytes from one row to the next
  int64_t rows;
};

// So many rows at most are multiplied directly.
inline constexpr int kFewGroupedRows = 16;
inline constexpr int kBlockLanes = 128;
inline constexpr int32_t kNibbleBias = 8;  // with the sign bit turned around

// A kernel of its own for a few rows by a weight whose terms lie next to each other; or there is none.
struct DirectKernel {
  int block_terms;  // 0: there is none
  int most_parts;   // groups that share a block, at most
  int bias;         // what it takes the numbers of the weight for is so much more than they are

  // sums[(group * rows + row) * kWidth + lane] = the products of kWidth lanes and kDirectRows rows at
  // most, from a lane and term of the weight on.
  void (*multiply)(const Weight& weight, int64_t lane, int lanes, int64_t term, const Groups& groups,
                   const LaidOutRows& left, int32_t* sums);
};

struct GroupedKernels {
  const DotKernels* dot;  // packs and multiplies int8
  DirectKernel int8;
  DirectKernel int4;

  // sums[(lane / kWidth * rows + row) * kWidth + lane % kWidth] = the products of so many lanes and
  // `terms` terms of int4 whose lanes lie next to each other, from a lane and term of the weight on, by
  // rows with zeros up to a multiple of four terms. The lanes begin a block of kBlockLanes, sums are
  // there for whole ones, and numbers of the weight are taken for kNibbleBias more than they are.
  // Null: there is no such kernel.
  void (*multiply_lanes)(const Weight& weight, int64_t lane, int64_t lanes, int64_t term,
                         int64_t terms, const LaidOutRows& left, int32_t* sums);

  // Packs so many lanes, kWidth at most, of int4, two to a byte, `stride` bytes apart, into right panels.
  // A panel has four terms in each step: of eight neighbours first the even ones, then the odd ones. The
  // numbers are kNibbleBias more than they are. Null: they are unpacked to int8, for `dot`.
  void (*pack_eights)(const uint8_t* data, int64_t stride, int lanes, int64_t terms,
                      const Panels& to);

  // `count` entries of int4 as bytes, of which the first one is the first of a byte.
  void (*unpack)(const uint8_t* data, int64_t count, uint8_t* to);

  // total[row * kWidth + lane] = or, if `add`, += (sums - excess[row] - zeros[lane] * row_sums[row]), in
  // float32, times scales[lane]. `zeros` may be null, and `scales` too.
  void (*settle)(const int32_t* sums, int64_t rows, const int32_t* excess, const int32_t* zeros,
                 const int32_t* row_sums, const float* scales, bool add, float* total);

  // Casts and writes a tile of float32.
  void (*write)(const Sum* sums, int64_t rows, int64_t columns, const Target& target);
};

extern const GroupedKernels kPortableGrouped;
extern const GroupedKernels kAvx2Grouped;
extern const GroupedKernels kAvxVnniGrouped;
extern const GroupedKernels kAvx512Grouped;
extern const GroupedKernels kAvx512Grouped256;  // as AVX-VNNI

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_H_
