// Memory that calls use for a while and leave to the next: fresh pages cost more than the packing.

#ifndef MPJAX_KERNELS_NATIVE_SCRATCH_H_
#define MPJAX_KERNELS_NATIVE_SCRATCH_H_

#include <cstddef>
#include <cstdint>

namespace mpjax {

// A block of at least `numbers` uint16, aligned to 64 bytes; `data()` is null without memory.
class Scratch {
 public:
  explicit Scratch(size_t numbers);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint16_t* data() const { return data_; }

 private:
  uint16_t* data_;
  size_t bytes_;
};

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_SCRATCH_H_
