// What all instruction sets do alike for a product in groups, in loops that compilers vectorize.
// Compiled once for each of them, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_LOOPS_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_LOOPS_H_

#include <cstdint>

#include "grouped.h"

namespace mpjax {
namespace {

inline void Unpack(const uint8_t* data, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count / 2; ++i) {
    to[2 * i] = static_cast<uint8_t>(((data[i] & 0xF) ^ 8) - 8);
    to[2 * i + 1] = static_cast<uint8_t>(((data[i] >> 4) ^ 8) - 8);
  }
  if (count % 2 != 0) to[count - 1] = static_cast<uint8_t>(((data[count / 2] & 0xF) ^ 8) - 8);
}

// One row. Integers wrap around on the way, and the differences are right.
template <bool Zeros, bool Scales, bool Add>
void SettleRow(const int32_t* sums, int32_t excess, const int32_t* zeros, int32_t row_sum,
               const float* scales, float* total) {
  for (int lane = 0; lane < kWidth; ++lane) {
    uint32_t sum = static_cast<uint32_t>(sums[lane]) - static_cast<uint32_t>(excess);
    if (Zeros) sum -= static_cast<uint32_t>(zeros[lane]) * static_cast<uint32_t>(row_sum);
    float real = static_cast<float>(static_cast<int32_t>(sum));
    if (Scales) real *= scales[lane];
    total[lane] = Add ? total[lane] + real : real;
  }
}

inline void Settle(const int32_t* sums, int64_t rows, const int32_t* excess, const int32_t* zeros,
                   const int32_t* row_sums, const float* scales, bool add, float* total) {
  const auto settle = zeros != nullptr
                          ? scales == nullptr ? SettleRow<true, false, false>
                            : add             ? SettleRow<true, true, true>
                                              : SettleRow<true, true, false>
                      : scales == nullptr ? SettleRow<false, false, false>
                      : add               ? SettleRow<false, true, true>
                                          : SettleRow<false, true, false>;
  for (int64_t row = 0; row < rows; ++row) {
    settle(sums + row * kWidth, excess[row], zeros, row_sums[row], scales, total + row * kWidth);
  }
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_LOOPS_H_
