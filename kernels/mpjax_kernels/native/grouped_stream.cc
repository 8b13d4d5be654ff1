// A few rows by int4 whose lanes lie next to each other, as a stream (`stream.h`): pieces are multiplied
// into sums of their own, exact in int32, and these are scaled, group by group in their order, when all
// of them are there. The first piece of a strip, which nothing comes before, is scaled as it is multiplied.

#include <algorithm>

#include "grouped_product.h"
#include "stream.h"

namespace mpjax {
namespace {

constexpr int64_t kMostSums = 8192;       // of the lanes of a strip and of all rows
constexpr int64_t kPartTerms = 512;       // of a group, at most
constexpr int64_t kLeastPieceTerms = 128;
constexpr int64_t kLanesAtOnce = 512;     // that are scaled and written
constexpr int64_t kLineFloats = 16;       // of a line of the caches

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return DivideUp(a, b) * b; }

// Lanes of as few strips as there may be.
int64_t StripOf(int64_t lanes, int64_t rows) {
  const int64_t most = std::max<int64_t>(1, kMostSums / rows / kBlockLanes) * kBlockLanes;
  return RoundUp(DivideUp(lanes, DivideUp(lanes, most)), kBlockLanes);
}

}  // namespace

GroupedCut::GroupedCut(const GroupedProduct& p, int64_t threads) {
  const int64_t group = p.terms / p.groups;
  part_terms = RoundUp(DivideUp(group, DivideUp(group, kPartTerms)), kTermsPerPack);
  group_parts = DivideUp(group, part_terms);
  parts = p.groups * group_parts;
  least_parts = std::max<int64_t>(1, kLeastPieceTerms / part_terms);
  this->threads = std::max<int64_t>(1, threads);
  while (EndOf(pieces) < parts) ++pieces;
  ++pieces;
  strip_lanes = StripOf(p.lanes, std::max<int64_t>(1, p.rows));
}

int64_t GroupedCut::EndOf(int64_t piece) const {
  int64_t end = 0;
  for (int64_t i = 0; i <= piece; ++i) {
    end = std::min(parts, end + std::max(least_parts, (parts - end) / threads));
  }
  return end;
}

int64_t GroupedTiles::strips() const { return DivideUp(p_.lanes, cut_.strip_lanes); }

int64_t GroupedTiles::pieces() const { return cut_.pieces * strips(); }

int64_t GroupedTiles::StreamTiles() const { return pieces() + DivideUp(p_.lanes, kLanesAtOnce); }

size_t GroupedTiles::StreamNumbers() const {
  return static_cast<size_t>(2 * (cut_.parts + 1) * p_.rows * RoundUp(p_.lanes, kBlockLanes));
}

// Groups that the first pieces scale.
int64_t GroupedTiles::first_groups() const { return cut_.EndOf(0) / cut_.group_parts; }

// Where the sums are from a lane on, that begins a tile.
int32_t* GroupedTiles::PartAt(int64_t part, int64_t lane) const {
  int32_t* first = reinterpret_cast<int32_t*>(stream_.data());
  return first + (part * RoundUp(p_.lanes, kBlockLanes) + lane) * p_.rows;
}

// What is scaled and added up so far, likewise.
float* GroupedTiles::TotalAt(int64_t lane) const {
  return reinterpret_cast<float*>(PartAt(cut_.parts, lane));
}

void GroupedTiles::StreamTile(int64_t tile) {
  if (tile < pieces()) {
    StreamPiece(tile);
    done_.fetch_add(1, std::memory_order_release);
    return;
  }
  WaitFor(done_, pieces());
  const int64_t first = (tile - pieces()) * kLanesAtOnce;
  SettleLanes(first, std::min(kLanesAtOnce, p_.lanes - first));
}

// So that they are near when the sums are settled.
void GroupedTiles::PrefetchScales(int64_t g, int64_t lane, int64_t lanes) const {
  const float* scales = p_.scale + g * p_.lanes + lane;
  for (int64_t i = 0; p_.groups > 1 && i < lanes; i += kLineFloats) __builtin_prefetch(scales + i, 0, 2);
}

void GroupedTiles::StreamPiece(int64_t piece) {
  const int64_t lane = piece % strips() * cut_.strip_lanes;
  const int64_t lanes = std::min(cut_.strip_lanes, p_.lanes - lane);
  const int64_t index = piece / strips(), end = cut_.EndOf(index), bytes = row_bytes();
  const uint8_t* left = reinterpret_cast<const uint8_t*>(left_.data());
  const int64_t first_parts = first_groups() * cut_.group_parts;  // their sums share a place
  for (int64_t part = cut_.EndOf(index - 1); part < end; ++part) {
    const int64_t g = part / cut_.group_parts, of_group = part % cut_.group_parts;
    const int64_t term = of_group * cut_.part_terms;
    const uint8_t* rows = left + g * (bytes / p_.groups) + term;
    PrefetchScales(g, lane, lanes);
    kernels_.multiply_lanes(p_.weight, lane, lanes, g * group() + term,
                            std::min(cut_.part_terms, group() - term), {rows, bytes, p_.rows},
                            PartAt(part < first_parts ? of_group : part, lane));
    if (part < first_parts && of_group == cut_.group_parts - 1) SettleGroup(g, 0, lane, lanes);
  }
}

// Adds a group, whose sums begin at a part, to the total of some lanes.
void GroupedTiles::SettleGroup(int64_t g, int64_t first_part, int64_t first, int64_t lanes) const {
  alignas(64) int32_t sums[kFewGroupedRows * kWidth];
  const int64_t numbers = p_.rows * kWidth;
  for (int64_t lane = first; lane < first + lanes; lane += kWidth) {
    const int32_t* of_group = PartAt(first_part, lane);
    if (cut_.group_parts > 1) {
      std::copy_n(of_group, numbers, sums);
      for (int64_t part = 1; part < cut_.group_parts; ++part) {
        const int32_t* from = PartAt(first_part + part, lane);
        for (int64_t i = 0; i < numbers; ++i) {
          sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) + static_cast<uint32_t>(from[i]));
        }
      }
      of_group = sums;
    }
    const int64_t width = std::min<int64_t>(kWidth, first + lanes - lane);
    Settle(of_group, 0, p_.rows, lane, width, g, TotalAt(lane));
  }
}

// Group by group, whose scales and sums of neighbouring lanes are runs of memory.
void GroupedTiles::SettleLanes(int64_t first, int64_t lanes) const {
  for (int64_t g = first_groups(); g < p_.groups; ++g) {
    SettleGroup(g, g * cut_.group_parts, first, lanes);
  }
  for (int64_t lane = first; lane < first + lanes; lane += kWidth) {
    Write(TotalAt(lane), 0, p_.rows, lane, std::min<int64_t>(kWidth, first + lanes - lane));
  }
}

}  // namespace mpjax
