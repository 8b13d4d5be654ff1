// The product of an array by a weight of 8 bits or int4 with its scales, tile by tile:
//
//   out[i, j] = sum over groups g of (sum over terms t of g of
//               left[i, t] * (weight[j, t] - zero[g, j])) * scale[g, j]

#ifndef MPJAX_KERNELS_NATIVE_WEIGHT_PRODUCT_H_
#define MPJAX_KERNELS_NATIVE_WEIGHT_PRODUCT_H_

#include <atomic>
#include <cstdint>
#include <memory>

#include "claims.h"
#include "scratch.h"
#include "stream.h"
#include "weight.h"

namespace mpjax {

struct WeightProduct {
  const void* left;  // [rows, terms]
  Real left_type;
  int64_t rows;
  int64_t terms;
  Weight weight;
  int64_t lanes;
  int64_t groups;       // of as many terms each
  const float* scale;   // [groups, lanes]
  const int8_t* zero;   // [groups, lanes], or null
  void* out;            // [rows, lanes]
  Real out_type;
};

// One product: its rows are converted first, and then its tiles are computed, begun in their order.
class WeightTiles {
 public:
  // Takes the second of the kernels for a bfloat16 array, unless only the first multiply so few rows
  // directly.
  WeightTiles(const WeightKernels& in_float32, const WeightKernels& best, const WeightProduct& p);

  bool in_memory() const { return left_.data() != nullptr && parts_.data() != nullptr; }
  int64_t row_count() const { return (p_.rows + kTileRows - 1) / kTileRows; }
  void Prepare(int64_t tile);
  int64_t tile_count() const;
  Claims claims() const { return is_stream_ ? Claims::kInOrder : Claims::kInRuns; }
  void Compute(int64_t tile);

 private:
  static constexpr int64_t kTileRows = 128;

  int64_t group() const { return p_.terms / p_.groups; }
  void ComputeStrip(int64_t row, int64_t rows, int64_t lane, int64_t lanes) const;
  void ComputeDirectly(int64_t lane) const;
  const float* Zeros(int64_t group, int64_t lane, int64_t lanes, float* to) const;
  void Write(const float* total, const float* scales, int64_t row, int64_t rows, int64_t lane,
             int64_t lanes) const;
  const uint32_t* LeftAt(int64_t row, int64_t group, int64_t term) const;

  // In `weight_stream.cc`: a product whose weight is read as a stream. Its first tiles are pieces of
  // the weight, and the others the lanes of the result, which wait for those.
  int64_t pieces() const { return cut_.strips * cut_.parts; }
  int64_t StreamTiles() const;
  void StreamTile(int64_t tile);
  void StreamPiece(int64_t piece);
  void WriteLanes(int64_t first) const;
  float* PartAt(int64_t part) const;

  const WeightProduct p_;
  const WeightKernels& kernels_;
  const int64_t direct_;       // lanes that are multiplied directly; 0: none
  const int64_t strip_;        // lanes of a tile
  const int64_t group_steps_;  // steps of a group of a converted row
  const int64_t left_stride_;  // steps from a converted row to the next
  const bool is_stream_;
  const Cut cut_;  // of a stream
  Scratch left_;
  Scratch parts_;  // of a stream, the sums of each part
  std::atomic<int64_t> done_{0};  // pieces of a stream
};

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_WEIGHT_PRODUCT_H_
