// The product of rows by a matrix of int8 that is stored in tiles.

#ifndef MPJAX_KERNELS_NATIVE_TILES_H_
#define MPJAX_KERNELS_NATIVE_TILES_H_

#include "product.h"

namespace mpjax {

// Computes it; false if there was no memory.
bool MultiplyTiles(const DotKernels& kernels, const Product& product, Loop& loop);

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_TILES_H_
