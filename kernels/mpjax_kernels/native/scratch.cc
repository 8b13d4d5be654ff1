// A list of blocks that no call uses at the moment, at most 32 MiB of them.

#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <vector>

namespace mpjax {
namespace {

constexpr size_t kMostKept = size_t{32} << 20, kAlignment = 64;

struct Block {
  void* data;
  size_t bytes;
};

struct Blocks {
  std::mutex mutex;
  std::vector<Block> free;
  size_t bytes = 0;
};

// Never destroyed, for threads may still compute while the process ends.
Blocks& Kept() {
  static Blocks* blocks = new Blocks;
  return *blocks;
}

}  // namespace

Scratch::Scratch(size_t numbers) : data_(nullptr) {
  bytes_ = (numbers * sizeof(uint16_t) / kAlignment + 1) * kAlignment;
  Blocks& kept = Kept();
  {
    std::lock_guard<std::mutex> lock(kept.mutex);
    for (size_t i = 0; i < kept.free.size(); ++i) {
      // No block many times too large, so that a small call does not hold it.
      if (kept.free[i].bytes < bytes_ || kept.free[i].bytes / 4 > bytes_) continue;
      data_ = static_cast<uint16_t*>(kept.free[i].data);
      bytes_ = kept.free[i].bytes;
      kept.bytes -= bytes_;
      kept.free[i] = kept.free.back();
      kept.free.pop_back();
      return;
    }
  }
  data_ = static_cast<uint16_t*>(std::aligned_alloc(kAlignment, bytes_));
}

Scratch::~Scratch() {
  if (data_ == nullptr) return;
  Blocks& kept = Kept();
  {
    std::lock_guard<std::mutex> lock(kept.mutex);
    if (kept.bytes + bytes_ <= kMostKept) {
      kept.free.push_back({data_, bytes_});
      kept.bytes += bytes_;
      return;
    }
  }
  std::free(data_);
}

}  // namespace mpjax
