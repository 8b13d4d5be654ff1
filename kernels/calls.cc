// Calls the native kernels from several threads at once, each call with helpers from a pool of threads,
// and compares what they compute with what one thread does. `sanitize.py` builds it with sanitizers, which
// see everything here: the threads, and the ends of the operands. Of XLA they see neither.

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* mpjax_attention_output(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_attention_scores(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_int8_dot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_float8_dot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_weight_dot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_dynamic_int8_dot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_dynamic_grouped_dot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_grouped_dot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* mpjax_quantize(XLA_FFI_CallFrame*);
extern "C" const char* mpjax_native_isa();

// What stands for XLA's threads; the context of a call is its pool, or null for one thread.
struct XLA_FFI_ExecutionContext {
  explicit XLA_FFI_ExecutionContext(int count) {
    for (int i = 0; i < count; ++i) threads.emplace_back([this] { Work(); });
  }
  ~XLA_FFI_ExecutionContext() {
    Add(nullptr, nullptr);
    for (std::thread& thread : threads) thread.join();
  }
  void Add(XLA_FFI_Task* task, void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    tasks.push_back({task, data});
    added.notify_all();
  }
  void Work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      added.wait(lock, [this] { return !tasks.empty(); });
      const auto [task, data] = tasks.front();
      if (task == nullptr) return;  // and stays, for the others
      tasks.pop_front();
      lock.unlock();
      task(data);
    }
  }

  std::mutex mutex;
  std::condition_variable added;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks;
  std::vector<std::thread> threads;
};

namespace {

XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  args->ctx->Add(args->task, args->data);
  return nullptr;
}

XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx == nullptr ? 1 : static_cast<int64_t>(args->ctx->threads.size());
  return nullptr;
}

XLA_FFI_Error* Fail(XLA_FFI_Error_Create_Args* args) {
  std::fprintf(stderr, "%s\n", args->message);
  std::exit(1);
}

struct Array {
  XLA_FFI_DataType type;
  std::vector<int64_t> sizes;
  std::vector<char> data;
};

Array Random(XLA_FFI_DataType type, std::vector<int64_t> sizes, bool is_float, unsigned seed) {
  size_t count = 1;
  for (int64_t size : sizes) count *= static_cast<size_t>(size);
  if (type == XLA_FFI_DataType_S4) count /= 2;  // two to a byte
  std::mt19937 random(seed);
  Array array = {type, std::move(sizes), std::vector<char>(count * (is_float ? 4 : 1))};
  for (size_t i = 0; i < count; ++i) {
    const float number = static_cast<float>(random() % 1024 + 1) / 512;
    const char byte = static_cast<char>(random() % 0x78);  // finite in E4M3 too
    std::memcpy(&array.data[is_float ? 4 * i : i], is_float ? (const void*)&number : &byte,
                is_float ? 4 : 1);
  }
  return array;
}

using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

struct Call {
  Handler handler;
  std::vector<Array> in;
  std::vector<Array> out;                            // of the right shapes
  std::vector<std::pair<const char*, bool>> attrs;  // by name

  std::vector<Array> Results(XLA_FFI_ExecutionContext* pool) const {
    XLA_FFI_Api api = {};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                       XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = Fail;
    api.XLA_FFI_ThreadPool_Schedule = Schedule;
    api.XLA_FFI_ThreadPool_NumThreads = NumThreads;
    std::vector<Array> operands = in, results = out;
    std::vector<XLA_FFI_Buffer> buffers;
    std::vector<void*> pointers, values;
    for (std::vector<Array>* arrays : {&operands, &results}) {
      for (Array& array : *arrays) {
        buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.type, array.data.data(),
                           static_cast<int64_t>(array.sizes.size()), array.sizes.data()});
      }
    }
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
    std::vector<XLA_FFI_ArgType> arg_types(in.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> ret_types(out.size(), XLA_FFI_RetType_BUFFER);
    std::vector<XLA_FFI_AttrType> attr_types(attrs.size(), XLA_FFI_AttrType_SCALAR);
    std::vector<XLA_FFI_ByteSpan> spans;
    std::vector<XLA_FFI_Scalar> scalars;
    for (const auto& attr : attrs) {
      spans.push_back({attr.first, std::strlen(attr.first)});
      scalars.push_back({XLA_FFI_DataType_PRED, const_cast<bool*>(&attr.second)});
    }
    std::vector<XLA_FFI_ByteSpan*> names;
    for (size_t i = 0; i < attrs.size(); ++i) {
      names.push_back(&spans[i]);
      values.push_back(&scalars[i]);
    }
    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &api;
    frame.ctx = pool;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(in.size()),
                  arg_types.data(), pointers.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(out.size()),
                  ret_types.data(), pointers.data() + in.size()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(attrs.size()),
                   attr_types.data(), names.data(), values.data()};
    handler(&frame);
    return results;
  }
};

Call Product(Handler handler, XLA_FFI_DataType type, int64_t m, int64_t k, int64_t n, bool last) {
  return {handler,
          {Random(type, {1, m, k}, false, 1),
           Random(type, {1, last ? n : k, last ? k : n}, false, 2),
           Random(XLA_FFI_DataType_F32, {1, m}, true, 3),
           Random(XLA_FFI_DataType_F32, {1, n}, true, 4)},
          {Random(XLA_FFI_DataType_F32, {1, m, n}, true, 5)},
          {{"lhs_terms_last", true}, {"rhs_terms_last", last}}};
}

// The right operand in tiles of 16 x 4.
std::vector<int64_t> InTiles(int64_t k, int64_t n) { return {1, n / 16, k / 4, 16, 4}; }

Call OfTiles(int64_t m, int64_t k, int64_t n) {
  Call call = Product(mpjax_int8_dot, XLA_FFI_DataType_S8, m, k, n, true);
  call.in[1] = Random(XLA_FFI_DataType_S8, InTiles(k, n), false, 2);
  return call;
}

// Rows that are quantized in the call.
Call Dynamic(int64_t m, int64_t k, int64_t n, std::vector<int64_t> right, bool last) {
  return {mpjax_dynamic_int8_dot,
          {Random(XLA_FFI_DataType_F32, {1, m, k}, true, 1),
           Random(XLA_FFI_DataType_S8, std::move(right), false, 2),
           Random(XLA_FFI_DataType_F32, {1, n}, true, 3)},
          {Random(XLA_FFI_DataType_F32, {1, m, n}, true, 4)},
          {{"rhs_terms_last", last}}};
}

Call Weighed(XLA_FFI_DataType type, int64_t m, int64_t k, int64_t n, bool last) {
  return {mpjax_weight_dot,
          {Random(XLA_FFI_DataType_F32, {1, m, k}, true, 1),
           Random(type, {1, last ? n : k, last ? k : n}, false, 2),
           Random(XLA_FFI_DataType_F32, {1, 4, n}, true, 3),
           Random(XLA_FFI_DataType_S8, {1, 0, n}, false, 4)},
          {Random(XLA_FFI_DataType_F32, {1, m, n}, true, 5)},
          {{"weight_terms_last", last}}};
}

Call InGroups(XLA_FFI_DataType type, int64_t m, int64_t k, int64_t n, int64_t groups, bool last) {
  return {mpjax_grouped_dot,
          {Random(XLA_FFI_DataType_S8, {1, m, k}, false, 1),
           Random(type, {1, last ? n : k, last ? k : n}, false, 2),
           Random(XLA_FFI_DataType_F32, {1, m}, true, 3),
           Random(XLA_FFI_DataType_F32, {1, groups, n}, true, 4),
           Random(XLA_FFI_DataType_S8, {1, last ? groups : 0, n}, false, 5)},
          {Random(XLA_FFI_DataType_F32, {1, m, n}, true, 6)},
          {{"weight_terms_last", last}}};
}

Call DynamicInGroups(int64_t m, int64_t k, int64_t n, int64_t groups, bool last) {
  Call call = InGroups(XLA_FFI_DataType_S4, m, k, n, groups, last);
  call.handler = mpjax_dynamic_grouped_dot;
  call.in[0] = Random(XLA_FFI_DataType_F32, {1, m, k}, true, 1);
  call.in.erase(call.in.begin() + 2);  // the scale of the rows
  return call;
}

// Queries of six heads to a cache of 133 positions and three heads.
Call Attention(bool is_output, XLA_FFI_DataType type, int64_t queries) {
  const bool is_float = type == XLA_FFI_DataType_F32;
  const std::vector<int64_t> query = {2, queries, 6, 83}, weights = {2, 6, queries, 133};
  return {is_output ? mpjax_attention_output : mpjax_attention_scores,
          {Random(XLA_FFI_DataType_F32, is_output ? weights : query, true, 1),
           Random(type, {2, 133, 3, 83}, is_float, 2),
           Random(XLA_FFI_DataType_F32, {2, is_float ? 0 : 133, 3}, true, 3)},
          {Random(XLA_FFI_DataType_F32, is_output ? query : weights, true, 4)},
          {}};
}

Call Cast(XLA_FFI_DataType type, int64_t rows, int64_t columns, int64_t scales) {
  Array scale = Random(XLA_FFI_DataType_F32, {scales}, true, 2);
  scale.data.assign(scale.data.size(), 0);  // not known yet
  const Array found = Random(XLA_FFI_DataType_F32, {scales}, true, 4);
  return {mpjax_quantize,
          {Random(XLA_FFI_DataType_F32, {rows, columns}, true, 1), scale},
          {Random(type, {rows, columns}, false, 3), found, found},
          {}};
}

}  // namespace

int main() {
  std::vector<Call> calls;
  for (const int64_t m : {1, 3, 9, 70}) {
    for (const bool last : {true, false}) {
      calls.push_back(Product(mpjax_int8_dot, XLA_FFI_DataType_S8, m, 811, 1301, last));
      calls.push_back(Product(mpjax_float8_dot, XLA_FFI_DataType_F8E4M3FN, m, 811, 1301, last));
      calls.push_back(Dynamic(m, 811, 1301, {1, last ? 1301 : 811, last ? 811 : 1301}, last));
      calls.push_back(Weighed(XLA_FFI_DataType_S8, m, 812, 1301, last));
      calls.push_back(Weighed(XLA_FFI_DataType_S4, m, 812, 1302, last));
      calls.push_back(Weighed(XLA_FFI_DataType_F8E5M2, m, 812, 1301, last));
      calls.push_back(InGroups(XLA_FFI_DataType_S8, m, 812, 1301, 4, last));
      calls.push_back(InGroups(XLA_FFI_DataType_S4, m, 816, 1302, 8, last));
      calls.push_back(DynamicInGroups(m, 816, 1302, 8, last));
      calls.push_back(InGroups(XLA_FFI_DataType_S4, m, 800, 1302, 25, last));
      calls.push_back(InGroups(XLA_FFI_DataType_S4, m, 1302, 334, 1, last));
    }
  }
  const bool reads_tiles = std::strncmp(mpjax_native_isa(), "avx512", 6) == 0;
  for (const int64_t m : {1, 2, 3, 4, 9, 70, 300}) {
    if (!reads_tiles) break;
    calls.push_back(OfTiles(m, 812, 1296));
    calls.push_back(Dynamic(m, 812, 1296, InTiles(812, 1296), false));
  }
  calls.push_back(Weighed(XLA_FFI_DataType_S8, 400, 808, 200, true));  // rows converted by several
  calls.push_back(Cast(XLA_FFI_DataType_S8, 300, 800, 300));
  calls.push_back(Cast(XLA_FFI_DataType_F8E4M3FN, 300, 800, 1));
  for (const auto type : {XLA_FFI_DataType_F32, XLA_FFI_DataType_S8, XLA_FFI_DataType_F8E4M3FN}) {
    for (const int64_t queries : {2, 50}) {
      calls.push_back(Attention(false, type, queries));
      calls.push_back(Attention(true, type, queries));
    }
  }
  int wrong = 0;
  {
    XLA_FFI_ExecutionContext pool(4);
    for (size_t i = 0; i < calls.size(); ++i) {
      const std::vector<Array> expected = calls[i].Results(nullptr);
      std::vector<Array> found[3];
      std::vector<std::thread> callers;
      for (auto& each : found) {
        callers.emplace_back([&, i] { each = calls[i].Results(&pool); });
      }
      for (std::thread& caller : callers) caller.join();
      for (const auto& each : found) {
        for (size_t j = 0; j < expected.size(); ++j) wrong += each[j].data != expected[j].data;
      }
    }
  }
  std::printf("%zu calls by 3 threads and 4 helpers: %d results differ\n", calls.size(), wrong);
  return wrong != 0;
}
