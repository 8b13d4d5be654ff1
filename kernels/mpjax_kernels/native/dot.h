// What an instruction set brings to the product of float8 matrices: packing and multiplying.

#ifndef MPJAX_KERNELS_NATIVE_DOT_H_
#define MPJAX_KERNELS_NATIVE_DOT_H_

#include <cstdint>

#include "float8.h"

namespace mpjax {

// A matrix is packed into panels of kRows or kColumns neighbouring lanes (rows of the left operand,
// columns of the right one). A panel holds, pair of terms after pair of terms, for each lane two
// neighbouring terms in bfloat16: [pairs][lanes][2]. Lanes and terms beyond the matrix are zero.
inline constexpr int kRows = 8;            // lanes of a left panel
inline constexpr int kColumns = 16;        // lanes of a right panel
inline constexpr int kColumnPanels = 3;    // right panels that are multiplied at once
inline constexpr int kTermsPerStep = 4;    // terms come in multiples of this

// A float8 matrix in memory: entry (lane, term) is data[lane * lane_stride + term * term_stride],
// and one of the strides is 1.
struct Source {
  const uint8_t* data;
  int64_t lane_stride;
  int64_t term_stride;
};

inline constexpr int kWidth = kColumnPanels * kColumns;  // numbers in a row of a tile of sums

// Where a tile of sums goes, and by what it is multiplied: by one scale and then by the other,
// because the product of two small ones can underflow where the result does not.
struct Target {
  void* out;
  bool is_bfloat16;         // else float32
  int64_t row_stride;       // of `out`, in numbers; columns are next to each other
  const float* row_scales;  // of row i: row_scales[i * row_scale_stride]
  int64_t row_scale_stride;
  const float* column_scales;
  bool columns_first;  // whether `column_scales` are applied first
  bool is_large;       // whether it is better not to keep the result in the caches
};

struct DotKernels {
  const char* name;

  // Packs kColumns lanes of `source`, of which `lanes` exist, and `terms` terms: into one panel of
  // kColumns lanes, or into two of kRows if `second` is not null.
  void (*pack)(const DecodeTable& table, const Source& source, int lanes, int64_t terms,
               uint16_t* first, uint16_t* second);

  // sums[row * kWidth + column] = or, if `add`, += the products of a left panel
  // and `panels` right panels, each `panel_stride` numbers after the one before.
  void (*multiply)(const uint16_t* left, const uint16_t* right, int64_t panel_stride, int panels,
                   int64_t pairs, bool add, float* sums);

  // Scales, casts and writes a tile.
  void (*write)(const float* sums, int64_t rows, int64_t columns, const Target& target);
};

extern const DotKernels kPortableDot;
extern const DotKernels kAvx512Dot;

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_DOT_H_
