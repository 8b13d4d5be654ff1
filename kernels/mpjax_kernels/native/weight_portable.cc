// The product of an array by a weight in plain C++, which is right on every machine.

#include <cstring>

#include "tile_portable.h"
#include "weight_loops.h"

namespace mpjax {
namespace {

float At(const Weight& weight, int64_t lane, int64_t term) {
  const int64_t entry = weight.terms_last ? lane * weight.stride + term : term * weight.stride + lane;
  if (weight.table != nullptr) return ToFloat(Decoded(weight.data[entry], *weight.table));
  if (!weight.is_int4) return static_cast<int8_t>(weight.data[entry]);
  const int nibble = weight.data[entry / 2] >> (entry % 2 * 4) & 0xF;
  return static_cast<float>((nibble ^ 8) - 8);
}

void Pack(const Weight& weight, const Run& run, uint16_t* panels) {
  const int64_t steps = (run.terms + kTermsPerPack - 1) / kTermsPerPack * kTermsPerPack;
  float* to = reinterpret_cast<float*>(panels);
  for (int lane = 0; lane < kWidth; ++lane) {
    float* panel = to + lane / kColumns * steps * kColumns + lane % kColumns;
    for (int64_t step = 0; step < steps; ++step) {
      const bool exists = lane < run.lanes && step < run.terms;
      const float value = exists ? At(weight, run.lane + lane, run.term + step) : 0;
      panel[step * kColumns] = exists && run.zeros != nullptr ? value - run.zeros[lane] : value;
    }
  }
}

void Multiply(const uint32_t* left, int64_t stride, int64_t rows, const uint16_t* panels,
              int64_t steps, bool add, float* sums) {
  const float* columns = reinterpret_cast<const float*>(panels);
  for (int64_t row = 0; row < rows; ++row) {
    for (int panel = 0; panel < kWidth / kColumns; ++panel) {
      float* to = sums + row * kWidth + panel * kColumns;
      float total[kColumns];
      for (int lane = 0; lane < kColumns; ++lane) total[lane] = add ? to[lane] : 0;
      for (int64_t step = 0; step < steps; ++step) {
        float term;
        std::memcpy(&term, left + row * stride + step, sizeof(term));
        const float* at = columns + (panel * steps + step) * kColumns;
        for (int lane = 0; lane < kColumns; ++lane) total[lane] += term * at[lane];
      }
      for (int lane = 0; lane < kColumns; ++lane) to[lane] = total[lane];
    }
  }
}

int NoDirectLanes(const Weight&, int64_t, int64_t, bool) { return 0; }

void Write(const Sum* sums, int64_t rows, int64_t columns, const Target& target) {
  WriteTile(sums, rows, columns, target, [](const Sum& sum) { return sum.real; });
}

}  // namespace

const WeightKernels kPortableWeight = {1, Pack, Multiply, NoDirectLanes, nullptr, Scale, Write};

}  // namespace mpjax
