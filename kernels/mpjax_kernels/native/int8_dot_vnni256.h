// The product of int8 matrices by `vpdpbusd` on 256 bits, which adds to a sum of 32 bits the products
// of four unsigned bytes and four signed ones, exactly. `Instruction` is it, in the form that the
// instruction set has. Compiled once for each, so all is in an unnamed namespace.
//
// As on AVX-512 the right operand is the unsigned one, 128 more than it is, and sums are too large by
// 128 times the sum of the row.

#ifndef MPJAX_KERNELS_NATIVE_INT8_DOT_VNNI256_H_
#define MPJAX_KERNELS_NATIVE_INT8_DOT_VNNI256_H_

#include "int8_dot_avx2.h"

namespace mpjax {
namespace {

template <typename Instruction>
struct Fours {
  static constexpr int kTerms = 32;
  static __m256i Load(const uint8_t* at) { return Avx2::Load(at); }
  static __m256i First(__m256i bytes) { return bytes; }
  static __m256i Left(__m256i terms) { return terms; }
  static __m256i Right(__m256i terms) {
    return _mm256_xor_si256(terms, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static __m256i To(__m256i total, __m256i columns, __m256i row) {
    return Instruction::To(total, columns, row);
  }
  static int32_t ExcessOf(const uint8_t* row, int64_t terms) {
    __m256i total[4] = {Avx2::Zero(), Avx2::Zero(), Avx2::Zero(), Avx2::Zero()};
    for (int64_t term = 0; term < terms; term += kTerms) {
      total[0] = To(total[0], _mm256_set1_epi8(1), LoadBytes(row + term, terms - term));
    }
    return static_cast<int32_t>(static_cast<uint32_t>(_mm_cvtsi128_si32(AddUp(total))) << 7);
  }
};

template <typename Instruction>
class FoursPacker {
 public:
  explicit FoursPacker(const Panels& to) : to_(to) {
    for (__m256i& total : total_) total = Avx2::Zero();
  }

  void Take(__m256i bytes, int64_t four, int group) {
    if (!to_.is_left) return StoreStep(Fours<Instruction>::Right(bytes), four, group, to_);
    total_[group] = Instruction::To(total_[group], _mm256_set1_epi8(1), bytes);
    StoreStep(bytes, four, group, to_);
  }

  void Finish(int lanes) const {
    for (int group = 0; to_.is_left && 8 * group < lanes; ++group) {
      Avx2::Store(to_.excess + 8 * group, _mm256_slli_epi32(total_[group], 7));
    }
  }

 private:
  const Panels to_;
  __m256i total_[kPackLanes / 8];
};

template <typename Instruction>
void PackFours(const Source& source, int lanes, int64_t terms, const Panels& to) {
  FoursPacker<Instruction> packer(to);
  PackBy(source, lanes, terms, packer);
  packer.Finish(lanes);
}

template <typename Instruction>
constexpr DotKernels KernelsBy() {
  return {4, PackFours<Instruction>, MultiplyTile<Instruction>,
          MultiplyUnpacked<Fours<Instruction>>, WriteIntegers, nullptr, nullptr, nullptr,
          UnpackedInt8Rows};
}

}  // namespace
}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_INT8_DOT_VNNI256_H_
