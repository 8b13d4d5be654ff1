// What multiplies few rows by a matrix that is read in a stream, in files of their own (`dot.h` says
// what each does).

#ifndef MPJAX_KERNELS_NATIVE_STREAMS_H_
#define MPJAX_KERNELS_NATIVE_STREAMS_H_

#include <cstdint>

#include "dot.h"

namespace mpjax {

int32_t LayOutInt8(const Source& row, int64_t terms, uint32_t* steps);
void StreamInt8(const uint32_t* left, int64_t left_stride, int rows, const Source& right,
                int64_t lanes, int64_t terms, int64_t sum_stride, Sum* sums);
void SettleInt8(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile);

int32_t LayOutFloat8(const Source& row, int64_t terms, uint32_t* steps);
void StreamFloat8(const uint32_t* left, int64_t left_stride, int rows, const Source& right,
                  int64_t lanes, int64_t terms, int64_t sum_stride, Sum* sums);
void SettleFloat8(const Sum* sums, int rows, int64_t stride, int64_t parts, Sum* tile);

// Where the terms of both lie next to each other: `multiply_unpacked` and `unpacked_rows`.
void MultiplyFloat8Terms(const Source& left, int64_t rows, Source right, int64_t columns,
                         int64_t terms, Sum* sums);
int64_t Float8Rows(int64_t terms);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_STREAMS_H_
