// Products of a batch that are computed tile by tile, by one thread each or by several.

#ifndef MPJAX_KERNELS_NATIVE_BATCH_LOOP_H_
#define MPJAX_KERNELS_NATIVE_BATCH_LOOP_H_

#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace mpjax {

// What several threads have a part in: small products are not worth waking another, nor are few rows.
enum class Shared { kNothing, kTiles, kRowsAndTiles };

// Computes what `make(b)` makes, in which rows are prepared and then tiles computed; false if there was no
// memory. Of a batch of several each is one thread's.
template <typename Make>
bool ComputeBatch(xla::ffi::ThreadPool& pool, int64_t batch, Shared shared, const Make& make) {
  std::atomic<bool> in_memory{true};
  const auto compute = [&](int64_t b, auto prepare, auto loop) {
    auto tiles = make(b);
    if (!tiles.in_memory()) {
      in_memory = false;
      return;
    }
    prepare(tiles.row_count(), [&](int64_t i) { tiles.Prepare(i); }, Claims::kInOrder);
    loop(tiles.tile_count(), [&](int64_t i) { tiles.Compute(i); }, tiles.claims());
  };
  const auto alone = [](int64_t count, const auto& body, Claims) {
    for (int64_t i = 0; i < count; ++i) body(i);
  };
  const auto together = [&](int64_t count, const auto& body, Claims claims) {
    ParallelFor(pool, count, body, claims);
  };
  KeepSubnormals keep;
  if (shared == Shared::kNothing) {
    for (int64_t b = 0; b < batch; ++b) compute(b, alone, alone);
  } else if (batch > 1) {
    ParallelFor(pool, batch, [&](int64_t b) { compute(b, alone, alone); });
  } else if (shared == Shared::kTiles) {
    compute(0, alone, together);
  } else {
    compute(0, together, together);
  }
  return in_memory;
}

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_BATCH_LOOP_H_
