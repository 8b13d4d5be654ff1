// Attention on AVX2. Few queries: 8 numbers at a time, `vmulps` and `vaddps`. Many: 6 rows by 16 columns in
// 12 registers, `vfmadd231ps`.

#include "attention_loops.h"

#if defined(__AVX2__)

#include <immintrin.h>

#include "attention_tile.h"

namespace mpjax {
namespace {

struct Lanes {
  using Vector = __m256;
  static constexpr int kCount = 8, kRows = 6;
  static Vector Load(const float* from) { return _mm256_loadu_ps(from); }
  static void Store(float* to, Vector lanes) { _mm256_storeu_ps(to, lanes); }
  static Vector Broadcast(float number) { return _mm256_set1_ps(number); }
  static Vector Fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector Even(Vector a, Vector b, int bit) {
    const Vector moved = _mm256_permutevar8x32_ps(b, Moved(-bit));
    return bit == 1   ? _mm256_blend_ps(a, moved, 0xAA)
           : bit == 2 ? _mm256_blend_ps(a, moved, 0xCC)
                      : _mm256_blend_ps(a, moved, 0xF0);
  }
  static Vector Odd(Vector a, Vector b, int bit) {
    const Vector moved = _mm256_permutevar8x32_ps(a, Moved(bit));
    return bit == 1   ? _mm256_blend_ps(moved, b, 0xAA)
           : bit == 2 ? _mm256_blend_ps(moved, b, 0xCC)
                      : _mm256_blend_ps(moved, b, 0xF0);
  }

 private:
  static __m256i Moved(int by) {
    return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(by));
  }
};

}  // namespace

const AttentionKernels kAvx2Attention = {Widen, Narrow, Scores, Add, Multiply<Lanes>, Transpose<Lanes>};

}  // namespace mpjax

#endif
