// Launches of the attention kernels: which pass, how many blocks, what scratch. FLOPs count the built-in
// causal mask as half the square; bytes count every operand once.
#include "backend/cuda/attention.h"

#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cudnn_attention.h"
#include "backend/cuda/kernels/tiles.cuh"
#include "base/error.h"

namespace flexchat::cuda {
namespace {

const CudaAttentionPlan& checked_plan(const AttentionPlan& plan) {
  const auto* mine = dynamic_cast<const CudaAttentionPlan*>(&plan);
  if (!mine) fail("an attention plan for kernel '{}' cannot run on the cuda backend", plan.kernel());
  return *mine;
}

int kernel_dtype(DType dtype) {
  check(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
        "attention kernel cuda_mma: tensors of {}; allowed are f32, bf16 and f16", dtype_name(dtype));
  return dtype == DType::f32 ? kAttentionF32 : dtype == DType::bf16 ? kAttentionBf16 : kAttentionF16;
}

unsigned blocks(int64_t n, int64_t each = 1) { return static_cast<unsigned>((n + each - 1) / each); }

// Views as kernels take them. They copy 16 bytes at a time, so rows that do not start at such an address go
// through a contiguous copy.
class Views {
 public:
  Views(CudaBackend& backend, int64_t batch, int64_t head_dim)
      : backend_(backend), batch_(batch), d_(head_dim) {}

  AttentionView read(const HeadsView& x, int64_t tokens, int64_t heads) {
    if (aligned(x)) return view(x);
    const HeadsView copy = temporary(x, tokens, heads);
    copy_heads(x, copy, tokens, heads);
    return view(copy);
  }
  AttentionView written(const HeadsView& x, int64_t tokens, int64_t heads) {
    if (aligned(x)) return view(x);
    const HeadsView copy = temporary(x, tokens, heads);
    pending_.push_back({copy, x, tokens, heads});
    return view(copy);
  }
  // To be called after the kernels: brings temporary results where they belong.
  void finish() {
    for (const Pending& p : pending_) copy_heads(p.from, p.to, p.tokens, p.heads);
  }
  // Keys in pages, in contiguous memory.
  AttentionView gathered(const HeadsView& pool, const Tensor& table, int64_t page_size, const int* kv_lens,
                         int64_t tokens, int64_t heads) {
    const HeadsView copy = temporary(pool, tokens, heads);
    gather_pages(backend_.context(), pool, table, page_size, d_, kv_lens, temporaries_.back());
    return view(copy);
  }
  bool aligned(const HeadsView& x) const {
    const int64_t element = dtype_size(x.dtype);
    const auto ok = [&](int64_t stride) { return stride * element % 16 == 0; };
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && ok(x.batch_stride) && ok(x.token_stride) &&
           ok(x.head_stride);
  }
  AttentionView view(const HeadsView& x) const {
    return {x.data, x.batch_stride, x.token_stride, x.head_stride == 0 ? d_ : x.head_stride};
  }

 private:
  struct Pending {
    HeadsView from, to;
    int64_t tokens, heads;
  };
  HeadsView temporary(const HeadsView& like, int64_t tokens, int64_t heads) {
    temporaries_.push_back(backend_.empty({batch_, tokens, heads * d_}, like.dtype));
    return heads_view(temporaries_.back());
  }
  void copy_heads(const HeadsView& from, const HeadsView& to, int64_t tokens, int64_t heads) {
    const auto head = [&](HeadsView x, int64_t h) {
      x.data =
          static_cast<char*>(x.data) + h * (x.head_stride == 0 ? d_ : x.head_stride) * dtype_size(x.dtype);
      return x;
    };
    for (int64_t h = 0; h < heads; ++h) backend_.copy_rows(batch_, tokens, d_, head(from, h), head(to, h));
  }

  CudaBackend& backend_;
  int64_t batch_, d_;
  std::vector<Tensor> temporaries_;
  std::vector<Pending> pending_;
};

void set_tensors(const CudaAttentionPlan& plan, const AttentionTensors& x, Views& views, AttentionParams& p) {
  const AttentionShape& s = plan.shape();
  p.q = views.read(x.q, s.q_len, s.n_head);
  const int64_t page_size = plan.spec().page_size;
  if (page_size > 0) check(x.block_table != nullptr, "attention: a plan with pages needs a block table");
  if (page_size > 0 && views.aligned(x.k) && views.aligned(x.v)) {
    p.k = views.view(x.k);
    p.v = views.view(x.v);
    p.block_table = x.block_table->as<int>();
    p.table_stride = static_cast<int>(x.block_table->dim(1));
  } else if (page_size > 0) {
    p.k = views.gathered(x.k, *x.block_table, page_size, p.kv_lens, s.kv_len, s.n_kv_head);
    p.v = views.gathered(x.v, *x.block_table, page_size, p.kv_lens, s.kv_len, s.n_kv_head);
  } else {
    p.k = views.read(x.k, s.kv_len, s.n_kv_head);
    p.v = views.read(x.v, s.kv_len, s.n_kv_head);
  }
  if (x.lse) p.lse = x.lse->as<float>();
}

// Keys are split so that there are some 250 blocks, one wave of a large GPU, whatever the device, for the
// split decides how sums are rounded.
void run_decode(CudaBackend& backend, const CudaAttentionPlan& plan, DType dtype, AttentionParams p) {
  constexpr int64_t wanted_blocks = 256;
  const AttentionShape& s = plan.shape();
  const int type = kernel_dtype(dtype), d = static_cast<int>(s.head_dim);
  const DecodeTile tile = decode_tile(type, d);
  const int64_t rows = s.n_head / s.n_kv_head * s.q_len, row_tiles = (rows + kDecodeRows - 1) / kDecodeRows;
  const int64_t pieces = s.batch * s.n_kv_head * row_tiles, longest = std::max<int64_t>(s.kv_len, 1);
  const int64_t most =
      (longest + 4 * tile.keys() - 1) / (4 * tile.keys());  // at least four rounds of each warp
  const int64_t wanted = std::clamp<int64_t>((wanted_blocks + pieces - 1) / pieces, 1, most);
  const int64_t length = ((longest + wanted - 1) / wanted + tile.keys() - 1) / tile.keys() * tile.keys();
  p.split_len = static_cast<int>(length);
  p.n_split = static_cast<int>((longest + length - 1) / length);
  Tensor out, lse;
  const int64_t outputs = s.batch * s.n_head * s.q_len;
  if (p.n_split > 1) {
    out = backend.empty({outputs, p.n_split, s.head_dim}, DType::f32);
    lse = backend.empty({outputs, p.n_split}, DType::f32);
    p.split_out = out.as<float>();
    p.split_lse = lse.as<float>();
  }
  Context& context = backend.context();
  launch(context, plan.kernel(context, "decode", dtype, p.block_table != nullptr, "attention_decode"),
         attention_work(plan, dtype, 2, 2), dim3(blocks(pieces * p.n_split)),
         dim3(static_cast<unsigned>(tile.warps * 32)), static_cast<size_t>(decode_shared_bytes(type, d)), p);
  if (p.n_split > 1) {
    const double bytes = static_cast<double>(out.bytes() + lse.bytes());
    launch(context,
           plan.kernel(context, "decode", dtype, p.block_table != nullptr, "attention_decode_combine"),
           {bytes, bytes / 2}, dim3(blocks(outputs, 4)), dim3(128), 0, p);
  }
}

void run_forward(CudaBackend& backend, const CudaAttentionPlan& plan, DType dtype, AttentionParams p) {
  const AttentionShape& s = plan.shape();
  const int type = kernel_dtype(dtype), d = static_cast<int>(s.head_dim);
  Context& context = backend.context();
  const int major = context.device().major;
  const bool dear = plan.mod().dear;
  const ForwardTile tile = forward_tile(type, d, major == 9, dear);
  p.blocks = plan.blocks(tile.block_q(), tile.block_kv, false);
  const bool paged = p.block_table != nullptr, training = p.lse != nullptr && !paged;
  launch(context, plan.kernel(context, "forward", dtype, paged, "attention_forward", training),
         attention_work(plan, dtype, 2, 2),
         dim3(blocks(s.q_len, tile.block_q()) * blocks(s.batch * s.n_head)),
         dim3(static_cast<unsigned>(tile.block_threads())),
         static_cast<size_t>(forward_shared_bytes(type, d, major, dear)), p);
}

// Scratch and results of captured tensors' gradients.
struct CaptureGradients {
  std::vector<Tensor> parts;           // for each access
  std::map<std::string, Tensor> sums;  // for each tensor, by name
};

CaptureGradients make_capture_gradients(CudaBackend& backend, const CudaAttentionPlan& plan,
                                        AttentionParams& p) {
  const AttentionShape& s = plan.shape();
  CaptureGradients grads;
  const auto& accesses = plan.mod().gradients;
  for (size_t i = 0; i < accesses.size(); ++i) {
    const auto at = static_cast<size_t>(accesses[i].capture);
    const std::string& name = plan.mod().captures[at].name();
    if (!grads.sums.contains(name))
      grads.sums[name] = backend.zeros({plan.capture(at).numel(), 2}, DType::i64);
    p.capture_sum[i] = grads.sums[name].as<unsigned long long>();
    if (accesses[i].kind == 'a') continue;
    const int64_t length = accesses[i].kind == 'k' ? s.kv_len : s.q_len;
    grads.parts.push_back(backend.empty({s.batch * s.n_head, std::max<int64_t>(length, 1)}, DType::f32));
    p.capture_part[i] = grads.parts.back().as<float>();
  }
  return grads;
}

void run_backward(CudaBackend& backend, const CudaAttentionPlan& plan, DType dtype, AttentionParams p) {
  const AttentionShape& s = plan.shape();
  const int type = kernel_dtype(dtype), d = static_cast<int>(s.head_dim);
  Context& context = backend.context();
  const int major = context.device().major;
  const BackwardTile tile = backward_tile(type, d, major == 9);
  const int64_t bh = s.batch * s.n_head, q_tiles = blocks(s.q_len, tile.block_q),
                kv_tiles = blocks(s.kv_len, tile.block_kv());
  const Tensor stats = backend.empty({bh, q_tiles, 2, tile.block_q}, DType::f32);
  const Tensor dq_sum = backend.empty({bh, q_tiles, tile.dq_floats(type, d)}, DType::f32);
  const Tensor turns = backend.empty({bh * q_tiles + 1}, DType::i32);
  p.stats = stats.as<float>();
  p.dq_sum = dq_sum.as<float>();
  p.ticket = turns.as<int>();
  p.dq_turn = turns.as<int>() + 1;
  p.transposed = plan.blocks(tile.block_q, tile.block_kv(), true);

  const auto kernel = [&](const char* entry) -> const JitKernel& {
    return plan.kernel(context, "backward", dtype, false, entry);
  };
  const dim3 threads(static_cast<unsigned>(tile.threads()));
  const int element = static_cast<int>(dtype_size(dtype)),
            n_grads = static_cast<int>(plan.mod().gradients.size());
  launch(context, kernel("attention_backward_prepare"), attention_work(plan, dtype, 0, 1),
         dim3(std::max(blocks(bh * q_tiles * tile.block_q, 8), 1u)), dim3(256), 0, p);
  launch(context, kernel("attention_backward"), attention_work(plan, dtype, 5, 4),
         dim3(blocks(kv_tiles * s.batch * s.n_kv_head)), dim3(static_cast<unsigned>(tile.block_threads())),
         static_cast<size_t>(backward_shared_bytes(type, d, n_grads, major)), p);
  launch(context, kernel("attention_backward_finish"), {static_cast<double>(dq_sum.bytes()), 0},
         dim3(blocks(bh * q_tiles)), threads, static_cast<size_t>(tile.block_q * tile_row_bytes(d, element)),
         p);
  if (n_grads > 0)
    launch(context, kernel("attention_backward_captures"), {},
           dim3(blocks(bh * std::max(s.q_len, s.kv_len), 256)), dim3(256), 0, p);
}

}  // namespace

Work attention_work(const AttentionPlan& plan, DType dtype, double products, double tensors) {
  const AttentionShape& s = plan.shape();
  const auto b = static_cast<double>(s.batch), h = static_cast<double>(s.n_head),
             g = static_cast<double>(s.n_kv_head), d = static_cast<double>(s.head_dim),
             q = static_cast<double>(s.q_len), kv = static_cast<double>(s.kv_len);
  double seen = q * kv;
  if (plan.spec().causal && q == kv) seen /= 2;
  return {tensors * b * d * (q * h + kv * g) * static_cast<double>(dtype_size(dtype)),
          products * 2 * b * h * d * seen};
}

void CudaBackend::attention(const AttentionPlan& any_plan, const AttentionTensors& x) {
  if (const auto* vendor = dynamic_cast<const CudnnAttentionPlan*>(&any_plan))
    return vendor->forward(*this, x);
  const CudaAttentionPlan& plan = checked_plan(any_plan);
  const AttentionShape& s = plan.shape();
  if (s.batch * s.q_len * s.n_head == 0) return;
  Views views(*this, s.batch, s.head_dim);
  AttentionParams p = plan.params();
  set_tensors(plan, x, views, p);
  p.out = views.written(x.out, s.q_len, s.n_head);
  if (plan.decodes())
    run_decode(*this, plan, x.q.dtype, p);
  else
    run_forward(*this, plan, x.q.dtype, p);
  views.finish();
}

void CudaBackend::attention_backward(const AttentionPlan& any_plan, const AttentionTensors& x,
                                     const AttentionGradients& grads) {
  if (const auto* vendor = dynamic_cast<const CudnnAttentionPlan*>(&any_plan))
    return vendor->backward(*this, x, grads);
  const CudaAttentionPlan& plan = checked_plan(any_plan);
  const AttentionShape& s = plan.shape();
  check(plan.spec().page_size == 0, "attention has no backward through pages");
  Views views(*this, s.batch, s.head_dim);
  AttentionParams p = plan.params();
  set_tensors(plan, x, views, p);
  p.out = views.read(x.out, s.q_len, s.n_head);
  p.dout = views.read(grads.dout, s.q_len, s.n_head);
  p.dq = views.written(grads.dq, s.q_len, s.n_head);
  p.dk = views.written(grads.dk, s.kv_len, s.n_kv_head);
  p.dv = views.written(grads.dv, s.kv_len, s.n_kv_head);
  if (grads.dlse) p.dlse = grads.dlse->as<float>();
  const CaptureGradients captures = make_capture_gradients(*this, plan, p);
  run_backward(*this, plan, x.q.dtype, p);
  for (const auto& [name, grad] : grads.captures) {
    const auto found = captures.sums.find(name);
    if (found == captures.sums.end())
      fill(grad, 0);  // the score mod's slope with respect to it is zero everywhere
    else
      convert_fixed_point(context_, found->second, grad);
  }
  views.finish();
}

}  // namespace flexchat::cuda
