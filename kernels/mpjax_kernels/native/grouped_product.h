// The product of int8 by a weight of int8 or int4 with scales per group of terms, tile by tile:
//
//   out[i, j] = (sum over groups g of (sum over terms t of g of
//                left[i, t] * (weight[j, t] - zero[g, j])) * scale[g, j]) * row_scale[i]
//
// The sums of groups are exact, in int32; they are scaled and added up in float32, in their order. If
// there is one group only, its sum is multiplied by the scale of the row first.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_PRODUCT_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_PRODUCT_H_

#include <atomic>
#include <cstdint>

#include "claims.h"
#include "grouped.h"
#include "scratch.h"

namespace mpjax {

struct GroupedProduct {
  const uint8_t* left;  // int8 [rows, terms]
  int64_t rows;
  int64_t terms;
  const float* row_scale;  // of row i: row_scale[i * row_scale_stride]
  int64_t row_scale_stride;
  Weight weight;
  int64_t lanes;
  int64_t groups;      // of as many terms each; an even number if they are int4 next to each other
  const float* scale;  // [groups, lanes]
  const int8_t* zero;  // [groups, lanes], or null
  void* out;           // [rows, lanes]
  Real out_type;
};

// How a weight is cut that is read as a stream: into strips of lanes, whole lines of memory if these are
// not too long, and along the terms into parts, a group or several to a group, whose sums are exact. So
// nothing depends on how many parts make a piece for a thread: a part of what is left for each of them,
// and few at the end, when a thread that came late may still have some.
struct GroupedCut {
  int64_t part_terms;
  int64_t group_parts;
  int64_t parts;
  int64_t least_parts;  // of a piece
  int64_t threads;
  int64_t pieces = 0;
  int64_t strip_lanes;

  GroupedCut(const GroupedProduct& p, int64_t threads);

  // The part after a piece; of -1 the first one.
  int64_t EndOf(int64_t piece) const;
};

// One product: its rows are laid out first, and then its tiles are computed, begun in their order.
class GroupedTiles {
 public:
  // So many threads compute tiles; what they compute does not depend on it.
  GroupedTiles(const GroupedKernels& kernels, const GroupedProduct& p, int64_t threads);

  bool in_memory() const;
  int64_t row_count() const { return (p_.rows + kTileRows - 1) / kTileRows; }
  void Prepare(int64_t tile);
  int64_t tile_count() const;
  Claims claims() const { return is_stream_ ? Claims::kInOrder : Claims::kInRuns; }
  void Compute(int64_t tile);

 private:
  static constexpr int64_t kTileRows = kPackLanes;

  // Scales and zero points of kWidth lanes in one group.
  struct Strip {
    alignas(64) float scales[kWidth];
    alignas(64) int32_t zeros[kWidth];
  };

  int64_t group() const { return p_.terms / p_.groups; }
  int64_t direct_blocks() const;
  int64_t row_bytes() const;
  void LayOutDirectly(int64_t row);
  void LayOutPanels(int64_t row, int64_t rows);
  void PackRows(int64_t row, int64_t rows, int64_t term, int64_t terms, const Panels& to) const;
  void PackLanes(int64_t lane, int64_t lanes, int64_t term, int64_t terms, const Panels& to) const;
  void ComputeDirectly(int64_t lane, int64_t lanes) const;
  void ComputeStrip(int64_t row, int64_t rows, int64_t lane, int64_t lanes) const;
  void Settle(const int32_t* sums, int64_t row, int64_t rows, int64_t lane, int64_t lanes,
              int64_t group, float* total) const;
  void Write(const float* total, int64_t row, int64_t rows, int64_t lane, int64_t lanes) const;

  // In `grouped_stream.cc`: a product whose weight is read as a stream. Its first tiles are pieces of
  // the weight, and the others the lanes of the result, which wait for those.
  int64_t strips() const;
  int64_t pieces() const;
  int64_t StreamTiles() const;
  size_t StreamNumbers() const;
  void StreamTile(int64_t tile);
  void StreamPiece(int64_t piece);
  void PrefetchScales(int64_t group, int64_t lane, int64_t lanes) const;
  int64_t first_groups() const;
  void SettleGroup(int64_t group, int64_t first_part, int64_t first, int64_t lanes) const;
  void SettleLanes(int64_t first, int64_t lanes) const;
  int32_t* PartAt(int64_t part, int64_t lane) const;
  float* TotalAt(int64_t lane) const;

  int32_t* RowSums(int64_t group, int64_t row) const;
  int32_t* Excess(int64_t group, int64_t row) const;

  const GroupedProduct p_;
  const GroupedKernels& kernels_;
  const DirectKernel& direct_;
  const int parts_;            // groups that share a block of a few rows; 0: there are no blocks
  const bool is_stream_;       // whether a few rows take the weight as a stream of all lanes
  const GroupedCut cut_;       // of that
  const bool is_eights_;       // whether int4 is packed as it is
  const int64_t group_steps_;  // steps of a group in panels
  Scratch left_;
  Scratch sums_;  // of the terms of rows in a group, and what they make its products too large by
  Scratch stream_;  // the sums of each part
  std::atomic<int64_t> done_{0};  // pieces
};

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_PRODUCT_H_
