// Attention on AVX-512. Few queries: 16 numbers at a time, `vmulps` and `vaddps`. Many: 12 rows by 32 columns
// in 24 registers, `vfmadd231ps` with a number of the row that is broadcast as it is read.

#include "attention_loops.h"

#if defined(__AVX512VNNI__)

#include <immintrin.h>

#include "attention_tile.h"

namespace mpjax {
namespace {

struct Lanes {
  using Vector = __m512;
  static constexpr int kCount = 16, kRows = 12;
  static Vector Load(const float* from) { return _mm512_loadu_ps(from); }
  static void Store(float* to, Vector lanes) { _mm512_storeu_ps(to, lanes); }
  static Vector Broadcast(float number) { return _mm512_set1_ps(number); }
  static Vector Fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector Even(Vector a, Vector b, int bit) {
    return _mm512_mask_permutexvar_ps(a, With(bit), Moved(-bit), b);
  }
  static Vector Odd(Vector a, Vector b, int bit) {
    return _mm512_mask_permutexvar_ps(b, static_cast<__mmask16>(~With(bit)), Moved(bit), a);
  }

 private:
  static __m512i Moved(int by) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32(by));
  }
  static __mmask16 With(int bit) {
    return static_cast<__mmask16>(bit == 1 ? 0xAAAA : bit == 2 ? 0xCCCC : bit == 4 ? 0xF0F0 : 0xFF00);
  }
};

}  // namespace

const AttentionKernels kAvx512Attention = {Widen, Narrow, Scores, Add, Multiply<Lanes>, Transpose<Lanes>};

}  // namespace mpjax

#endif
