#include "weight_call.h"

#include "real_type.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

bool Ends(const View& of, int64_t first, int64_t second) {
  const auto sizes = of.dimensions();
  return sizes[sizes.size() - 2] == first && sizes[sizes.size() - 1] == second;
}

}  // namespace

int64_t WeightCall::products() const {
  return static_cast<int64_t>(out.element_count()) / (rows() * lanes());
}

std::string WeightCall::Refusal() const {
  if (scale.element_type() != ffi::F32) return "the scale is not float32";
  if (zero.element_type() != ffi::S8) return "the zero points are not int8";
  if (!IsReal(out.element_type())) return "the result is not float32, bfloat16 or float16";
  if (rank() < 2) return "the result has fewer than two axes";
  for (const View* operand : {&lhs, &weight, &scale, &zero}) {
    const auto sizes = operand->dimensions();
    if (sizes.size() != rank()) return "operands and result differ in rank";
    if (!Broadcasts(sizes, out.dimensions(), batch())) return "the batches do not go together";
  }
  if (!Ends(lhs, rows(), terms())) return "lhs has not the rows of the result";
  const bool fits = terms_last ? Ends(weight, lanes(), terms()) : Ends(weight, terms(), lanes());
  if (!fits) return "the weight has a shape that does not go with lhs and the result";
  if (groups() < 1 || terms() % groups() != 0 || !Ends(scale, groups(), lanes())) {
    return "the scale is not [groups, columns], of groups that divide the terms";
  }
  if (!Ends(zero, has_zero() ? groups() : 0, lanes())) {
    return "the zero points have not the shape of the scale";
  }
  return "";
}

}  // namespace mpjax
