// The weight is decoded where it is multiplied, once for the rows of a tile, and nowhere else. Few
// rows are multiplied as it is decoded, in registers; more of them by panels in the first caches.
// Where the lanes of the weight lie next to each other, few rows take it as a stream (`stream.h`).

#include "weight_product.h"

#include <algorithm>
#include <cstring>

namespace mpjax {
namespace {

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
void ToFloats(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(from[i]);
}

int DirectLanes(const WeightKernels& kernels, const WeightProduct& p) {
  return kernels.direct_lanes(p.weight, p.rows, p.terms / p.groups, p.zero != nullptr);
}

// Those for the array's dtype, unless only those in float32 multiply so few rows directly.
const WeightKernels& Choose(const WeightKernels& in_float32, const WeightKernels& best,
                            const WeightProduct& p) {
  if (p.left_type != Real::kBfloat16) return in_float32;
  return DirectLanes(best, p) == 0 && DirectLanes(in_float32, p) > 0 ? in_float32 : best;
}

// Groups of few terms would be scaled more often than multiplied.
constexpr int64_t kLeastGroup = 16;

bool IsStream(const WeightKernels& kernels, const WeightProduct& p) {
  return kernels.stream != nullptr && p.rows <= kDirectRows && !p.weight.terms_last &&
         p.zero == nullptr && p.lanes >= kWidth && (p.groups == 1 || p.terms / p.groups >= kLeastGroup);
}

constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a result that caches need not keep

}  // namespace

WeightTiles::WeightTiles(const WeightKernels& in_float32, const WeightKernels& best,
                         const WeightProduct& p)
    : p_(p),
      kernels_(Choose(in_float32, best, p)),
      direct_(DirectLanes(kernels_, p)),
      strip_(std::max<int64_t>(direct_, kWidth)),
      group_steps_(DivideUp(group(), kTermsPerPack) * kTermsPerPack / kernels_.terms_per_step),
      left_stride_(p.groups * group_steps_ + 16),  // no multiple of a page's size
      is_stream_(IsStream(kernels_, p)),
      cut_(p.terms, p.lanes, p.rows, p.groups == 1 ? kStreamTerms : group()),
      left_(static_cast<size_t>(p.rows * left_stride_ * kLaneNumbers)),
      parts_(static_cast<size_t>(is_stream_ ? cut_.parts * p.rows * p.lanes * kLaneNumbers : 1)) {}

int64_t WeightTiles::tile_count() const {
  return is_stream_ ? StreamTiles() : row_count() * DivideUp(p_.lanes, strip_);
}

const uint32_t* WeightTiles::LeftAt(int64_t row, int64_t group, int64_t term) const {
  const uint32_t* left = reinterpret_cast<const uint32_t*>(left_.data());
  return left + row * left_stride_ + group * group_steps_ + term / kernels_.terms_per_step;
}

void WeightTiles::Prepare(int64_t tile) {
  const int64_t last = std::min(p_.rows, (tile + 1) * kTileRows), terms = group();
  const size_t padded = static_cast<size_t>(group_steps_) * sizeof(uint32_t);
  for (int64_t row = tile * kTileRows; row < last; ++row) {
    for (int64_t g = 0; g < p_.groups; ++g) {
      char* to = reinterpret_cast<char*>(const_cast<uint32_t*>(LeftAt(row, g, 0)));
      const int64_t from = row * p_.terms + g * terms;
      const size_t bytes = static_cast<size_t>(terms) * (kernels_.terms_per_step == 2 ? 2 : 4);
      const char* data = static_cast<const char*>(p_.left) + from * BytesOf(p_.left_type);
      if (kernels_.terms_per_step == 2 || p_.left_type == Real::kFloat32) {
        std::memcpy(to, data, bytes);
      } else if (p_.left_type == Real::kBfloat16) {
        ToFloats(reinterpret_cast<const uint16_t*>(data), terms, reinterpret_cast<float*>(to));
      } else {
        ToFloats(reinterpret_cast<const Float16*>(data), terms, reinterpret_cast<float*>(to));
      }
      std::memset(to + bytes, 0, padded - bytes);
    }
  }
}

void WeightTiles::Compute(int64_t tile) {
  if (is_stream_) return StreamTile(tile);
  const int64_t row = tile % row_count() * kTileRows, rows = std::min(kTileRows, p_.rows - row);
  const int64_t lane = tile / row_count() * strip_, lanes = std::min(strip_, p_.lanes - lane);
  if (lanes == direct_) return ComputeDirectly(lane);
  for (int64_t i = 0; i < lanes; i += kWidth) {
    ComputeStrip(row, rows, lane + i, std::min<int64_t>(kWidth, lanes - i));
  }
}

void WeightTiles::ComputeStrip(int64_t row, int64_t rows, int64_t lane, int64_t lanes) const {
  alignas(64) uint16_t panels[kWidth * kLaneNumbers * kRunTerms];
  alignas(64) float sums[kTileRows * kWidth], total[kTileRows * kWidth];
  float zeros[kWidth], scales[kWidth] = {};
  if (lanes < kWidth) std::memset(panels, 0, sizeof(panels));
  for (int64_t g = 0; g < p_.groups; ++g) {
    const float* offsets = Zeros(g, lane, lanes, zeros);
    for (int64_t term = 0; term < group(); term += kRunTerms) {
      const int terms = static_cast<int>(std::min<int64_t>(kRunTerms, group() - term));
      const Run run = {lane, static_cast<int>(lanes), g * group() + term, terms, offsets};
      kernels_.pack(p_.weight, run, panels);
      const int64_t steps = DivideUp(terms, kTermsPerPack) * kTermsPerPack / kernels_.terms_per_step;
      kernels_.multiply(LeftAt(row, g, term), left_stride_, rows, panels, steps, term > 0, sums);
    }
    std::copy_n(p_.scale + g * p_.lanes + lane, lanes, scales);
    if (p_.groups > 1) kernels_.scale(sums, rows, scales, g > 0, total);
  }
  Write(p_.groups > 1 ? total : sums, scales, row, rows, lane, lanes);
}

void WeightTiles::ComputeDirectly(int64_t lane) const {
  alignas(64) float sums[kDirectRows * kDirectLanes], total[kDirectRows * kDirectLanes];
  float zeros[kDirectLanes];
  const int64_t tiles = direct_ / kWidth, numbers = p_.rows * kWidth;
  for (int64_t g = 0; g < p_.groups; ++g) {
    const Run run = {lane, static_cast<int>(direct_), g * group(), static_cast<int>(group()),
                     Zeros(g, lane, direct_, zeros)};
    kernels_.multiply_direct(p_.weight, run, LeftAt(0, g, 0), left_stride_, p_.rows, sums);
    for (int64_t tile = 0; p_.groups > 1 && tile < tiles; ++tile) {
      const float* scales = p_.scale + g * p_.lanes + lane + tile * kWidth;
      kernels_.scale(sums + tile * numbers, p_.rows, scales, g > 0, total + tile * numbers);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = lane + tile * kWidth;
    const float* found = (p_.groups > 1 ? total : sums) + tile * numbers;
    Write(found, p_.scale + first, 0, p_.rows, first, kWidth);
  }
}

const float* WeightTiles::Zeros(int64_t group, int64_t lane, int64_t lanes, float* to) const {
  if (p_.zero == nullptr) return nullptr;
  const int8_t* from = p_.zero + group * p_.lanes + lane;
  for (int64_t i = 0; i < lanes; ++i) to[i] = from[i];
  return to;
}

// Writes a tile, which has its scales if there are several groups, or none are given.
void WeightTiles::Write(const float* total, const float* scales, int64_t row, int64_t rows,
                        int64_t lane, int64_t lanes) const {
  static const float one = 1;
  float ones[kWidth];
  std::fill_n(ones, kWidth, 1.0f);
  const int64_t bytes = BytesOf(p_.out_type);
  char* out = static_cast<char*>(p_.out) + (row * p_.lanes + lane) * bytes;
  const Target target = {out, p_.out_type, p_.lanes, &one, 0,
                         p_.groups > 1 || scales == nullptr ? ones : scales, false,
                         p_.rows * p_.lanes * bytes >= kLarge, nullptr};
  kernels_.write(reinterpret_cast<const Sum*>(total), rows, lanes, target);
}

}  // namespace mpjax
