// Few rows by a matrix whose lanes lie next to each other, as a weight [terms, columns] does.
//
// Memory is fastest where it is read from one end to the other. So the matrix is cut along its terms
// into parts, runs of whole rows of memory; each part is multiplied into sums of its own, of all
// lanes, and the sums of the parts are added up at the end, always in the same order.

#ifndef MPJAX_KERNELS_NATIVE_STREAM_H_
#define MPJAX_KERNELS_NATIVE_STREAM_H_

#include <atomic>
#include <cstdint>

#include "product.h"

namespace mpjax {

inline constexpr int64_t kStripSums = 4096;  // of the lanes of a strip and of all rows, at most

// How a matrix [terms, lanes] is cut: into parts of `part_terms` terms, and, where its rows are long,
// into strips of `strip_lanes` lanes, whose sums stay in the first caches.
struct Cut {
  int64_t part_terms, parts;
  int64_t strip_lanes, strips;

  // Parts are multiples of `unit` terms, but for the last one.
  Cut(int64_t terms, int64_t lanes, int64_t rows, int64_t unit);
};

// Returns when so many pieces are done, which others have begun.
void WaitFor(const std::atomic<int64_t>& done, int64_t count);

// Whether a product is one that `Stream` computes.
bool IsStream(const DotKernels& kernels, const Product& product);

// Computes it; false if there was no memory for it.
bool Stream(const DotKernels& kernels, const Product& product, Loop& loop);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_STREAM_H_
