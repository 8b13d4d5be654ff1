// The product in groups by `vpdpbusd` on 256 bits. `Instruction` is it, in the form that the instruction
// set has. Compiled once for each, so all is in an unnamed namespace.

#ifndef MPJAX_KERNELS_NATIVE_GROUPED_VNNI256_H_
#define MPJAX_KERNELS_NATIVE_GROUPED_VNNI256_H_

#include "grouped_256.h"

namespace mpjax {
namespace {

template <typename Instruction>
struct Int4 : Nibbles {
  static __m256i Add(__m256i total, __m256i weight, __m256i row) {
    return Instruction::To(total, weight, row);
  }
  static __m256i To(__m256i total, const __m256i (&weight)[2], const uint8_t* row) {
    total = Instruction::To(total, weight[0], Avx2::Load(row));
    return Instruction::To(total, weight[1], Avx2::Load(row + 32));
  }
};

template <typename Instruction>
struct Int8 {
  static constexpr int kTerms = 32, kTermsPerByte = 1, kBias = 128, kMostParts = 2;
  static void Decode(__m256i bytes, __m256i (&to)[2]) {
    to[0] = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static __m256i To(__m256i total, const __m256i (&weight)[2], const uint8_t* row) {
    return Instruction::To(total, weight[0], Avx2::Load(row));
  }
};

template <typename Instruction>
constexpr GroupedKernels GroupedVnni(const DotKernels& dot) {
  return GroupedKernelsBy<Int8<Instruction>, Int4<Instruction>>(dot);
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_GROUPED_VNNI256_H_
