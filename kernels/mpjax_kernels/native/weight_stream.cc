// Few rows by a weight whose lanes lie next to each other, as a stream (`stream.h`): a piece is a strip
// of a part of the terms, whose sums are scaled group by group; the parts are added up when all of
// them are there, in their order.

#include <algorithm>

#include "weight_product.h"

namespace mpjax {
namespace {

constexpr int64_t kLanesAtOnce = 512;  // that are added up and written
constexpr int64_t kLineFloats = 16;    // of a line of the caches

}  // namespace

int64_t WeightTiles::StreamTiles() const {
  return pieces() + (p_.lanes + kLanesAtOnce - 1) / kLanesAtOnce;
}

void WeightTiles::StreamTile(int64_t tile) {
  if (tile < pieces()) {
    StreamPiece(tile);
    done_.fetch_add(1, std::memory_order_release);
    return;
  }
  WaitFor(done_, pieces());
  WriteLanes((tile - pieces()) * kLanesAtOnce);
}

float* WeightTiles::PartAt(int64_t part) const {
  return reinterpret_cast<float*>(parts_.data()) + part * p_.rows * p_.lanes;
}

void WeightTiles::StreamPiece(int64_t piece) {
  alignas(64) float sums[kStripSums + kDirectRows * kPlaces];
  const int64_t strip = piece / cut_.parts, part = piece % cut_.parts;
  const int64_t lane = strip * cut_.strip_lanes, lanes = std::min(cut_.strip_lanes, p_.lanes - lane);
  const int64_t first = part * cut_.part_terms, end = std::min(p_.terms, first + cut_.part_terms);
  const int64_t places = (lanes + kPlaces - 1) / kPlaces * kPlaces;
  float* total = PartAt(part) + lane;
  for (int64_t row = 0; row < p_.rows; ++row) std::fill_n(total + row * p_.lanes, lanes, 0.0f);
  for (int64_t term = first, next; term < end; term = next) {
    const int64_t g = term / group();
    next = std::min(end, (g + 1) * group());
    const Run run = {lane, static_cast<int>(lanes), term, static_cast<int>(next - term), nullptr};
    std::fill_n(sums, p_.rows * places, 0.0f);
    // So that the scales are near when the sums are.
    for (int64_t i = 0; i < lanes; i += kLineFloats) {
      __builtin_prefetch(p_.scale + g * p_.lanes + lane + i, 0, 2);
    }
    kernels_.stream(p_.weight, run, LeftAt(0, g, term - g * group()), left_stride_, p_.rows, places,
                    sums);
    for (int64_t row = 0; row < p_.rows; ++row) {
      kernels_.fold(p_.weight, sums + row * places, p_.scale + g * p_.lanes + lane, lanes,
                    total + row * p_.lanes);
    }
  }
}

void WeightTiles::WriteLanes(int64_t first) const {
  alignas(64) float sums[kDirectRows * kWidth];
  const int64_t end = std::min(p_.lanes, first + kLanesAtOnce);
  for (int64_t lane = first; lane < end; lane += kWidth) {
    const int64_t lanes = std::min<int64_t>(kWidth, end - lane);
    for (int64_t row = 0; row < p_.rows; ++row) {
      float* to = sums + row * kWidth;
      std::copy_n(PartAt(0) + row * p_.lanes + lane, lanes, to);
      for (int64_t part = 1; part < cut_.parts; ++part) {
        const float* from = PartAt(part) + row * p_.lanes + lane;
        for (int64_t i = 0; i < lanes; ++i) to[i] += from[i];
      }
    }
    Write(sums, nullptr, 0, p_.rows, lane, lanes);
  }
}

}  // namespace mpjax
