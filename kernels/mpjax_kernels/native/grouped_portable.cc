// The product in groups in plain C++, which is right on every machine.

#include "grouped_loops.h"
#include "tile_portable.h"

namespace mpjax {
namespace {

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target, [](const Sum& sum) { return sum.real; });
}

constexpr DirectKernel kNone = {0, 0, 0, nullptr};

}  // namespace

const GroupedKernels kPortableGrouped = {&kPortableInt8Dot, kNone, kNone, nullptr, nullptr,
                                         Unpack, Settle, Write};

}  // namespace mpjax
