// Attention by whatever the compiler makes of the loops; `fma` is a function where the CPU may not have it.

#include <cmath>

#include "attention_loops.h"
#include "attention_tile.h"

namespace mpjax {
namespace {

struct Lanes {
  using Vector = float;
  static constexpr int kCount = 1, kRows = 4;
  static Vector Load(const float* from) { return *from; }
  static void Store(float* to, Vector lane) { *to = lane; }
  static Vector Broadcast(float number) { return number; }
  static Vector Fma(Vector a, Vector b, Vector c) { return std::fma(a, b, c); }
};

}  // namespace

const AttentionKernels kPortableAttention = {Widen, Narrow, Scores, Add, Multiply<Lanes>, Transpose<Lanes>};

}  // namespace mpjax
