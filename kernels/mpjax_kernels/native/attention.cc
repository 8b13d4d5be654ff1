// The calls `mpjax_attention_scores` and `mpjax_attention_output`: attention of few queries to keys and
// values as a cache holds them, position by position, each with all of its heads. They are read once, as
// they lie: a product of matrices would want the positions of a head next to each other.
//
//   scores[h, q, p] = (sum over d of query[q, h, d] * key[p, h / group, d]) * key_scale[p, h / group]
//   output[q, h, d] = sum over p of (weights[h, q, p] * value_scale[p, h / group]) * value[p, h / group, d]
//
// `group` is how many heads of a query share one of the cache. Products and sums are float32; those of
// the output are added up in parts, of as many positions whatever the threads.
//
// query is [..., queries, heads, depth], the keys and values are [..., length, cached heads, depth], their
// scale float32 [..., length, cached heads], or of no positions if they have none, and the weights and
// scores [..., heads, queries, length]. Batch axes come first, and a size of 1 broadcasts.

#include "attention.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "batch.h"
#include "isa.h"
#include "parallel.h"
#include "real_type.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace mpjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPositions = 16;        // of a cache that a thread takes at a time, at least
constexpr int64_t kMostParts = 16;        // of the positions that an output is summed over
constexpr int64_t kWorthAThread = 32768;  // numbers of a cache

const AttentionKernels& Kernels() {
#if defined(MPJAX_HAS_AVX512_VNNI)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kAvx512Attention;
#endif
#if defined(MPJAX_HAS_AVX2)
  if (CurrentIsa() >= Isa::kAvx2) return kAvx2Attention;
#endif
  return kPortableAttention;
}

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool IsStored(ffi::DataType type) { return IsReal(type) || type == ffi::S8 || type == ffi::F8E4M3FN; }

Stored StoredOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return Stored::kFloat32;
    case ffi::BF16:
      return Stored::kBfloat16;
    case ffi::F16:
      return Stored::kFloat16;
    case ffi::S8:
      return Stored::kInt8;
    default:
      return Stored::kE4M3;
  }
}

float* FloatsOf(const Scratch& scratch) { return reinterpret_cast<float*>(scratch.data()); }

size_t Floats(int64_t count) { return static_cast<size_t>(2 * std::max<int64_t>(1, count)); }

// Sizes of both calls, and what they read.
struct Attention {
  View queried;  // query, or weights
  View cached;
  View scale;
  ffi::AnyBuffer out;
  bool is_output;

  int64_t Last(const View& of, size_t axis) const {
    return of.dimensions()[of.dimensions().size() - axis];
  }
  size_t batch() const { return out.dimensions().size() - 3; }
  int64_t length() const { return Last(cached, 3); }
  int64_t cached_heads() const { return Last(cached, 2); }
  int64_t depth() const { return Last(cached, 1); }
  int64_t heads() const { return Last(queried, is_output ? 3 : 2); }
  int64_t queries() const { return Last(queried, is_output ? 2 : 3); }
  int64_t group() const { return heads() / cached_heads(); }
  int64_t rows() const { return group() * queries(); }  // that are multiplied by a head of the cache
  int64_t row_numbers() const { return cached_heads() * depth(); }  // of a position
  int64_t cached_numbers() const { return length() * row_numbers(); }
  int64_t widened_numbers() const { return stored() == Stored::kFloat32 ? 0 : row_numbers(); }
  bool has_scale() const { return Last(scale, 2) != 0; }
  Stored stored() const { return StoredOf(cached.element_type()); }
  Real out_type() const { return RealOf(out.element_type()); }

  static bool Ends(const Dimensions& sizes, int64_t first, int64_t second, int64_t third) {
    const size_t rank = sizes.size();
    return sizes[rank - 3] == first && sizes[rank - 2] == second && sizes[rank - 1] == third;
  }

  // What is wrong with it, or an empty string.
  std::string Refusal() const {
    const std::string what = is_output ? "the weights" : "the query";
    if (!IsReal(queried.element_type())) return what + " are not float32, bfloat16 or float16";
    if (!IsStored(cached.element_type())) return "the cache is not of floats, int8 or E4M3";
    if (scale.element_type() != ffi::F32) return "the scale is not float32";
    if (!IsReal(out.element_type())) return "the result is not float32, bfloat16 or float16";
    const size_t rank = out.dimensions().size();
    if (rank < 3) return "the result has fewer than three axes";
    if (queried.dimensions().size() != rank || cached.dimensions().size() != rank ||
        scale.dimensions().size() != rank - 1) {
      return "operands and result differ in rank";
    }
    for (const View* each : {&queried, &cached, &scale}) {
      if (!Broadcasts(each->dimensions(), out.dimensions(), batch())) {
        return "the batches do not go together";
      }
    }
    if (cached_heads() == 0 ? heads() != 0 : heads() % cached_heads() != 0) {
      return "the heads are no multiple of those of the cache";
    }
    const bool fits = is_output ? Ends(queried.dimensions(), heads(), queries(), length()) &&
                                      Ends(out.dimensions(), queries(), heads(), depth())
                                : Ends(queried.dimensions(), queries(), heads(), depth()) &&
                                      Ends(out.dimensions(), heads(), queries(), length());
    if (!fits) return what + " and the result have shapes that do not go with the cache";
    if ((has_scale() && Last(scale, 2) != length()) || Last(scale, 1) != cached_heads()) {
      return "the scale has not an entry for each position and head";
    }
    return "";
  }

  int64_t IndexOf(const View& of, int64_t b) const {
    return BatchIndex(of.dimensions(), out.dimensions(), batch(), b);
  }

  const char* Queried(int64_t b) const {
    const int64_t numbers = heads() * queries() * (is_output ? length() : depth());
    return static_cast<const char*>(queried.untyped_data()) +
           IndexOf(queried, b) * numbers * BytesOf(StoredOf(queried.element_type()));
  }

  // What is cached of a position; as float32, in `widened` if it is stored otherwise.
  const float* At(const AttentionKernels& kernels, int64_t b, int64_t position, float* widened) const {
    const int64_t first = (IndexOf(cached, b) * length() + position) * row_numbers();
    const char* data = static_cast<const char*>(cached.untyped_data()) + first * BytesOf(stored());
    if (stored() == Stored::kFloat32) return reinterpret_cast<const float*>(data);
    kernels.widen(stored(), data, row_numbers(), widened);
    return widened;
  }

  // Of the heads of a position.
  const float* ScalesAt(int64_t b, int64_t position) const {
    const int64_t row = IndexOf(scale, b) * length() + position;
    return static_cast<const float*>(scale.untyped_data()) + row * cached_heads();
  }
};

// Runs body(i) for i in [0, count), several at once if so many numbers are worth it.
template <typename Body>
void For(ffi::ThreadPool& pool, int64_t count, int64_t numbers, const Body& body) {
  if (numbers >= kWorthAThread) return ParallelFor(pool, count, body, Claims::kInRuns);
  KeepSubnormals keep;
  for (int64_t i = 0; i < count; ++i) body(i);
}

// The query of a batch entry, float32 [cached heads, group, queries, depth].
void LayOutQuery(const Attention& a, const AttentionKernels& kernels, int64_t b, float* to) {
  const Stored type = StoredOf(a.queried.element_type());
  const char* from = a.Queried(b);
  for (int64_t query = 0; query < a.queries(); ++query) {
    for (int64_t head = 0; head < a.heads(); ++head, from += a.depth() * BytesOf(type)) {
      kernels.widen(type, from, a.depth(), to + (head * a.queries() + query) * a.depth());
    }
  }
}

// False if there is no memory.
bool Scores(const Attention& a, ffi::ThreadPool& pool, int64_t batch) {
  const AttentionKernels& kernels = Kernels();
  const int64_t rows = a.heads() * a.queries(), numbers = rows * a.depth();
  const int64_t chunks = DivideUp(a.length(), kPositions);
  const Scratch query(Floats(batch * numbers)), widened(Floats(batch * chunks * a.widened_numbers()));
  const Scratch sums(Floats(batch * chunks * rows * (kPositions + 1)));
  if (query.data() == nullptr || widened.data() == nullptr || sums.data() == nullptr) return false;
  for (int64_t b = 0; b < batch; ++b) LayOutQuery(a, kernels, b, FloatsOf(query) + b * numbers);
  const int64_t out_bytes = BytesOf(a.out_type());
  For(pool, batch * chunks, batch * a.cached_numbers(), [&](int64_t i) {
    const int64_t b = i / chunks, first = i % chunks * kPositions;
    const int64_t positions = std::min(kPositions, a.length() - first);
    float* of_position = FloatsOf(sums) + i * rows * (kPositions + 1);
    float* of_row = of_position + rows;  // kPositions of each
    for (int64_t p = 0; p < positions; ++p) {
      const float* keys = a.At(kernels, b, first + p, FloatsOf(widened) + i * a.widened_numbers());
      kernels.scores(FloatsOf(query) + b * numbers, keys, a.cached_heads(), a.rows(), a.depth(),
                     of_position);
      for (int64_t row = 0; row < rows; ++row) of_row[row * kPositions + p] = of_position[row];
      if (!a.has_scale()) continue;
      const float* scales = a.ScalesAt(b, first + p);
      for (int64_t row = 0; row < rows; ++row) of_row[row * kPositions + p] *= scales[row / a.rows()];
    }
    char* out = static_cast<char*>(a.out.untyped_data()) + (b * rows * a.length() + first) * out_bytes;
    for (int64_t row = 0; row < rows; ++row) {
      kernels.narrow(of_row + row * kPositions, positions, a.out_type(),
                     out + row * a.length() * out_bytes);
    }
  });
  return true;
}

// False if there is no memory.
bool Output(const Attention& a, ffi::ThreadPool& pool, int64_t batch) {
  const AttentionKernels& kernels = Kernels();
  const int64_t rows = a.heads() * a.queries(), numbers = rows * a.depth();
  const int64_t part = std::max(kPositions, DivideUp(a.length(), kMostParts));
  const int64_t parts = std::max<int64_t>(1, DivideUp(a.length(), part));
  const Scratch sums(Floats(batch * parts * (numbers + rows))), weights(Floats(batch * rows * a.length()));
  const Scratch widened(Floats(batch * parts * a.widened_numbers()));
  if (sums.data() == nullptr || weights.data() == nullptr || widened.data() == nullptr) return false;
  const Stored type = StoredOf(a.queried.element_type());
  for (int64_t b = 0; b < batch; ++b) {
    kernels.widen(type, a.Queried(b), rows * a.length(), FloatsOf(weights) + b * rows * a.length());
  }
  float* of_positions = FloatsOf(sums) + batch * parts * numbers;
  For(pool, batch * parts, batch * a.cached_numbers(), [&](int64_t i) {
    const int64_t b = i / parts, first = i % parts * part;
    const float* of_rows = FloatsOf(weights) + b * rows * a.length();
    float* to = FloatsOf(sums) + i * numbers;
    float* of_position = of_positions + i * rows;
    std::fill_n(to, numbers, 0.0f);
    for (int64_t p = first; p < std::min(a.length(), first + part); ++p) {
      const float* scales = a.has_scale() ? a.ScalesAt(b, p) : nullptr;
      for (int64_t row = 0; row < rows; ++row) {
        const float weight = of_rows[row * a.length() + p];
        of_position[row] = scales == nullptr ? weight : weight * scales[row / a.rows()];
      }
      const float* values = a.At(kernels, b, p, FloatsOf(widened) + i * a.widened_numbers());
      kernels.add(of_position, values, a.cached_heads(), a.rows(), a.depth(), to);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    float* total = FloatsOf(sums) + b * parts * numbers;
    for (int64_t i = 1; i < parts; ++i) {
      for (int64_t n = 0; n < numbers; ++n) total[n] += total[i * numbers + n];
    }
    char* out = static_cast<char*>(a.out.untyped_data()) + b * numbers * BytesOf(a.out_type());
    for (int64_t query = 0; query < a.queries(); ++query) {
      for (int64_t head = 0; head < a.heads(); ++head, out += a.depth() * BytesOf(a.out_type())) {
        const float* from = total + (head * a.queries() + query) * a.depth();
        kernels.narrow(from, a.depth(), a.out_type(), out);
      }
    }
  }
  return true;
}

ffi::Error Compute(const char* name, ffi::ThreadPool& pool, const Attention& a) {
  const std::string call = std::string(name) + ": ", wrong = a.Refusal();
  if (!wrong.empty()) return ffi::Error::InvalidArgument(call + wrong);
  ffi::AnyBuffer out = a.out;
  if (out.element_count() == 0) return ffi::Error::Success();
  const auto sizes = out.dimensions();
  int64_t batch = 1;
  for (size_t axis = 0; axis < a.batch(); ++axis) batch *= sizes[axis];
  KeepSubnormals keep;
  if (a.is_output ? Output(a, pool, batch) : Scores(a, pool, batch)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, call + "no memory");
}

ffi::Error AttentionScores(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                           ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out) {
  return Compute("mpjax_attention_scores", pool, {query, key, scale, *out, false});
}

ffi::Error AttentionOutput(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::AnyBuffer value,
                           ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out) {
  return Compute("mpjax_attention_output", pool, {weights, value, scale, *out, true});
}

}  // namespace
}  // namespace mpjax

#define MPJAX_EXPORTED extern "C" __attribute__((visibility("default")))

MPJAX_EXPORTED XLA_FFI_Error* mpjax_attention_scores(XLA_FFI_CallFrame* call_frame);
MPJAX_EXPORTED XLA_FFI_Error* mpjax_attention_output(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_attention_scores, mpjax::AttentionScores,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>());  // scores

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpjax_attention_output, mpjax::AttentionOutput,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // weights
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>());  // output
