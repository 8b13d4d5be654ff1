// Which thread takes which part of a loop.

#ifndef MPJAX_KERNELS_NATIVE_CLAIMS_H_
#define MPJAX_KERNELS_NATIVE_CLAIMS_H_

namespace mpjax {

// Who claims what of a loop.
enum class Claims {
  kInOrder,  // one index after the other, so that what comes later may wait for what came before
  kInRuns,   // each thread neighbouring ones as long as it has some, so that it reads memory in a run
};

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_CLAIMS_H_
