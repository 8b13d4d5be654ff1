// A product of two 8-bit matrices, block by block:
//
//   out[i, j] = (sum over terms of left[i, t] * right[j, t]) * left.scale[i] * right.scale[j]
//
// Operands are decoded as they are packed into panels (`dot.h`), in the order in which they are
// multiplied, so none is ever transposed or decoded anywhere else. Blocks of panels are bounded, so
// that they stay in the second-level cache or not far from it; a tile of sums stays in the first.
// Few rows are multiplied by columns as these come: packed in the first-level cache, or, where that
// takes longer than the product, not at all (`stream.h`, where columns lie next to each other).

#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "scratch.h"
#include "stream.h"
#include "tiles.h"

namespace mpjax {
namespace {

constexpr int64_t kTileRows = 64, kTileColumns = kColumnPanels * kColumns;
constexpr int64_t kSteps = 256;  // steps that are multiplied at a time
// Where columns are packed as they come: of a tile of 64, and at most, where they lie next to each
// other, of as many tiles as make a strip. A row of one is another page, which takes time to find.
constexpr int64_t kFewRowSteps = 128, kStripTiles = 8;
constexpr int64_t kBlockNumbers = int64_t{1} << 20;  // of packed numbers of an operand: 2 MiB
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a result that caches need not keep

constexpr int kSpins = 4000;

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Blocks {
 public:
  Blocks(const DotKernels& kernels, const Product& product, bool is_swapped)
      : kernels_(kernels),
        p_(product),
        steps_(DivideUp(product.terms, kTermsPerPack) * kTermsPerPack / kernels.terms_per_step),
        is_swapped_(is_swapped) {}

  bool Run(Loop& loop) {
    // So many lanes of either operand, whole tiles of them, fit into a block.
    const int64_t most = kBlockNumbers / std::max<int64_t>(1, kLaneNumbers * steps_);
    const bool at_once = p_.left.lanes > kFewRows, unpacked = !at_once && IsBetterUnpacked();
    const int64_t rows = Whole(most, kTileRows, p_.left.lanes);
    const int64_t columns = at_once ? Whole(most, kTileColumns, p_.right.lanes) : p_.right.lanes;
    row_numbers_ = unpacked ? CopyNumbers() : kLaneNumbers * steps_;
    Scratch left(static_cast<size_t>(rows * row_numbers_));
    Scratch right(static_cast<size_t>(at_once ? columns * kLaneNumbers * steps_ : 1));
    Scratch excess(static_cast<size_t>(rows * 2));
    if (left.data() == nullptr || right.data() == nullptr || excess.data() == nullptr) return false;
    excess_ = reinterpret_cast<int32_t*>(excess.data());
    left_ = left.data();
    right_ = right.data();
    if (unpacked) CopyRows();
    for (int64_t row = 0; row < p_.left.lanes; row += rows) {
      first_row_ = row;
      rows_ = std::min(rows, p_.left.lanes - row);
      for (int64_t column = 0; column < p_.right.lanes; column += columns) {
        first_column_ = column;
        columns_ = std::min(columns, p_.right.lanes - column);
        // What is packed already stays: the rows, and columns that are one block.
        const int64_t row_panels = column == 0 && !unpacked ? DivideUp(rows_, kPackLanes) : 0;
        const bool packed = row > 0 && columns_ == p_.right.lanes;
        const int64_t column_panels = at_once && !packed ? DivideUp(columns_, kPackLanes) : 0;
        if (at_once) {
          PackAndMultiply(loop, row_panels, column_panels, kTileColumns, &Blocks::MultiplyPacked);
        } else {
          strip_ = unpacked ? kPackLanes : StripOf(columns_);
          PackAndMultiply(loop, row_panels, 0, strip_,
                          unpacked ? &Blocks::MultiplyUnpacked : &Blocks::PackAndMultiplyColumns);
        }
      }
    }
    return true;
  }

 private:
  bool IsBetterUnpacked() const {
    return kernels_.multiply_unpacked != nullptr && p_.left.term_stride == 1 &&
           p_.right.term_stride == 1 &&
           p_.left.lanes <= kernels_.unpacked_rows(p_.terms);
  }

  // How many columns are packed and multiplied side by side; enough strips for several threads.
  int64_t StripOf(int64_t columns) const {
    if (p_.right.term_stride == 1) return kPackLanes;
    const int64_t tiles = columns / (kPackLanes * kStripTiles);
    return kPackLanes * std::max<int64_t>(1, std::min(tiles, kStripTiles));
  }

  // Rows that lie a multiple of the pages' size apart push each other out of the caches.
  int64_t CopyNumbers() const { return (DivideUp(p_.terms, 64) + 1) * 32; }

  void CopyRows() {
    for (int64_t row = 0; row < p_.left.lanes; ++row) {
      std::memcpy(left_ + row * row_numbers_, At(p_.left, row, 0).data,
                  static_cast<size_t>(p_.terms));
    }
  }

  static int64_t Whole(int64_t most, int64_t tile, int64_t lanes) {
    return std::min(std::max<int64_t>(1, most / tile), DivideUp(lanes, tile)) * tile;
  }

  // One loop over panels to pack and tiles to multiply. They are claimed in order, so who has a tile
  // waits for panels that others are packing, never for one that nobody has begun.
  void PackAndMultiply(Loop& loop, int64_t row_panels, int64_t column_panels, int64_t tile_columns,
                       void (Blocks::*multiply)(int64_t row, int64_t column)) {
    const int64_t panels = row_panels + column_panels;
    const int64_t row_tiles = DivideUp(rows_, kTileRows);
    std::atomic<int64_t> packed{0};
    auto body = [&](int64_t i) {
      if (i < panels) {
        i < row_panels ? PackRows(i) : PackColumns(i - row_panels);
        packed.fetch_add(1, std::memory_order_release);
        return;
      }
      for (int spins = 0; packed.load(std::memory_order_acquire) < panels; ++spins) {
        if (spins > kSpins) std::this_thread::yield();
      }
      const int64_t row = (i - panels) % row_tiles * kTileRows;
      const int64_t column = (i - panels) / row_tiles * tile_columns;
      (this->*multiply)(row, column);
    };
    // Who waits for nobody may go on where it has been.
    const Claims claims = panels == 0 ? Claims::kInRuns : Claims::kInOrder;
    loop(panels + row_tiles * DivideUp(columns_, tile_columns), body, claims);
  }

  void PackRows(int64_t i) {
    const int64_t row = i * kPackLanes, stride = kRows * kLaneNumbers * steps_;
    uint16_t* to = left_ + row * kLaneNumbers * steps_;
    PackLanes(p_.left, first_row_ + row, rows_ - row, p_.terms, 0,
              {to, stride, true, excess_ + row});
  }

  void PackColumns(int64_t i) {
    const int64_t column = i * kPackLanes, stride = kColumns * kLaneNumbers * steps_;
    uint16_t* to = right_ + column * kLaneNumbers * steps_;
    PackLanes(p_.right, first_column_ + column, columns_ - column, p_.terms, 0,
              {to, stride, false, nullptr});
  }

  // Lanes from `lane` on, `lanes` of them or as many as are packed at once, and terms from `term` on.
  void PackLanes(const Matrix& matrix, int64_t lane, int64_t lanes, int64_t terms, int64_t term,
                 const Panels& to) {
    const int here = static_cast<int>(std::min<int64_t>(kPackLanes, lanes));
    kernels_.pack(At(matrix, lane, term), here, terms, to);
  }

  static Source At(const Matrix& matrix, int64_t lane, int64_t term) {
    const uint8_t* data = matrix.data + lane * matrix.lane_stride + term * matrix.term_stride;
    return {data, matrix.lane_stride, matrix.term_stride, matrix.table};
  }

  // A tile of packed rows and columns; neighbouring ones share their columns.
  void MultiplyPacked(int64_t row, int64_t column) {
    alignas(64) Sum sums[kTileRows * kWidth];
    const int64_t rows = std::min(kTileRows, rows_ - row);
    const int64_t width = std::min(kTileColumns, columns_ - column);
    const int64_t stride = kColumns * kLaneNumbers * steps_;
    for (int64_t step = 0; step == 0 || step < steps_; step += kSteps) {
      const uint16_t* panels = right_ + column * kLaneNumbers * steps_;
      const Panels right = {const_cast<uint16_t*>(panels) + step * kLaneNumbers * kColumns, stride,
                            false, nullptr};
      MultiplyTile(row, rows, width, step, std::min(kSteps, steps_ - step), right, sums);
    }
    Write(sums, row, rows, first_column_ + column, width, excess_ + row);
  }

  // All rows, which are few, by a strip of columns, packed in the first caches a few steps at a time.
  void PackAndMultiplyColumns(int64_t, int64_t column) {
    alignas(64) Sum sums[kStripTiles][kFewRows * kWidth];
    alignas(64) uint16_t panels[kPackLanes * kLaneNumbers * kFewRowSteps];
    const int64_t steps = kFewRowSteps * kPackLanes / strip_, first = first_column_ + column;
    const Panels right = {panels, kColumns * kLaneNumbers * steps, false, nullptr};
    const int64_t columns = std::min(strip_, columns_ - column);
    const int64_t tiles = DivideUp(columns, kPackLanes);
    const auto width = [&](int64_t tile) {
      return std::min<int64_t>(kPackLanes, columns - tile * kPackLanes);
    };
    for (int64_t step = 0; step == 0 || step < steps_; step += steps) {
      const int64_t here = std::min(steps, steps_ - step);
      const int64_t term = step * kernels_.terms_per_step;
      const int64_t terms = std::min(here * kernels_.terms_per_step, p_.terms - term);
      kernels_.pack(At(p_.right, first, term), static_cast<int>(columns), terms, right);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        Panels of_tile = right;
        of_tile.data += tile * kPackLanes / kColumns * right.stride;
        MultiplyTile(0, rows_, width(tile), step, here, of_tile, sums[tile]);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Write(sums[tile], 0, rows_, first + tile * kPackLanes, width(tile), excess_);
    }
  }

  // All rows, which are few, by one tile of columns as they lie.
  void MultiplyUnpacked(int64_t, int64_t column) {
    alignas(64) Sum sums[kFewRows * kWidth];
    const int64_t first = first_column_ + column;
    const int64_t width = std::min<int64_t>(kPackLanes, columns_ - column);
    const uint8_t* rows = reinterpret_cast<const uint8_t*>(left_);
    kernels_.multiply_unpacked({rows, 2 * row_numbers_, 1, p_.left.table}, rows_,
                               At(p_.right, first, 0), width, p_.terms, sums);
    Write(sums, 0, rows_, first, width, nullptr);
  }

  void MultiplyTile(int64_t row, int64_t rows, int64_t width, int64_t step, int64_t steps,
                    const Panels& right, Sum* sums) {
    const int64_t panels = DivideUp(width, kColumns);
    const int64_t at_once = panels > kColumnPanels ? 2 : kColumnPanels;
    for (int64_t i = 0; i < rows; i += kRows) {
      const int here = static_cast<int>(std::min<int64_t>(kRows, rows - i));
      const uint16_t* left = left_ + (row + i) * kLaneNumbers * steps_ + step * kLaneNumbers * kRows;
      for (int64_t panel = 0; panel < panels; panel += at_once) {
        kernels_.multiply(left, here, right.data + panel * right.stride, right.stride,
                          static_cast<int>(std::min(at_once, panels - panel)), steps, step > 0,
                          sums + i * kWidth + panel * kColumns);
      }
    }
  }

  void Write(const Sum* sums, int64_t row, int64_t rows, int64_t column, int64_t width,
             const int32_t* excess) const {
    float scales[kWidth];
    for (int64_t j = 0; j < width; ++j) {
      scales[j] = p_.right.scale[(column + j) * p_.right.scale_stride];
    }
    const int64_t lane = first_row_ + row, bytes = BytesOf(p_.out_type);
    const float* row_scales = p_.left.scale + lane * p_.left.scale_stride;
    char* out = static_cast<char*>(p_.out);
    Target target = {out, p_.out_type, p_.right.lanes, row_scales, p_.left.scale_stride,
                     scales, is_swapped_, false, excess};
    if (!is_swapped_) {
      target.out = out + (lane * p_.right.lanes + column) * bytes;
      target.is_large = p_.left.lanes * p_.right.lanes * bytes >= kLarge;
      return kernels_.write(sums, rows, width, target);
    }
    alignas(64) char tile[kTileRows * kWidth * 4];
    target.out = tile;
    target.row_stride = kWidth;
    kernels_.write(sums, rows, width, target);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = (column + j) * p_.left.lanes + lane + i;
        std::memcpy(out + at * bytes, tile + (i * kWidth + j) * bytes, bytes);
      }
    }
  }

  const DotKernels& kernels_;
  const Product& p_;
  const int64_t steps_;
  const bool is_swapped_;  // whether `out` is [right.lanes, left.lanes]
  uint16_t* left_ = nullptr;
  uint16_t* right_ = nullptr;
  int32_t* excess_ = nullptr;  // of each packed row
  int64_t strip_ = 0;          // columns of a strip
  int64_t row_numbers_ = 0;    // that a row takes, as it is copied or packed
  int64_t first_row_ = 0, rows_ = 0, first_column_ = 0, columns_ = 0;  // of the block at hand
};

}  // namespace

bool Compute(const DotKernels& kernels, Product product, Loop& loop) {
  if (product.right.in_tiles) return MultiplyTiles(kernels, product, loop);
  if (IsStream(kernels, product)) return Stream(kernels, product, loop);
  // The right operand fills the vectors, so it is the one with more lanes.
  const bool swap = product.right.lanes < kColumns && product.left.lanes > product.right.lanes;
  if (swap) std::swap(product.left, product.right);
  return Blocks(kernels, product, swap).Run(loop);
}

}  // namespace mpjax
