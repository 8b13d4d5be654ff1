// The right operand is read where it is, whatever the number of rows: its tiles are the panels that other
// products pack theirs into (`product.cc`). Few rows are multiplied as they lie, more are packed.

#include "tiles.h"

#include <algorithm>

#include "scratch.h"

namespace mpjax {
namespace {

constexpr int64_t kTileRows = 64, kTileColumns = kColumnPanels * kColumns;
constexpr int64_t kSteps = 256;  // steps that are multiplied at a time
constexpr int64_t kBlockNumbers = int64_t{1} << 20;  // of packed rows: 2 MiB
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a result that caches need not keep

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Tiles {
 public:
  Tiles(const DotKernels& kernels, const Product& product)
      : kernels_(kernels), p_(product), steps_(product.terms / kTileTerms) {}

  bool Run(Loop& loop) { return p_.left.lanes <= kTileRowsAtOnce ? RunFew(loop) : RunMany(loop); }

 private:
  // Rows a multiple of the pages' size apart would push each other out of the caches.
  bool RunFew(Loop& loop) {
    const int64_t stride = DivideUp(p_.terms, kStreamTerms) * kStreamTerms / kTileTerms + 16;
    Scratch copy(static_cast<size_t>(p_.left.lanes * stride * kLaneNumbers));
    if (copy.data() == nullptr) return false;
    uint32_t* rows = reinterpret_cast<uint32_t*>(copy.data());
    int32_t excess[kTileRowsAtOnce];
    for (int64_t row = 0; row < p_.left.lanes; ++row) {
      const Source from = {p_.left.data + row * p_.left.lane_stride, p_.left.lane_stride,
                           p_.left.term_stride, nullptr};
      excess[row] = kernels_.lay_out(from, p_.terms, rows + row * stride);
    }
    auto body = [&](int64_t i) {
      alignas(64) Sum sums[kTileRowsAtOnce * kWidth];
      const int64_t column = i * kWidth, width = std::min<int64_t>(kWidth, p_.right.lanes - column);
      kernels_.multiply_tile_rows(rows, stride, static_cast<int>(p_.left.lanes), RightAt(column),
                                  RightStride(), static_cast<int>(width / kColumns), steps_, sums);
      Write(sums, 0, p_.left.lanes, column, width, excess);
    };
    loop(DivideUp(p_.right.lanes, kWidth), body, Claims::kInRuns);
    return true;
  }

  bool RunMany(Loop& loop) {
    const int64_t row_numbers = kLaneNumbers * steps_;
    const int64_t most = std::max<int64_t>(1, kBlockNumbers / std::max<int64_t>(1, row_numbers) / kTileRows);
    const int64_t rows_at_once = std::min(most, DivideUp(p_.left.lanes, kTileRows)) * kTileRows;
    Scratch left(static_cast<size_t>(rows_at_once * row_numbers));
    Scratch excess(static_cast<size_t>(2 * rows_at_once));
    if (left.data() == nullptr || excess.data() == nullptr) return false;
    int32_t* too_large = reinterpret_cast<int32_t*>(excess.data());
    const int64_t column_tiles = DivideUp(p_.right.lanes, kTileColumns);
    for (int64_t first = 0; first < p_.left.lanes; first += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, p_.left.lanes - first);
      const int64_t row_tiles = DivideUp(rows, kTileRows);
      auto pack = [&](int64_t i) {
        const int64_t row = i * kTileRows;
        const Source from = {p_.left.data + (first + row) * p_.left.lane_stride, p_.left.lane_stride,
                             p_.left.term_stride, nullptr};
        kernels_.pack(from, static_cast<int>(std::min(kTileRows, rows - row)), p_.terms,
                      {left.data() + row * row_numbers, kRows * row_numbers, true, too_large + row});
      };
      loop(row_tiles, pack, Claims::kInOrder);
      auto multiply = [&](int64_t i) {
        alignas(64) Sum sums[kTileRows * kWidth];
        const int64_t row = i % row_tiles * kTileRows, column = i / row_tiles * kTileColumns;
        const int64_t here = std::min(kTileRows, rows - row);
        const int64_t width = std::min(kTileColumns, p_.right.lanes - column);
        Multiply(left.data() + row * row_numbers, here, column, width, sums);
        Write(sums, first + row, here, column, width, too_large + row);
      };
      loop(row_tiles * column_tiles, multiply, Claims::kInRuns);
    }
    return true;
  }

  // Packed rows by the tiles of up to three panels.
  void Multiply(const uint16_t* left, int64_t rows, int64_t column, int64_t width, Sum* sums) const {
    const int64_t stride = RightStride();
    const uint16_t* right = RightAt(column);
    for (int64_t step = 0; step == 0 || step < steps_; step += kSteps) {
      const int64_t here = std::min(kSteps, steps_ - step);
      for (int64_t i = 0; i < rows; i += kRows) {
        kernels_.multiply_tiles(left + i * kLaneNumbers * steps_ + step * kLaneNumbers * kRows,
                                static_cast<int>(std::min<int64_t>(kRows, rows - i)),
                                right + step * kLaneNumbers * kColumns, stride,
                                static_cast<int>(width / kColumns), here, step > 0,
                                sums + i * kWidth);
      }
    }
  }

  // From a panel to the next, in numbers.
  int64_t RightStride() const { return kColumns * kLaneNumbers * steps_; }

  const uint16_t* RightAt(int64_t column) const {
    return reinterpret_cast<const uint16_t*>(p_.right.data) + column / kColumns * RightStride();
  }

  void Write(const Sum* sums, int64_t row, int64_t rows, int64_t column, int64_t width,
             const int32_t* excess) const {
    float scales[kWidth];
    for (int64_t j = 0; j < width; ++j) {
      scales[j] = p_.right.scale[(column + j) * p_.right.scale_stride];
    }
    const int64_t bytes = BytesOf(p_.out_type), numbers = p_.left.lanes * p_.right.lanes;
    const Target target = {static_cast<char*>(p_.out) + (row * p_.right.lanes + column) * bytes,
                           p_.out_type,
                           p_.right.lanes,
                           p_.left.scale + row * p_.left.scale_stride,
                           p_.left.scale_stride,
                           scales,
                           false,
                           numbers * bytes >= kLarge,
                           excess};
    kernels_.write(sums, rows, width, target);
  }

  const DotKernels& kernels_;
  const Product& p_;
  const int64_t steps_;
};

}  // namespace

bool MultiplyTiles(const DotKernels& kernels, const Product& product, Loop& loop) {
  return Tiles(kernels, product).Run(loop);
}

}  // namespace mpjax
