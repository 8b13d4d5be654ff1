// Rows are laid out first, parts are multiplied next, and then tiles of columns are added up, scaled
// and written: all in one loop, whose indices are claimed in their order, so who waits for those
// before waits for what others are computing, never for what nobody has begun.

#include "stream.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "scratch.h"

namespace mpjax {
namespace {

constexpr int64_t kMostParts = 16, kLeastPartTerms = 128;
constexpr int64_t kTilesAtOnce = 8;   // tiles of columns that are written at once

constexpr int kSpins = 4000;

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sums of a product, in the order in which `kernels.stream` leaves them.
class Streamed {
 public:
  Streamed(const DotKernels& kernels, const Product& product)
      : kernels_(kernels),
        p_(product),
        cut_(product.terms, product.right.lanes, product.left.lanes, kStreamTerms),
        padded_(DivideUp(product.right.lanes, kWidth) * kWidth),
        left_stride_(DivideUp(product.terms, kStreamTerms) * kStreamTerms / kernels.terms_per_step),
        left_(static_cast<size_t>(rows() * left_stride_ * kLaneNumbers)),
        sums_(static_cast<size_t>(2 * cut_.parts * rows() * padded_)) {}

  bool Run(Loop& loop) {
    if (left_.data() == nullptr || sums_.data() == nullptr) return false;
    LayOutRows();
    const int64_t pieces = cut_.strips * cut_.parts, tiles = padded_ / kWidth;
    std::atomic<int64_t> done{0};
    auto body = [&](int64_t i) {
      if (i < pieces) {
        Multiply(i / cut_.parts, i % cut_.parts);
        done.fetch_add(1, std::memory_order_release);
        return;
      }
      WaitFor(done, pieces);
      const int64_t first = (i - pieces) * kTilesAtOnce;
      for (int64_t tile = first; tile < std::min(tiles, first + kTilesAtOnce); ++tile) Write(tile);
    };
    loop(pieces + DivideUp(tiles, kTilesAtOnce), body, Claims::kInOrder);
    return true;
  }

 private:
  int rows() const { return static_cast<int>(p_.left.lanes); }
  Sum* SumsOf(int64_t part) { return reinterpret_cast<Sum*>(sums_.data()) + part * rows() * padded_; }

  uint32_t* LeftAt(int64_t row, int64_t term) {
    return reinterpret_cast<uint32_t*>(left_.data()) + row * left_stride_ +
           term / kernels_.terms_per_step;
  }

  void LayOutRows() {
    const Matrix& left = p_.left;
    for (int row = 0; row < rows(); ++row) {
      const Source of_row = {left.data + row * left.lane_stride, left.lane_stride, left.term_stride,
                             left.table};
      excess_[row] = kernels_.lay_out(of_row, p_.terms, LeftAt(row, 0));
    }
  }

  void Multiply(int64_t strip, int64_t part) {
    const int64_t lane = strip * cut_.strip_lanes, term = part * cut_.part_terms;
    const int64_t lanes = std::min(cut_.strip_lanes, p_.right.lanes - lane);
    const int64_t terms = std::min(cut_.part_terms, p_.terms - term);
    Sum* sums = SumsOf(part) + lane;
    for (int row = 0; row < rows(); ++row) {
      std::memset(sums + row * padded_, 0, static_cast<size_t>(DivideUp(lanes, kWidth) * kWidth) * 4);
    }
    const uint8_t* data = p_.right.data + term * p_.right.term_stride + lane;
    const Source right = {data, 1, p_.right.term_stride, p_.right.table};
    kernels_.stream(LeftAt(0, term), left_stride_, rows(), right, lanes, terms, padded_, sums);
  }

  void Write(int64_t tile) {
    alignas(64) Sum sums[kStreamRows * kWidth];
    float scales[kWidth];
    const int64_t column = tile * kWidth, width = std::min<int64_t>(kWidth, p_.right.lanes - column);
    kernels_.settle(SumsOf(0) + column, rows(), padded_, cut_.parts, sums);
    for (int64_t j = 0; j < width; ++j) {
      scales[j] = p_.right.scale[(column + j) * p_.right.scale_stride];
    }
    char* out = static_cast<char*>(p_.out) + column * BytesOf(p_.out_type);
    const Target target = {out, p_.out_type, p_.right.lanes, p_.left.scale,
                           p_.left.scale_stride, scales, false, false, excess_};
    kernels_.write(sums, rows(), width, target);
  }

  const DotKernels& kernels_;
  const Product& p_;
  const Cut cut_;
  const int64_t padded_;  // lanes, with those that fill the last tile
  const int64_t left_stride_;  // steps of a row that is laid out
  Scratch left_, sums_;
  int32_t excess_[kStreamRows] = {};
};

}  // namespace

Cut::Cut(int64_t terms, int64_t lanes, int64_t rows, int64_t unit) {
  strip_lanes = std::max<int64_t>(1, kStripSums / rows / kWidth) * kWidth;
  strips = DivideUp(lanes, strip_lanes);
  const int64_t most = std::max<int64_t>(1, kMostParts / strips);
  const int64_t least = DivideUp(kLeastPartTerms, unit) * unit;
  part_terms = std::max(least, DivideUp(DivideUp(terms, most), unit) * unit);
  parts = std::max<int64_t>(1, DivideUp(terms, part_terms));
}

void WaitFor(const std::atomic<int64_t>& done, int64_t count) {
  for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > kSpins) std::this_thread::yield();
  }
}

bool IsStream(const DotKernels& kernels, const Product& product) {
  return kernels.stream != nullptr && product.left.lanes <= kStreamRows &&
         product.right.lane_stride == 1 && product.right.lanes >= kWidth;
}

bool Stream(const DotKernels& kernels, const Product& product, Loop& loop) {
  return Streamed(kernels, product).Run(loop);
}

}  // namespace mpjax
