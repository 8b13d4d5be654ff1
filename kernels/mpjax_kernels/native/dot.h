// What an instruction set brings to the product of 8-bit matrices: packing, multiplying, writing.

#ifndef MPJAX_KERNELS_NATIVE_DOT_H_
#define MPJAX_KERNELS_NATIVE_DOT_H_

#include <cstdint>

#include "float8.h"
#include "real.h"

namespace mpjax {

// A matrix is packed into panels of kRows or kColumns neighbouring lanes (rows of the left operand,
// columns of the right one). A panel holds, step after step, for each lane the next few terms in 32
// bits: one in float32, two in bfloat16 or 16-bit integers, or four in int8. Lanes and terms beyond the
// matrix are zero, or meet a zero of the other operand.
inline constexpr int kRows = 8;          // lanes of a left panel
inline constexpr int kColumns = 16;      // lanes of a right panel
inline constexpr int kColumnPanels = 3;  // right panels that are multiplied at once, at most
inline constexpr int kFewRows = 32;      // with fewer, columns are multiplied as they come
inline constexpr int kStreamRows = 4;    // so many at most are multiplied by what is read in a stream
inline constexpr int kStreamTerms = 16;  // terms of that that are multiplied at once, at most
inline constexpr int kTileRowsAtOnce = 6;  // so many at most are multiplied by four panels of tiles
inline constexpr int kPackLanes = 64;    // lanes that are packed at once: a cache line, if stored so
inline constexpr int kTermsPerPack = 4;  // what is packed is a multiple of so many terms
inline constexpr int kTileTerms = 4;     // of a tile: kColumns lanes of so many terms, as in a right panel
inline constexpr int kLaneNumbers = 2;   // uint16 that a lane takes in each step

// An 8-bit matrix in memory: entry (lane, term) is data[lane * lane_stride + term * term_stride],
// and one of the strides is 1.
struct Source {
  const uint8_t* data;
  int64_t lane_stride;
  int64_t term_stride;
  const DecodeTable* table;  // of float8; null for int8
};

// What becomes of packed numbers: panels one after the other, of the left or of the right operand.
struct Panels {
  uint16_t* data;
  int64_t stride;   // from one panel to the next, in numbers
  bool is_left;     // panels of kRows lanes, else of kColumns
  int32_t* excess;  // what the sums of each left lane will be too large by; null for the right one
};

inline constexpr int kWidth = kPackLanes;  // numbers from a row of a tile of sums to the next

// Sums of products: float32 of float8, int32 of int8.
union Sum {
  float real;
  int32_t integer;
};

// Where a tile of sums goes, and by what it is multiplied: by one scale and then by the other,
// because the product of two small ones can underflow where the result does not.
struct Target {
  void* out;
  Real type;
  int64_t row_stride;       // of `out`, in numbers; columns are next to each other
  const float* row_scales;  // of row i: row_scales[i * row_scale_stride]
  int64_t row_scale_stride;
  const float* column_scales;
  bool columns_first;      // whether `column_scales` are applied first
  bool is_large;           // whether it is better not to keep the result in the caches
  const int32_t* excess;   // of row i, what its sums are too large by; null: they are right
};

struct DotKernels {
  int terms_per_step;

  // Packs `lanes` lanes of `source`, of the left operand at most kPackLanes, and `terms` terms of
  // each. Further lanes are added up to a multiple of kColumns.
  void (*pack)(const Source& source, int lanes, int64_t terms, const Panels& to);

  // sums[row * kWidth + column] = or, if `add`, += the products of the first `rows` lanes of a left
  // panel, or more, and `panels` right panels, each `panel_stride` numbers after the one before.
  void (*multiply)(const uint16_t* left, int rows, const uint16_t* right, int64_t panel_stride,
                   int panels, int64_t steps, bool add, Sum* sums);

  // sums[row * kWidth + column] = the products of kFewRows rows at most and kWidth columns at most as
  // they lie, with their terms next to each other. Null if there is no such way.
  void (*multiply_unpacked)(const Source& left, int64_t rows, Source right, int64_t columns,
                            int64_t terms, Sum* sums);

  // Scales, casts and writes a tile.
  void (*write)(const Sum* sums, int64_t rows, int64_t columns, const Target& target);

  // Lays out one row for `stream`: its terms in steps of 32 bits, as in panels, and zeros up to a
  // multiple of kStreamTerms of them. Returns what its sums will be too large by.
  int32_t (*lay_out)(const Source& row, int64_t terms, uint32_t* steps);

  // sums[row * sum_stride + place] += the products of `rows` rows, `left_stride` steps apart, and all
  // `lanes` of the right operand, which lie next to each other. The places are in tiles of kWidth
  // lanes, in which they have an order of their own. Null if there is no such way.
  void (*stream)(const uint32_t* left, int64_t left_stride, int rows, const Source& right,
                 int64_t lanes, int64_t terms, int64_t sum_stride, Sum* sums);

  // tile[row * kWidth + column] = the sums that `stream` left, of all parts, of `rows` times `stride`
  // numbers each.
  void (*settle)(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile);

  // So many rows at most take less time by `multiply_unpacked` than packed; there with it.
  int64_t (*unpacked_rows)(int64_t terms);

  // As `multiply`, of right panels that are stored in tiles: their bytes are as they are.
  void (*multiply_tiles)(const uint16_t* left, int rows, const uint16_t* right, int64_t panel_stride,
                         int panels, int64_t steps, bool add, Sum* sums);

  // sums[row * kWidth + column] = the products of kTileRowsAtOnce rows at most, as `lay_out` leaves them, and
  // up to four right panels that are stored in tiles. Null, as the one before, if there is no such way.
  void (*multiply_tile_rows)(const uint32_t* left, int64_t left_stride, int rows,
                             const uint16_t* right, int64_t panel_stride, int panels, int64_t steps,
                             Sum* sums);
};

// Unpacked, a row of int8 needs the numbers of a register to be added up for each column; packed, a
// column is turned.
inline int64_t UnpackedInt8Rows(int64_t terms) { return terms > 8 * 24 ? terms / 24 : 8; }

extern const DotKernels kPortableFloat8Dot;
extern const DotKernels kAvx2Float8Dot;
extern const DotKernels kAvx512Float8Dot;
extern const DotKernels kPortableInt8Dot;
extern const DotKernels kAvx2Int8Dot;
extern const DotKernels kAvxVnniInt8Dot;
extern const DotKernels kAvx512Int8Dot;
extern const DotKernels kAvx512Int8Dot256;  // as AVX-VNNI

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_DOT_H_
