// Every case is a graph of cuDNN: q, k, v (B, heads, T, D) by strides, softmax over the visible keys, and the
// LSE kept for backward. cuDNN compiles a graph for fixed sizes and strides, so graphs are kept by all of
// them and made at first use, which must be outside a captured step. Running one launches kernels on the
// stream of the backend with memory of its arena, and nothing else.
//
// The frontend's headers describe graphs in C++ and call cuDNN's C functions, which cudnn_entry.cc forwards
// to the library opened at run time.
#include "backend/cuda/cudnn_attention.h"

#include "backend/cudnn_library.h"
#include "base/error.h"

#ifdef FLEXCHAT_CUDNN

#include <cudnn_frontend.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/attention_support.h"
#include "backend/cuda/attention.h"
#include "backend/cuda/cuda_backend.h"

namespace flexchat::cuda {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;

// What the tensors of a graph are called.
enum Id : int64_t { kQ = 1, kK, kV, kOut, kStats, kDout, kDq, kDk, kDv };
using Pointers = std::unordered_map<int64_t, void*>;

struct Graph {
  fe::graph::Graph graph;
  size_t workspace = 0;  // bytes
};

// Everything a graph is made for: the pass, sizes, mask, scale, and the strides of each tensor.
using Key = std::vector<int64_t>;

// Decoding asks for another length with every token; graphs cannot be given up while captured steps may hold
// them.
constexpr size_t kMaxGraphs = 512;
constexpr int64_t kAlignment = 16;            // bytes, of every row
constexpr int64_t kHeadDimOfEveryArch = 128;  // what only Hopper's kernels exceed

// Messages of cuDNN may go on for lines.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// cuDNN on one device: its handle and the graphs made so far.
class Session {
 public:
  // The one of a device. Never destroyed: the driver may be gone before static objects are.
  static Session& of(const Context& context) {
    static std::mutex mutex;
    static auto* const sessions = new std::map<int, std::unique_ptr<Session>>;
    const std::lock_guard lock(mutex);
    std::unique_ptr<Session>& session = (*sessions)[context.device().ordinal];
    if (session == nullptr) {
      context.forbid_in_capture("starting cuDNN");
      session.reset(new Session);
    }
    return *session;
  }

  // Runs the graph of `key`, which `make` describes where there is none yet.
  template <class Make>
  void run(CudaBackend& backend, const char* name, const Work& work, const Key& key, const Make& make,
           Pointers pointers) {
    Context& context = backend.context();
    const std::lock_guard lock(mutex_);
    auto found = graphs_.find(key);
    if (found == graphs_.end()) {
      context.forbid_in_capture("preparing an attention of cuDNN");
      found = graphs_.emplace(key, finished(make())).first;
    }
    const Graph& graph = *found->second;
    if (stream_ != context.stream()) {
      check_status(cudnnSetStream(handle_, context.stream()), "setting its stream");
      stream_ = context.stream();
    }
    const Tensor workspace =
        backend.empty({static_cast<int64_t>(std::max<size_t>(graph.workspace, 1))}, DType::u8);
    context.begin_launch(name, work);
    fe::error_t status = graph.graph.execute(handle_, pointers, workspace.data());
    context.end_launch(name);
    if (status.is_bad())
      fail_run("{}: cuDNN {} says: {}", name, cudnn_library().version, first_line(status.get_message()));
  }

 private:
  Session() { check_status(cudnnCreate(&handle_), "starting"); }

  static void check_status(cudnnStatus_t status, const char* what) {
    if (status != CUDNN_STATUS_SUCCESS)
      fail_run("attention kernel cudnn: {}: {}", what, cudnnGetErrorString(status));
  }

  std::unique_ptr<Graph> finished(std::unique_ptr<Graph> made) {
    check(graphs_.size() < kMaxGraphs,
          "attention kernel cudnn: {} shapes and layouts were prepared, and no more are; cuda_mma takes any "
          "number (decoding needs it)",
          kMaxGraphs);
    fe::error_t status = made->graph.build(handle_, {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK});
    if (status.is_bad()) {
      const std::string said = first_line(status.get_message());
      check(status.get_code() != fe::error_code_t::GRAPH_NOT_SUPPORTED,
            "attention kernel cudnn: cuDNN {} does not do this case: {}", cudnn_library().version, said);
      fail_run("attention kernel cudnn: cuDNN {} cannot prepare it: {}", cudnn_library().version, said);
    }
    made->workspace = static_cast<size_t>(made->graph.get_workspace_size());
    return made;
  }

  std::mutex mutex_;  // a handle serves one thread at a time
  cudnnHandle_t handle_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::map<Key, std::unique_ptr<Graph>> graphs_;
};

// Which backward: 1, the default, keeps ds in memory, B * H * Tq * Tkv elements, and sums in a fixed order;
// with 0 dq is summed by float atomics, which is what cuDNN and PyTorch take by themselves.
bool wants_deterministic() {
  constexpr const char* variable = "FLEXCHAT_CUDNN_DETERMINISTIC";
  const char* value = std::getenv(variable);
  const std::string text = value != nullptr && *value != '\0' ? value : "1";
  check(text == "0" || text == "1", "{} is '{}'; allowed: 0, 1", variable, text);
  return text == "1";
}

fe::DataType_t cudnn_type(DType dtype) {
  check(dtype == DType::bf16 || dtype == DType::f16,
        "attention kernel cudnn: tensors of {}; allowed are bf16 and f16", dtype_name(dtype));
  return dtype == DType::bf16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
}

// One (B, T, heads, D) operand as cuDNN counts its axes: B, heads, T, D.
struct Operand {
  std::array<int64_t, 4> dim, stride;
  void* data;

  Operand(const char* name, const HeadsView& x, const AttentionShape& s, int64_t tokens, int64_t heads)
      : dim{s.batch, heads, tokens, s.head_dim},
        stride{x.batch_stride, x.head_stride == 0 ? s.head_dim : x.head_stride, x.token_stride, 1},
        data(x.data) {
    const int64_t element = dtype_size(x.dtype);
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kAlignment == 0 &&
                         std::all_of(stride.begin(), stride.end() - 1,
                                     [&](int64_t n) { return n * element % kAlignment == 0; });
    check(aligned, "attention kernel cudnn: rows of {} must start at multiples of {} bytes", name,
          kAlignment);
  }

  template <class Attributes>
  void describe(Attributes& tensor, Id id) const {
    tensor.set_uid(id).set_dim({dim.begin(), dim.end()}).set_stride({stride.begin(), stride.end()});
  }
  std::shared_ptr<Tensor_attributes> input(Graph& graph, Id id) const {
    Tensor_attributes tensor;
    describe(tensor, id);
    return graph.graph.tensor(tensor);
  }
};

class Plan final : public CudnnAttentionPlan {
 public:
  Plan(const AttentionShape& shape, const AttentionSpec& spec, Session& session)
      : CudnnAttentionPlan(shape, spec),
        session_(session),
        deterministic_(wants_deterministic()),
        reason_(fmt::format("asked for: the baseline, cuDNN {}{}", cudnn_library().version,
                            deterministic_ ? "" : ", whose backward sums in any order")) {}

  std::string_view reason() const override { return reason_; }

  void forward(CudaBackend& backend, const AttentionTensors& x) const override {
    const AttentionShape& s = shape();
    const fe::DataType_t type = cudnn_type(x.q.dtype);
    const Operand q("q", x.q, s, s.q_len, s.n_head), k("k", x.k, s, s.kv_len, s.n_kv_head),
        v("v", x.v, s, s.kv_len, s.n_kv_head), out("out", x.out, s, s.q_len, s.n_head);
    const auto make = [&] {
      auto made = empty_graph(type);
      fe::graph::SDPA_attributes options;
      options.set_generate_stats(x.lse != nullptr);
      set_options(options);
      auto [o, stats] = made->graph.sdpa(q.input(*made, kQ), k.input(*made, kK), v.input(*made, kV), options);
      out.describe(o->set_output(true), kOut);
      if (x.lse != nullptr) describe_stats(stats->set_output(true));
      return made;
    };
    Pointers pointers = {{kQ, q.data}, {kK, k.data}, {kV, v.data}, {kOut, out.data}};
    if (x.lse != nullptr) pointers[kStats] = x.lse->data();
    session_.run(backend, "cudnn_attention_forward", attention_work(*this, x.q.dtype, 2, 2),
                 key_of(x.lse != nullptr ? 1 : 0, type, {&q, &k, &v, &out}), make, std::move(pointers));
  }

  void backward(CudaBackend& backend, const AttentionTensors& x,
                const AttentionGradients& grads) const override {
    check(grads.dlse == nullptr, "attention kernel cudnn does not do gradients of the LSE");
    check(x.lse != nullptr, "attention kernel cudnn: backward needs the LSE of the forward");
    const AttentionShape& s = shape();
    const fe::DataType_t type = cudnn_type(x.q.dtype);
    const Operand q("q", x.q, s, s.q_len, s.n_head), k("k", x.k, s, s.kv_len, s.n_kv_head),
        v("v", x.v, s, s.kv_len, s.n_kv_head), out("out", x.out, s, s.q_len, s.n_head),
        dout("dout", grads.dout, s, s.q_len, s.n_head), dq("dq", grads.dq, s, s.q_len, s.n_head),
        dk("dk", grads.dk, s, s.kv_len, s.n_kv_head), dv("dv", grads.dv, s, s.kv_len, s.n_kv_head);
    const auto make = [&] {
      auto made = empty_graph(type);
      fe::graph::SDPA_backward_attributes options;
      options.set_deterministic_algorithm(deterministic_);
      set_options(options);
      Tensor_attributes lse;
      describe_stats(lse);
      auto [a, b, c] = made->graph.sdpa_backward(q.input(*made, kQ), k.input(*made, kK), v.input(*made, kV),
                                                 out.input(*made, kOut), dout.input(*made, kDout),
                                                 made->graph.tensor(lse), options);
      dq.describe(a->set_output(true), kDq);
      dk.describe(b->set_output(true), kDk);
      dv.describe(c->set_output(true), kDv);
      return made;
    };
    session_.run(backend, "cudnn_attention_backward", attention_work(*this, x.q.dtype, 5, 4),
                 key_of(deterministic_ ? 3 : 2, type, {&q, &k, &v, &out, &dout, &dq, &dk, &dv}), make,
                 {{kQ, q.data},
                  {kK, k.data},
                  {kV, v.data},
                  {kOut, out.data},
                  {kStats, x.lse->data()},
                  {kDout, dout.data},
                  {kDq, dq.data},
                  {kDk, dk.data},
                  {kDv, dv.data}});
  }

 private:
  static std::unique_ptr<Graph> empty_graph(fe::DataType_t type) {
    auto made = std::make_unique<Graph>();
    made->graph.set_io_data_type(type)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    return made;
  }

  // Scale and mask. cuDNN counts the diagonal from the first query and key or from the last ones; key j is
  // visible to query i when i - j < its left bound.
  template <class Options>
  void set_options(Options& options) const {
    options.set_attn_scale(static_cast<float>(spec().scale));
    if (!spec().causal) return;
    options.set_diagonal_alignment(rows_begin_at_zero(shape()) ? fe::DiagonalAlignment_t::TOP_LEFT
                                                               : fe::DiagonalAlignment_t::BOTTOM_RIGHT);
    options.set_diagonal_band_right_bound(0);
    if (windowed()) options.set_diagonal_band_left_bound(static_cast<int>(spec().window) + 1);
  }
  bool windowed() const { return spec().window >= 0 && spec().window < shape().kv_len; }

  void describe_stats(Tensor_attributes& lse) const {
    const AttentionShape& s = shape();
    lse.set_uid(kStats)
        .set_data_type(fe::DataType_t::FLOAT)
        .set_dim({s.batch, s.n_head, s.q_len, 1})
        .set_stride({s.n_head * s.q_len, s.q_len, 1, 1});
  }

  Key key_of(int64_t pass, fe::DataType_t type, std::initializer_list<const Operand*> operands) const {
    const AttentionShape& s = shape();
    Key key = {pass,
               static_cast<int64_t>(type),
               s.batch,
               s.n_head,
               s.n_kv_head,
               s.q_len,
               s.kv_len,
               s.head_dim,
               spec().causal,
               spec().causal && windowed() ? spec().window : -1,
               rows_begin_at_zero(s),
               std::bit_cast<int32_t>(static_cast<float>(spec().scale))};
    for (const Operand* operand : operands)
      key.insert(key.end(), operand->stride.begin(), operand->stride.end() - 1);
    return key;
  }

  Session& session_;
  const bool deterministic_;
  const std::string reason_;
};

}  // namespace

std::shared_ptr<const CudnnAttentionPlan> plan_cudnn_attention(CudaBackend& backend,
                                                               const AttentionShape& shape,
                                                               const AttentionSpec& spec) {
  check_attention_support("cudnn", shape, spec);
  check(std::min({shape.batch, shape.q_len, shape.kv_len, shape.n_head}) > 0,
        "attention kernel cudnn does not do empty batches: {} x {} queries, {} keys, {} heads", shape.batch,
        shape.q_len, shape.kv_len, shape.n_head);
  check(spec.window < 0 || shape.q_len <= shape.kv_len,
        "attention kernel cudnn does not do windows with more queries than keys ({} and {})", shape.q_len,
        shape.kv_len);
  check(cudnn_library().handle != nullptr, "attention kernel cudnn: {}", cudnn_library().why);
  const DeviceInfo& device = backend.context().device();
  check(shape.head_dim <= kHeadDimOfEveryArch || device.major == 9,
        "attention kernel cudnn: head dim {} on sm_{}{}; above {} it needs sm_90", shape.head_dim,
        device.major, device.minor, kHeadDimOfEveryArch);
  return std::make_shared<Plan>(shape, spec, Session::of(backend.context()));
}

}  // namespace flexchat::cuda

#else

namespace flexchat::cuda {

std::shared_ptr<const CudnnAttentionPlan> plan_cudnn_attention(CudaBackend&, const AttentionShape&,
                                                               const AttentionSpec&) {
  fail("attention kernel cudnn: {}", cudnn_library().why);
}

}  // namespace flexchat::cuda

#endif
