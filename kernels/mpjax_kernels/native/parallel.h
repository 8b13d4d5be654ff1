// Loops over chunks of work on XLA's own threads, and arithmetic that does not depend on which.

#ifndef MPJAX_KERNELS_NATIVE_PARALLEL_H_
#define MPJAX_KERNELS_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "claims.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {

// Subnormal numbers are kept while one of these lives. XLA's threads flush them to zero, other
// threads do not, and a result must not depend on which of them computed it.
class KeepSubnormals {
 public:
#if defined(__SSE2__)
  KeepSubnormals() : control_(_mm_getcsr()) { _mm_setcsr(control_ & ~kFlushing); }
  ~KeepSubnormals() { _mm_setcsr(control_); }

 private:
  static constexpr unsigned kFlushing = 0x8040;  // flush to zero, denormals are zero
  unsigned control_;
#else
  KeepSubnormals() {}
#endif
};

inline void Pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

inline constexpr int kSpins = 1000;  // some 20 microseconds

// Calls body(i) for i in [0, count), which the caller and the threads of the pool claim one by one.
// The caller never waits for one that nobody has claimed, so the loop ends even if all threads of the
// pool are busy or wait themselves.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, const Body& body,
                 Claims claims = Claims::kInOrder) {
  struct State {
    explicit State(int64_t runs) : next(static_cast<size_t>(runs)) {}
    std::vector<std::atomic<int64_t>> next;  // of each run
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  if (threads <= 1) {
    KeepSubnormals keep;
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const int64_t runs = claims == Claims::kInRuns ? threads : 1;
  auto state = std::make_shared<State>(runs);
  // `body` is read only by who has claimed a chunk, and the caller returns after those are done.
  auto work = [state, count, runs, &body](int64_t thread) {
    KeepSubnormals keep;
    int64_t mine = 0;
    for (int64_t r = 0; r < runs; ++r) {  // its own, and then what is left of the others'
      const int64_t run = (thread + r) % runs;
      const int64_t first = run * count / runs, end = (run + 1) * count / runs;
      for (int64_t i; (i = first + state->next[run].fetch_add(1)) < end; ++mine) body(i);
    }
    if (mine == 0 || state->done.fetch_add(mine) + mine < count) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    state->all_done.notify_all();
  };
  for (int64_t thread = 1; thread < threads; ++thread) {
    pool.Schedule([work, thread] { work(thread); });
  }
  work(0);
  // The last chunks are soon done as a rule, sooner than a thread sleeps and wakes.
  for (int i = 0; i < kSpins && state->done.load() < count; ++i) Pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace mpjax

#endif  // MPJAX_KERNELS_NATIVE_PARALLEL_H_
