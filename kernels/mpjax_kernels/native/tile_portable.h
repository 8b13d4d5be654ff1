// What products share in plain C++: the order of what is packed; scaling, casting and writing sums.

#ifndef MPJAX_KERNELS_NATIVE_TILE_PORTABLE_H_
#define MPJAX_KERNELS_NATIVE_TILE_PORTABLE_H_

#include <cstdint>

#include "dot.h"

namespace mpjax {
namespace {

// Calls put(bits, panel, its width, lane in it, term) for all that is packed, zeros added.
template <typename Put>
void ForEachPacked(const Source& source, int lanes, int64_t terms, bool is_left, const Put& put) {
  const int width = is_left ? kRows : kColumns;
  const int padded_lanes = (lanes + kColumns - 1) / kColumns * kColumns;
  const int64_t padded = (terms + kTermsPerPack - 1) / kTermsPerPack * kTermsPerPack;
  for (int64_t term = 0; term < padded; ++term) {
    for (int lane = 0; lane < padded_lanes; ++lane) {
      const bool exists = term < terms && lane < lanes;
      const int64_t from = lane * source.lane_stride + term * source.term_stride;
      put(exists ? source.data[from] : uint8_t{0}, lane / width, width, lane % width, term);
    }
  }
}

// Scales, casts and writes a tile, of which `load(sum)` makes each sum float32.
template <typename Load>
void WriteTile(const Sum* sums, int64_t rows, int64_t columns, const Target& target,
               const Load& load) {
  for (int64_t i = 0; i < rows; ++i) {
    const float row_scale = target.row_scales[i * target.row_scale_stride];
    for (int64_t j = 0; j < columns; ++j) {
      const float sum = load(sums[i * kWidth + j]), column_scale = target.column_scales[j];
      const float scaled =
          target.columns_first ? sum * column_scale * row_scale : sum * row_scale * column_scale;
      const int64_t at = i * target.row_stride + j;
      if (target.type == Real::kFloat32) {
        static_cast<float*>(target.out)[at] = scaled;
      } else {
        const bool is_bfloat16 = target.type == Real::kBfloat16;
        static_cast<uint16_t*>(target.out)[at] =
            is_bfloat16 ? ToBfloat16(scaled) : ToFloat16(scaled);
      }
    }
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_TILE_PORTABLE_H_
