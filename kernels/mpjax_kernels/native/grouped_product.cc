// Few rows are multiplied by a weight whose terms lie next to each other as it is; more of them, or a
// weight that lies otherwise, in panels: rows are packed once, and the weight strip by strip, a few
// groups at a time, in the first caches. int4 whose lanes lie next to each other is a stream for few
// rows.

#include "grouped_product.h"

#include <algorithm>
#include <cstring>

namespace mpjax {
namespace {

constexpr int64_t kSumsAtOnce = 8192;  // of a few rows: 32 KiB
constexpr int64_t kLeastGroup = 16;    // groups of few terms would be scaled more often than multiplied

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many groups share a block, or 0 for no kernel of its own.
int PartsOf(const DirectKernel& kernel, const GroupedProduct& p) {
  const int64_t block = kernel.block_terms, group = p.terms / p.groups;
  if (block == 0 || p.rows > kFewGroupedRows || !p.weight.terms_last) return 0;
  if (kernel.most_parts * group < block) return 0;  // most of a register would be empty
  return 4 * group == block ? 4 : 2 * group == block ? 2 : 1;
}

int32_t SumOf(const uint8_t* row, int64_t terms) {
  const int8_t* of = reinterpret_cast<const int8_t*>(row);
  int32_t sum = 0;
  for (int64_t term = 0; term < terms; ++term) sum += of[term];
  return sum;
}

int32_t Times(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

// In blocks of so many terms the even ones first, and zeros after the last one.
void Split(const uint8_t* from, int64_t terms, int64_t block, uint8_t* to) {
  for (int64_t first = 0; first < terms; first += block, to += block) {
    const int64_t pairs = std::min(block, terms - first) / 2;
    for (int64_t i = 0; i < pairs; ++i) to[i] = from[first + 2 * i];
    for (int64_t i = 0; i < pairs; ++i) to[block / 2 + i] = from[first + 2 * i + 1];
    std::memset(to + pairs, 0, static_cast<size_t>(block / 2 - pairs));
    std::memset(to + block / 2 + pairs, 0, static_cast<size_t>(block / 2 - pairs));
  }
}

bool IsStream(const GroupedKernels& kernels, const GroupedProduct& p) {
  return kernels.multiply_lanes != nullptr && p.weight.is_int4 && !p.weight.terms_last &&
         p.rows <= kFewGroupedRows && p.terms / p.groups >= kLeastGroup;
}

constexpr int64_t kEight = 8, kLinesAhead = 16;
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a result that caches need not keep

}  // namespace

GroupedTiles::GroupedTiles(const GroupedKernels& kernels, const GroupedProduct& p, int64_t threads)
    : p_(p),
      kernels_(kernels),
      direct_(p.weight.is_int4 ? kernels.int4 : kernels.int8),
      parts_(PartsOf(direct_, p)),
      is_stream_(IsStream(kernels, p)),
      cut_(p, threads),
      is_eights_(kernels.pack_eights != nullptr && p.weight.is_int4 && p.weight.terms_last),
      group_steps_(DivideUp(group(), is_eights_ ? kEight : kTermsPerPack) *
                   (is_eights_ ? kEight : kTermsPerPack) / kernels.dot->terms_per_step),
      left_(static_cast<size_t>(
          parts_ > 0 || is_stream_
              ? DivideUp(p.rows * row_bytes(), 2)
              : DivideUp(p.rows, kColumns) * kColumns * kLaneNumbers * p.groups * group_steps_)),
      sums_(static_cast<size_t>(4 * p.groups * p.rows)),
      stream_(is_stream_ ? StreamNumbers() : 1) {}

bool GroupedTiles::in_memory() const {
  return left_.data() != nullptr && sums_.data() != nullptr && stream_.data() != nullptr;
}

// Of a row.
int64_t GroupedTiles::direct_blocks() const {
  return parts_ == 1 ? p_.groups * DivideUp(group(), direct_.block_terms)
                     : DivideUp(p_.terms, direct_.block_terms);
}

// Of a row that is laid out for a few.
int64_t GroupedTiles::row_bytes() const {
  if (is_stream_) return p_.groups * DivideUp(group(), kTermsPerPack) * kTermsPerPack;
  return direct_blocks() * direct_.block_terms;
}

int32_t* GroupedTiles::RowSums(int64_t group, int64_t row) const {
  return reinterpret_cast<int32_t*>(sums_.data()) + group * p_.rows + row;
}

int32_t* GroupedTiles::Excess(int64_t group, int64_t row) const {
  return RowSums(p_.groups + group, row);
}

int64_t GroupedTiles::tile_count() const {
  return is_stream_ ? StreamTiles() : row_count() * DivideUp(p_.lanes, kWidth);
}

void GroupedTiles::Prepare(int64_t tile) {
  const int64_t first = tile * kTileRows, rows = std::min(kTileRows, p_.rows - first);
  for (int64_t row = first; row < first + rows; ++row) {
    for (int64_t g = 0; g < p_.groups; ++g) {
      *RowSums(g, row) = SumOf(p_.left + row * p_.terms + g * group(), group());
    }
    if (parts_ > 0 || is_stream_) LayOutDirectly(row);
  }
  if (parts_ == 0 && !is_stream_) LayOutPanels(first, rows);
}

void GroupedTiles::LayOutDirectly(int64_t row) {
  const int64_t block = is_stream_ ? kTermsPerPack : direct_.block_terms;
  const int64_t segments = parts_ <= 1 ? p_.groups : 1;
  const int64_t terms = p_.terms / segments, padded = DivideUp(terms, block) * block;
  uint8_t* to = reinterpret_cast<uint8_t*>(left_.data()) + row * row_bytes();
  for (int64_t segment = 0; segment < segments; ++segment, to += padded) {
    const uint8_t* from = p_.left + row * p_.terms + segment * terms;
    if (p_.weight.is_int4 && !is_stream_) {
      Split(from, terms, block, to);
    } else {
      std::memcpy(to, from, static_cast<size_t>(terms));
      std::memset(to + terms, 0, static_cast<size_t>(padded - terms));
    }
  }
  const int32_t bias = is_stream_ ? kNibbleBias : direct_.bias;
  for (int64_t g = 0; g < p_.groups; ++g) *Excess(g, row) = Times(bias, *RowSums(g, row));
}

void GroupedTiles::LayOutPanels(int64_t row, int64_t rows) {
  const int64_t stride = kRows * kLaneNumbers * p_.groups * group_steps_;
  int32_t excess[kPackLanes] = {};  // where packing leaves it, sums are right
  for (int64_t g = 0; g < p_.groups; ++g) {
    std::fill_n(Excess(g, row), rows, 0);
    for (int64_t term = 0; term < group(); term += kRunTerms) {
      const int64_t step = g * group_steps_ + term / kernels_.dot->terms_per_step;
      const int64_t terms = std::min<int64_t>(kRunTerms, group() - term);
      uint16_t* to = left_.data() + row / kRows * stride + step * kLaneNumbers * kRows;
      PackRows(row, rows, g * group() + term, terms, {to, stride, true, excess});
      for (int64_t i = 0; i < rows; ++i) {
        int32_t* sum = Excess(g, row + i);
        *sum = static_cast<int32_t>(static_cast<uint32_t>(*sum) + static_cast<uint32_t>(excess[i]));
      }
    }
    for (int64_t i = 0; is_eights_ && i < rows; ++i) {
      *Excess(g, row + i) = Times(kNibbleBias, *RowSums(g, row + i));
    }
  }
}

void GroupedTiles::PackRows(int64_t row, int64_t rows, int64_t term, int64_t terms,
                            const Panels& to) const {
  const uint8_t* from = p_.left + row * p_.terms + term;
  const int lanes = static_cast<int>(rows);
  if (!is_eights_) return kernels_.dot->pack({from, p_.terms, 1, nullptr}, lanes, terms, to);
  constexpr int64_t kStride = kRunTerms + 64;
  alignas(64) uint8_t split[kTileRows * kStride];
  for (int64_t i = 0; i < rows; ++i) Split(from + i * p_.terms, terms, kEight, split + i * kStride);
  kernels_.dot->pack({split, kStride, 1, nullptr}, lanes, DivideUp(terms, kEight) * kEight, to);
}

void GroupedTiles::PackLanes(int64_t lane, int64_t lanes, int64_t term, int64_t terms,
                             const Panels& to) const {
  const Weight& w = p_.weight;
  const int64_t first = w.terms_last ? lane * w.stride + term : term * w.stride + lane;
  const int count = static_cast<int>(lanes);
  if (!w.is_int4) {
    const int64_t strides[] = {w.stride, 1};
    return kernels_.dot->pack(
        {w.data + first, strides[!w.terms_last], strides[w.terms_last], nullptr}, count, terms, to);
  }
  if (is_eights_) return kernels_.pack_eights(w.data + first / 2, w.stride / 2, count, terms, to);
  constexpr int64_t kTermsStride = kRunTerms + 64;
  alignas(64) uint8_t bytes[kWidth * kTermsStride];
  const int64_t lines = w.terms_last ? lanes : terms, length = w.terms_last ? terms : lanes;
  const int64_t stride = w.terms_last ? kTermsStride : kWidth;
  for (int64_t line = 0; line < lines; ++line) {
    const uint8_t* from = w.data + (first + line * w.stride) / 2;
    __builtin_prefetch(from + kLinesAhead * w.stride / 2);  // it may be on another page
    kernels_.unpack(from, length, bytes + line * stride);
  }
  const int64_t strides[] = {stride, 1};
  kernels_.dot->pack({bytes, strides[!w.terms_last], strides[w.terms_last], nullptr}, count, terms, to);
}

void GroupedTiles::Compute(int64_t tile) {
  if (is_stream_) return StreamTile(tile);
  const int64_t row = tile % row_count() * kTileRows, rows = std::min(kTileRows, p_.rows - row);
  const int64_t lane = tile / row_count() * kWidth;
  const int64_t lanes = std::min<int64_t>(kWidth, p_.lanes - lane);
  if (parts_ > 0) return ComputeDirectly(lane, lanes);
  ComputeStrip(row, rows, lane, lanes);
}

void GroupedTiles::ComputeDirectly(int64_t lane, int64_t lanes) const {
  alignas(64) int32_t sums[kSumsAtOnce];
  alignas(64) float total[kFewGroupedRows * kWidth];
  const int64_t block = direct_.block_terms, blocks = direct_blocks();
  if (lanes < kWidth) std::memset(sums, 0, sizeof(sums));
  for (int64_t row = 0; row < p_.rows; row += kDirectRows) {
    const int64_t rows = std::min<int64_t>(kDirectRows, p_.rows - row), numbers = rows * kWidth;
    const int64_t at_once = kSumsAtOnce / numbers / 4 * 4;
    const uint8_t* left = reinterpret_cast<const uint8_t*>(left_.data()) + row * blocks * block;
    for (int64_t g = 0; g < p_.groups; g += at_once) {
      const int64_t here = std::min(at_once, p_.groups - g);
      const int64_t at = parts_ == 1 ? g * blocks / p_.groups : g / parts_;
      direct_.multiply(p_.weight, lane, static_cast<int>(lanes), g * group(),
                       {here, group(), parts_}, {left + at * block, blocks * block, rows}, sums);
      for (int64_t i = 0; i < here; ++i) {
        Settle(sums + i * numbers, row, rows, lane, lanes, g + i, total + row * kWidth);
      }
    }
  }
  Write(total, 0, p_.rows, lane, lanes);
}

void GroupedTiles::ComputeStrip(int64_t row, int64_t rows, int64_t lane, int64_t lanes) const {
  constexpr int64_t kLaneSteps = kLaneNumbers * kColumns;  // numbers of a step of a panel
  alignas(64) uint16_t panels[kWidth * kLaneNumbers * kRunTerms / 2];
  alignas(64) int32_t sums[kTileRows * kWidth];
  alignas(64) float total[kTileRows * kWidth];
  const DotKernels& dot = *kernels_.dot;
  const bool is_whole = group() <= kRunTerms;  // one sum at a time
  const int64_t at_once = is_whole && group() % kEight == 0 ? kRunTerms / group() : 1;
  const int64_t row_stride = kRows * kLaneNumbers * p_.groups * group_steps_;
  const int64_t tiles = DivideUp(lanes, kColumns);
  if (lanes < kWidth) std::memset(sums, 0, sizeof(sums));
  // Adds a run of steps of one group, `from` numbers into the panels, and settles it if it is the last.
  const auto multiply = [&](int64_t g, int64_t step, int64_t steps, int64_t from, int64_t stride) {
    for (int64_t i = 0; i < rows; i += kRows) {
      const int here = static_cast<int>(std::min<int64_t>(kRows, rows - i));
      const uint16_t* left = left_.data() + (row + i) / kRows * row_stride +
                             (g * group_steps_ + step) * kLaneNumbers * kRows;
      int32_t* to = sums + (is_whole ? 0 : i * kWidth);
      for (int64_t panel = 0; panel < tiles; panel += 2) {
        const int width = static_cast<int>(std::min<int64_t>(2, tiles - panel));
        dot.multiply(left, here, panels + from + panel * stride, stride, width, steps, step > 0,
                     reinterpret_cast<Sum*>(to + panel * kColumns));
      }
      if (step + steps == group_steps_) {
        Settle(to, row + i, here, lane, lanes, g, total + i * kWidth);
      }
    }
  };
  for (int64_t g = 0; g < p_.groups; g += at_once) {
    const int64_t groups = std::min(at_once, p_.groups - g);
    for (int64_t term = 0; term < group(); term += kRunTerms) {
      const int64_t terms = std::min<int64_t>(kRunTerms, groups * group() - term);
      const int64_t step = term / dot.terms_per_step;
      const int64_t steps = is_whole ? group_steps_ : std::min(kRunTerms / dot.terms_per_step * int64_t{1}, group_steps_ - step);
      const int64_t stride = kLaneSteps * steps * groups;
      PackLanes(lane, lanes, g * group() + term, terms, {panels, stride, false, nullptr});
      for (int64_t i = 0; i < groups; ++i) {
        multiply(g + i, step, steps, i * steps * kLaneSteps, stride);
      }
    }
  }
  Write(total, row, rows, lane, lanes);
}

void GroupedTiles::Settle(const int32_t* sums, int64_t row, int64_t rows, int64_t lane, int64_t lanes,
                          int64_t group, float* total) const {
  Strip strip;
  const int64_t first = group * p_.lanes + lane;
  const float* scales = p_.groups > 1 ? p_.scale + first : nullptr;
  if (scales != nullptr && lanes < kWidth) {
    std::fill_n(std::copy_n(scales, lanes, strip.scales), kWidth - lanes, 0.0f);
    scales = strip.scales;
  }
  const int32_t* zeros = p_.zero == nullptr ? nullptr : strip.zeros;
  if (zeros != nullptr) {
    std::fill_n(std::copy_n(p_.zero + first, lanes, strip.zeros), kWidth - lanes, 0);
  }
  kernels_.settle(sums, rows, Excess(group, row), zeros, RowSums(group, row), scales, group > 0,
                  total);
}

void GroupedTiles::Write(const float* total, int64_t row, int64_t rows, int64_t lane,
                         int64_t lanes) const {
  float scales[kWidth];
  std::fill_n(scales, kWidth, 1.0f);
  if (p_.groups == 1) std::copy_n(p_.scale + lane, lanes, scales);
  const int64_t bytes = BytesOf(p_.out_type);
  char* out = static_cast<char*>(p_.out) + (row * p_.lanes + lane) * bytes;
  const Target target = {out,    p_.out_type, p_.lanes, p_.row_scale + row * p_.row_scale_stride,
                         p_.row_scale_stride, scales, false, p_.rows * p_.lanes * bytes >= kLarge,
                         nullptr};
  kernels_.write(reinterpret_cast<const Sum*>(total), rows, lanes, target);
}

}  // namespace mpjax
