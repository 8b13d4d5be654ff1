// A product of two float8 matrices, block by block:
//
//   out[i, j] = (sum over terms of left[i, t] * right[j, t]) * left.scale[i] * right.scale[j]
//
// Operands are decoded as they are packed into panels (`dot.h`), in the order in which they are
// multiplied, so none is ever transposed or decoded anywhere else. Blocks of panels are bounded, so
// that they stay in the second-level cache or not far from it; a tile of sums stays in the first.

#include "product.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace mpjax {
namespace {

constexpr int64_t kTileRows = 64, kTileColumns = kColumnPanels * kColumns;
constexpr int64_t kPairs = 256;                      // pairs of terms that are multiplied at a time
constexpr int64_t kBlockNumbers = int64_t{1} << 20;  // of packed numbers of an operand: 2 MiB
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a result that caches need not keep
constexpr int64_t kFewRows = 32;  // with fewer, a panel is multiplied as soon as it is packed

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Blocks {
 public:
  Blocks(const DotKernels& kernels, const Product& product, bool is_swapped)
      : kernels_(kernels),
        p_(product),
        pairs_(DivideUp(product.terms, kTermsPerStep) * 2),
        is_swapped_(is_swapped) {}

  bool Run(Loop& loop) {
    // So many lanes of either operand, whole tiles of them, fit into a block.
    const int64_t most = kBlockNumbers / std::max<int64_t>(1, 2 * pairs_);
    const int64_t rows = Whole(most, kTileRows, p_.left.lanes);
    const int64_t columns = Whole(most, kTileColumns, p_.right.lanes);
    const bool at_once = p_.left.lanes > kFewRows;
    Scratch left(static_cast<size_t>(rows * 2 * pairs_));
    Scratch right(static_cast<size_t>(at_once ? columns * 2 * pairs_ : 1));
    if (left.data() == nullptr || right.data() == nullptr) return false;
    left_ = left.data();
    for (int64_t row = 0; row < p_.left.lanes; row += rows) {
      first_row_ = row;
      rows_ = std::min(rows, p_.left.lanes - row);
      if (!at_once) Pack(loop, 0, 0, nullptr);
      for (int64_t column = 0; column < p_.right.lanes; column += columns) {
        const int64_t here = std::min(columns, p_.right.lanes - column);
        if (at_once) {
          Pack(loop, column, here, right.data());
          MultiplyPacked(loop, column, here, right.data());
        } else {
          PackAndMultiply(loop, column, here);
        }
      }
    }
    return true;
  }

 private:
  static int64_t Whole(int64_t most, int64_t tile, int64_t lanes) {
    return std::min(std::max<int64_t>(1, most / tile), DivideUp(lanes, tile)) * tile;
  }

  // The rows at hand, and columns if there is a place for them.
  void Pack(Loop& loop, int64_t column, int64_t columns, uint16_t* right) {
    const int64_t row_panels = DivideUp(rows_, 2 * kRows);
    const int64_t column_panels = right == nullptr ? 0 : DivideUp(columns, kColumns);
    auto body = [&](int64_t i) {
      if (i < row_panels) {
        uint16_t* panels = left_ + i * 2 * kRows * 2 * pairs_;
        PackLanes(p_.left, first_row_ + i * 2 * kRows, 2 * kRows, p_.terms, 0, panels,
                  panels + kRows * 2 * pairs_);
      } else {
        i -= row_panels;
        PackLanes(p_.right, column + i * kColumns, kColumns, p_.terms, 0,
                  right + i * kColumns * 2 * pairs_, nullptr);
      }
    };
    loop(row_panels + column_panels, body);
  }

  // `width` lanes from `lane` on, of which some may not exist, and terms from `term` on.
  void PackLanes(const Matrix& matrix, int64_t lane, int64_t width, int64_t terms, int64_t term,
                 uint16_t* first, uint16_t* second) {
    const int64_t lanes = std::min(width, matrix.lanes - lane);
    const uint8_t* data = matrix.data + lane * matrix.lane_stride + term * matrix.term_stride;
    const Source source = {data, matrix.lane_stride, matrix.term_stride};
    kernels_.pack(*matrix.table, source, static_cast<int>(lanes), terms, first, second);
  }

  // Tiles of the rows at hand and of packed columns; neighbouring ones share their columns.
  void MultiplyPacked(Loop& loop, int64_t column, int64_t columns, const uint16_t* right) {
    const int64_t row_tiles = DivideUp(rows_, kTileRows);
    auto body = [&](int64_t i) {
      const int64_t row = i % row_tiles * kTileRows, offset = i / row_tiles * kTileColumns;
      alignas(64) float sums[kTileRows * kTileColumns];
      const uint16_t* panels = right + offset * 2 * pairs_;
      const int64_t rows = std::min(kTileRows, rows_ - row);
      const int64_t width = std::min(kTileColumns, columns - offset);
      for (int64_t pair = 0; pair == 0 || pair < pairs_; pair += kPairs) {
        const int64_t here = std::min(kPairs, pairs_ - pair);
        MultiplyTile(row, rows, width, pair, here, panels + pair * 2 * kColumns,
                     kColumns * 2 * pairs_, sums);
      }
      Write(sums, row, rows, column + offset, width);
    };
    loop(row_tiles * DivideUp(columns, kTileColumns), body);
  }

  // All rows by one tile of columns at a time, packed in the first-level cache.
  void PackAndMultiply(Loop& loop, int64_t column, int64_t columns) {
    auto body = [&](int64_t i) {
      alignas(64) float sums[kFewRows * kTileColumns];
      alignas(64) uint16_t panels[kTileColumns * 2 * kPairs];
      const int64_t first = column + i * kTileColumns;
      const int64_t width = std::min(kTileColumns, column + columns - first);
      for (int64_t pair = 0; pair == 0 || pair < pairs_; pair += kPairs) {
        const int64_t here = std::min(kPairs, pairs_ - pair);
        const int64_t terms = std::min(2 * here, p_.terms - 2 * pair);
        for (int64_t panel = 0; panel * kColumns < width; ++panel) {
          PackLanes(p_.right, first + panel * kColumns, kColumns, terms, 2 * pair,
                    panels + panel * kColumns * 2 * kPairs, nullptr);
        }
        MultiplyTile(0, rows_, width, pair, here, panels, kColumns * 2 * kPairs, sums);
      }
      Write(sums, 0, rows_, first, width);
    };
    loop(DivideUp(columns, kTileColumns), body);
  }

  void MultiplyTile(int64_t row, int64_t rows, int64_t width, int64_t pair, int64_t pairs,
                    const uint16_t* right, int64_t panel_stride, float* sums) {
    const int panels = static_cast<int>(DivideUp(width, kColumns));
    for (int64_t i = 0; i < rows; i += kRows) {
      const uint16_t* left = left_ + (row + i) * 2 * pairs_ + pair * 2 * kRows;
      kernels_.multiply(left, right, panel_stride, panels, pairs, pair > 0,
                        sums + i * kTileColumns);
    }
  }

  void Write(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t width) const {
    float scales[kTileColumns];
    for (int64_t j = 0; j < width; ++j) {
      scales[j] = p_.right.scale[(column + j) * p_.right.scale_stride];
    }
    const int64_t lane = first_row_ + row, bytes = p_.out_is_bfloat16 ? 2 : 4;
    const float* row_scales = p_.left.scale + lane * p_.left.scale_stride;
    char* out = static_cast<char*>(p_.out);
    Target target = {out, p_.out_is_bfloat16, p_.right.lanes, row_scales, p_.left.scale_stride,
                     scales, is_swapped_, false};
    if (!is_swapped_) {
      target.out = out + (lane * p_.right.lanes + column) * bytes;
      target.is_large = p_.left.lanes * p_.right.lanes * bytes >= kLarge;
      return kernels_.write(sums, rows, width, target);
    }
    alignas(64) char tile[kTileRows * kTileColumns * 4];
    target.out = tile;
    target.row_stride = kTileColumns;
    kernels_.write(sums, rows, width, target);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = (column + j) * p_.left.lanes + lane + i;
        std::memcpy(out + at * bytes, tile + (i * kTileColumns + j) * bytes, bytes);
      }
    }
  }

  const DotKernels& kernels_;
  const Product& p_;
  const int64_t pairs_;
  const bool is_swapped_;  // whether `out` is [right.lanes, left.lanes]
  uint16_t* left_ = nullptr;
  int64_t first_row_ = 0, rows_ = 0;
};

}  // namespace

bool Compute(const DotKernels& kernels, Product product, Loop& loop) {
  // The right operand fills the vectors, so it is the one with more lanes.
  const bool swap = product.right.lanes < kColumns && product.left.lanes > product.right.lanes;
  if (swap) std::swap(product.left, product.right);
  return Blocks(kernels, product, swap).Run(loop);
}

}  // namespace mpjax
