// THE seam: every kernel a device must provide, and nothing else. Devices: `cpu` (src/backend/cpu) and the
// slow double-precision `reference` (src/backend/reference) that tests and `verify` compare against.
//
// Conventions
//   N = B*T tokens, C = n_embd, H = n_head, G = n_kv_head, D = head dim, V = vocabulary.
//   "act" is the compute dtype of activations (f32, bf16, f16; f64 on the reference), "master" the dtype of
//   weights, gradients and optimizer state (f32; f64 on the reference). Arithmetic is f32 or wider.
//   Output tensors are passed last, are allocated by the caller and are overwritten unless a comment says
//   "+=". Token ids, targets and positions are i32.
//   Shapes are checked where ops are built (src/ops); kernels may rely on them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/arena.h"
#include "base/error.h"
#include "base/tensor.h"
#include "flex/attention.h"

namespace flexchat {

enum class Trans : bool { no, yes };

// A view of per-head vectors (B, T, heads, D) inside a larger buffer; strides in elements, D contiguous.
struct HeadsView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;  // 0: heads lie head_dim apart
};

// The polynomial a X + b X^3 + c X^5 of a step of Muon's orthogonalization.
struct Quintic {
  double a = 0, b = 0, c = 0;
};

// The view of a tensor (B, T, row) that starts `offset` elements into every row.
inline HeadsView heads_view(const Tensor& x, int64_t offset = 0) {
  return {static_cast<char*>(x.data()) + offset * dtype_size(x.dtype()), x.dtype(), x.dim(1) * x.dim(2),
          x.dim(2)};
}

// The tensors of one attention. q and out (B, Tq, H, D), k and v (B, Tkv, G, D); with pages k and v are pools
// (pages, page_size, G, D) whose batch_stride is that of a page.
struct AttentionTensors {
  HeadsView q, k, v, out;
  const Tensor* lse = nullptr;  // (B, H, Tq) master, natural log; -inf for queries that see nothing
  const Tensor* block_table =
      nullptr;  // (B, pages of a row) i32: the page of keys [i*page_size, (i+1)*page_size)
};

struct AttentionGradients {
  HeadsView dout;
  const Tensor* dlse = nullptr;  // (B, H, Tq) master: gradient of the LSE, when something reads it
  HeadsView dq, dk, dv;          // overwritten
  std::vector<std::pair<std::string, Tensor>> captures;  // differentiable ones by name: master, overwritten
};

// An attention made ready for a batch: block lists, captured tensors and lengths where the kernel wants them.
// Made by Backend::plan_attention, shared by layers, forward and backward.
class AttentionPlan {
 public:
  AttentionPlan(AttentionShape shape, AttentionSpec spec)
      : shape_(std::move(shape)), spec_(std::move(spec)) {}
  virtual ~AttentionPlan() = default;
  const AttentionShape& shape() const { return shape_; }
  const AttentionSpec& spec() const { return spec_; }
  virtual std::string_view kernel() const = 0;  // the kernel that runs it, as --attention names it
  virtual std::string_view reason() const = 0;  // why that one

 private:
  AttentionShape shape_;
  AttentionSpec spec_;
};

// What a softmax over panels of columns keeps of every row, (N) each.
struct SoftmaxRows {
  Tensor shift, sum;    // master: the sum of exp(z - shift) over the columns so far
  Tensor target;        // master: z[target], 0 until its panel has come
  Tensor best, argmax;  // master, i32: the largest z and where it stands first; undefined: not wanted
};
// Up to this softcap no logit is so far below the cap that exp(z - cap) leaves the range of bf16, so the cap
// itself serves as the shift and rows need no maximum.
inline constexpr double kShiftCap = 40;

// factor * value[index], or just `factor` when value is null: a learned scalar or a constant.
struct Coefficient {
  const Tensor* value = nullptr;  // master
  int64_t index = 0;
  double factor = 1.0;
};

// How the elements of a tensor are drawn: all `a`; normal with mean a and deviation b; uniform in [a, b).
struct Distribution {
  enum Kind { constant, normal, uniform } kind = constant;
  double a = 0, b = 0;
};

// One parameter with everything its update reads and writes. All master dtype but `compute`.
struct UpdateSlot {
  Tensor grad = {}, value = {};  // the same shape
  Tensor first = {};             // AdamW: mean of the gradients; Muon: momentum; the parameter's shape
  // AdamW: mean of their squares, the parameter's shape; modern Muon: (rows, 1) for rows >= cols, else
  // (1, cols); classic Muon: undefined
  Tensor second = {};
  Tensor compute = {};  // bf16 or f16 copy of the value that the update refreshes, or undefined
  int64_t rates_row = 0;
};

// Slots that one launch walks through, with whatever tables the device wants. Made by Backend::plan_update.
class UpdatePlan {
 public:
  explicit UpdatePlan(std::vector<UpdateSlot> slots) : slots_(std::move(slots)) {}
  virtual ~UpdatePlan() = default;
  const std::vector<UpdateSlot>& slots() const { return slots_; }

 private:
  std::vector<UpdateSlot> slots_;
};

// Work recorded once and run again and again on the same memory. It must not outlive its backend, and tensors
// made before the recording that it uses must outlive it. What the recording allocated stays the graph's own.
class StepGraph {
 public:
  virtual ~StepGraph() = default;
  virtual void replay() = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  virtual Arena& arena() = 0;  // the device's memory; host() tells whether the CPU can read it
  virtual DType master_dtype() const = 0;
  // Rows of activations that an op working in chunks takes at a time: few enough to stay in cache where that
  // pays, many enough for products to run at full rate.
  virtual int64_t chunk_rows() const = 0;

  // ---- memory ---------------------------------------------------------------------------------------
  // Same numel, converts dtypes. Either may be in host memory whatever the device; a copy from host memory
  // has read it, and one to host memory has arrived, when the call returns.
  virtual void copy(const Tensor& source, const Tensor& out) = 0;
  virtual void fill(const Tensor& out, double value) = 0;

  // Element i from the words of Philox stream (seed, stream) that an Rng would have drawn for it
  // (base/rng.h): a normal takes four words, a uniform two. Bits are the same on every device, normals to a
  // few ulps of f64.
  virtual void draw(const Distribution& distribution, uint64_t seed, uint64_t stream, const Tensor& out) = 0;

  // out (1) f64 += the sum of x, in double and a fixed order.
  virtual void add_sum(const Tensor& x, const Tensor& out) = 0;

  // rows (batch, tokens, width) from one buffer to another of the same dtype; width is the number of elements
  // and must not exceed either token stride.
  virtual void copy_rows(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                         const HeadsView& to) = 0;

  // ---- products -------------------------------------------------------------------------------------
  // out (M, N) = op(a) (M, K) * op(b) (K, N) + beta * out; any mix of float dtypes, f32 accumulation.
  virtual void matmul(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                      const Tensor& out) = 0;
  // The same for every i of a first dimension: out[i] = op(a[i]) * op(b[i]) + beta * out[i].
  virtual void matmul_batched(const Tensor& a,  // (n, M, K), or (n, K, M) to be transposed
                              Trans trans_a,
                              const Tensor& b,  // (n, K, N), or (n, N, K)
                              Trans trans_b, double beta,
                              const Tensor& out)  // (n, M, N)
      = 0;
  // ---- embedding and norms --------------------------------------------------------------------------
  // RMSNorm: y = x * rstd, rstd = 1/sqrt(mean(x^2) + 2^-23) over the last dimension, no weight.
  virtual void rms_norm(const Tensor& x,     // (N, C) act
                        const Tensor& y,     // (N, C) act
                        const Tensor& rstd)  // (N) master
      = 0;
  // dx (N, C) [+]= rstd * (dy - y * mean(dy * y))
  virtual void rms_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& rstd, bool accumulate,
                                 const Tensor& dx) = 0;
  // y = rms_norm(table[ids])
  virtual void embed_norm(const Tensor& table,  // (Vp, C) master
                          const Tensor& ids,    // (N)
                          const Tensor& y,      // (N, C) act
                          const Tensor& rstd)   // (N) master
      = 0;
  // dtable[ids] += gradient of embed_norm, rows summed in token order
  virtual void embed_norm_backward(const Tensor& dy, const Tensor& table, const Tensor& ids,
                                   const Tensor& rstd, const Tensor& dtable) = 0;

  // ---- attention block ------------------------------------------------------------------------------
  // In place on the first n_heads heads of each row of x (B*T, row): rotate by -position (half split), then
  // RMSNorm over D, then times `scale`. Row n stands at position q_offset + n % T.
  virtual void rope_norm(const Tensor& x,          // (B, T, row) act, row >= n_heads * D
                         const Tensor& cos_table,  // (max_len, D/2) master
                         const Tensor& sin_table,  // (max_len, D/2) master
                         int64_t n_heads, int64_t q_offset, double scale,
                         const Tensor& rstd)  // (B*T, n_heads) master
      = 0;
  // In place on dx: gradient with respect to the input of rope_norm; y is its output.
  virtual void rope_norm_backward(const Tensor& y, const Tensor& cos_table, const Tensor& sin_table,
                                  int64_t n_heads, int64_t q_offset, double scale, const Tensor& rstd,
                                  const Tensor& dx) = 0;
  // Value embedding (modern): v += gate * ve[id], gate = 3 * sigmoid(gate_weight . h[:channels]).
  // v are the last G*D columns of qkv (N, row).
  virtual void value_gate(const Tensor& table,        // (Vp, G*D) master
                          const Tensor& ids,          // (N)
                          const Tensor& h,            // (N, C) act
                          const Tensor& gate_weight,  // (G, channels) master
                          const Tensor& qkv,          // (N, row) act, in place
                          const Tensor& gate)         // (N, G) master
      = 0;
  // dtable, dgate_weight +=; dh += on its first `channels` columns.
  virtual void value_gate_backward(const Tensor& dqkv, const Tensor& table, const Tensor& ids,
                                   const Tensor& h, const Tensor& gate_weight, const Tensor& gate,
                                   const Tensor& dtable, const Tensor& dgate_weight, const Tensor& dh) = 0;
  // Checks shape and spec, chooses a kernel that can do them, and prepares it. `kernel` is "auto" or a name
  // from attention_kernels(); one that cannot do the case is an error that says why.
  virtual std::shared_ptr<const AttentionPlan> plan_attention(const AttentionShape& shape,
                                                              const AttentionSpec& spec,
                                                              std::string_view kernel = "auto") = 0;
  virtual std::vector<std::string> attention_kernels() const = 0;
  // Writes out, and lse when given. Queries that see nothing get 0 and -inf.
  virtual void attention(const AttentionPlan& plan, const AttentionTensors& x) = 0;
  // Needs out and lse of the forward. Deterministic: every sum has a fixed order. No pages.
  virtual void attention_backward(const AttentionPlan& plan, const AttentionTensors& x,
                                  const AttentionGradients& grads) = 0;

  // ---- element-wise ---------------------------------------------------------------------------------
  // y = max(u, 0)^2
  virtual void relu_squared(const Tensor& u, const Tensor& y) = 0;
  // dy becomes du = 2 max(u,0) dy and u becomes relu(u)^2, both in place: one pass serves the two products.
  virtual void relu_squared_backward(const Tensor& u, const Tensor& dy) = 0;
  // out = a*x + b*y
  virtual void mix(const Coefficient& a, const Tensor& x, const Coefficient& b, const Tensor& y,
                   const Tensor& out) = 0;
  // dx = a*dout or += (likewise dy); da[index] += factor * sum(dout*x) when da is given (likewise db).
  virtual void mix_backward(const Tensor& dout, const Coefficient& a, const Tensor& x, const Coefficient& b,
                            const Tensor& y, bool accumulate_dx, const Tensor& dx, bool accumulate_dy,
                            const Tensor& dy, const Tensor* da, const Tensor* db) = 0;
  // Smear (modern): gate_t = lambda * sigmoid(weight . e_t[:channels]); out_t = e_t + gate_t * e_{t-1}.
  // Row 0 uses `previous` (B, C) when given and T == 1, otherwise stays e_0.
  virtual void smear(const Tensor& e,         // (B, T, C) act
                     const Tensor* previous,  // (B, C) act or null
                     const Tensor& weight,    // (1, channels) master
                     const Tensor& lambda,    // (1) master
                     const Tensor& out,       // (B, T, C) act
                     const Tensor& sigmoid)   // (B, T) master: the sigmoid, for backward
      = 0;
  // de overwritten; dweight, dlambda +=.
  virtual void smear_backward(const Tensor& dout, const Tensor& e, const Tensor& weight, const Tensor& lambda,
                              const Tensor& sigmoid, const Tensor& de, const Tensor& dweight,
                              const Tensor& dlambda) = 0;

  // ---- head and loss --------------------------------------------------------------------------------
  // z = cap * tanh(z / cap) in place; cap <= 0: unchanged.
  virtual void softcap(const Tensor& z, double cap) = 0;
  // out[n] = the index of the largest of x[n], the first of equals; -1 for a row of NaN alone. A row that
  // mixes numbers and NaN gives any index.
  virtual void argmax(const Tensor& x,    // (N, V) master
                      const Tensor& out)  // (N) i32
      = 0;
  // With z = softcap(logits): nll[n] = logsumexp(z[n]) - z[n, target[n]], 0 where target < 0.
  // When grad is given: grad = weight * d nll / d logits (rows with target < 0 are 0); it may be logits
  // itself.
  virtual void cross_entropy(const Tensor& logits,   // (N, V) master; overwritten
                             const Tensor& targets,  // (N)
                             double cap, double weight,
                             const Tensor& nll,   // (N) master
                             const Tensor* grad)  // (N, V) act or null
      = 0;
  // Softmax over rows whose logits come in panels of columns (the online softmax of Milakov and Gimelshein
  // 2018): `first` is the column of the vocabulary that a panel begins with, ascending from 0, which starts
  // anew. With z = softcap(logits); rows.shift is cap if 0 < cap <= kShiftCap, else the largest z so far.
  // `unscaled`, for such caps only, gets exp(z - cap) * dz/dlogits in its columns [first, first + columns),
  // 0 in rows with target < 0: the gradient of the LSE but for a factor a row that the last panel tells.
  virtual void softmax_panel(const Tensor& logits,   // (N, columns) master
                             const Tensor& targets,  // (N)
                             int64_t first, double cap, const SoftmaxRows& rows,
                             const Tensor* unscaled)  // (N, V) bf16, master or null
      = 0;
  // After the last panel: lse = shift + log(sum); nll = lse - z[target], 0 where target < 0.
  virtual void softmax_nll(const SoftmaxRows& rows, const Tensor& targets,
                           const Tensor& lse,  // (N) master
                           const Tensor& nll)  // (N) master
      = 0;
  // Completes `unscaled` at the targets, so that factor[n] * unscaled[n] is weight * d nll / d logits.
  virtual void softmax_factor(const SoftmaxRows& rows, const Tensor& lse, const Tensor& targets, double cap,
                              double weight, const Tensor& unscaled,
                              const Tensor& factor)  // (N) master
      = 0;
  // grad = weight * d nll / d logits of one panel, exp(z - lse) less 1 at the target, times dz/dlogits; rows
  // with target < 0 are 0. It may be logits itself. filter > 0 (host devices only): returns false, with
  // nothing written, when no |d nll / d logits| of the panel reaches it; otherwise true.
  virtual bool softmax_gradient(const Tensor& logits,   // (N, columns) master
                                const Tensor& targets,  // (N)
                                int64_t first, double cap, double weight,
                                const Tensor& lse,  // (N) master
                                double filter,
                                const Tensor& grad)  // (N, columns) act
      = 0;
  // out[n] = factor[n] * x[n]
  virtual void row_scale(const Tensor& x,       // (N, C) any float dtype
                         const Tensor& factor,  // (N) master
                         const Tensor& out)     // (N, C) act
      = 0;
  // A device may have its products hand their sums to softmax before they are written. Temporary bytes that
  // linear_softmax takes for each row; below 0: neither it nor linear_softmax_gradient is there for these.
  virtual int64_t linear_softmax_bytes(DType /*act*/, int64_t /*c*/, int64_t /*vocab*/,
                                       double /*cap*/) const {
    return -1;
  }
  // softmax_panel of the logits x w^T, all columns at once and without argmax.
  virtual void linear_softmax(const Tensor& /*x*/,        // (N, C) act
                              const Tensor& /*w*/,        // (V, C) act
                              const Tensor& /*targets*/,  // (N)
                              double /*cap*/, const SoftmaxRows& /*rows*/,
                              const Tensor* /*unscaled*/)  // (N, V) act or null
  {
    fail("{} has no linear_softmax", name());
  }
  // softmax_gradient of the logits x w^T of a panel, its columns a multiple of 8.
  virtual void linear_softmax_gradient(const Tensor& /*x*/,        // (N, C) act
                                       const Tensor& /*w*/,        // (columns, C) act
                                       const Tensor& /*targets*/,  // (N)
                                       int64_t /*first*/, double /*cap*/, double /*weight*/,
                                       const Tensor& /*lse*/,   // (N) master
                                       const Tensor& /*grad*/)  // (N, columns) act
  {
    fail("{} has no linear_softmax_gradient", name());
  }

  // ---- optimizers -----------------------------------------------------------------------------------
  // Rates, and what the gradients' norm decides, are read from `rates` (backend/update_rates.h) on the
  // device: everything here but plan_update and first_nonfinite can be captured in a graph. When row 0 says
  // `skip`, parameters, their compute copies and moments keep every bit. Gradients are multiplied by row 0's
  // factor as they are read; in memory they stay as they are.
  //
  // Uploads the tables of slots. The plan shares the slots' storage.
  virtual std::shared_ptr<const UpdatePlan> plan_update(std::vector<UpdateSlot> slots) {
    return std::make_shared<UpdatePlan>(std::move(slots));
  }
  virtual void zero_grads(const UpdatePlan& plan) = 0;
  // Writes norm, factor and skip of row 0 from the gradients of all slots; sums have a fixed order.
  virtual void grad_norm(const UpdatePlan& plan, const Tensor& rates) = 0;
  virtual void adamw(const UpdatePlan& plan, const Tensor& rates) = 0;

  // Muon works on a stack x (n, rows, cols), one matrix for each slot of a plan whose parameters are all
  // (rows, cols), in the dtype of its iterations. squares (n, rows) master: sums of squares of x's rows.
  // momentum = lerp(momentum, grad, 1-mu); x = lerp(grad, momentum, mu)   (Nesterov)
  virtual void muon_momentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                             const Tensor& squares) = 0;
  // MuonEq: every row of a matrix gets their root mean square norm. squares_out: of the new rows.
  virtual void muon_equalize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) = 0;
  // Each matrix /= factor * |matrix| + eps (Frobenius), every operation rounded to x's dtype.
  virtual void muon_normalize(const Tensor& x, const Tensor& squares, double factor, double eps) = 0;
  // out += factor * x, of one dtype, the product rounded to it first where that is 16 bits.
  virtual void add_product(double factor, const Tensor& x, const Tensor& out) = 0;
  // One step on a stack: out = a x + (b A + c A A) x with A = x x^T, or the same of the transposes when rows
  // > cols. Here every operation rounds, in classic nanochat's order, (c A) A: in bf16 it decides the last
  // bits, and small singular values amplify those. Devices may round less often in 16 bits.
  virtual void muon_step(const Quintic& q, const Tensor& x,
                         const Tensor& gram,        // (n, side, side) with the shorter side, overwritten
                         const Tensor& polynomial,  // the same
                         const Tensor& out) {
    const bool tall = x.dim(1) > x.dim(2);
    const Trans first = tall ? Trans::yes : Trans::no, second = tall ? Trans::no : Trans::yes;
    matmul_batched(x, first, x, second, 0, gram);
    const Tensor scaled = empty(gram.shape(), gram.dtype());
    axpby(q.c, gram, 0, scaled);
    matmul_batched(scaled, Trans::no, gram, Trans::no, 0, polynomial);
    add_product(q.b, gram, polynomial);
    if (tall) {
      matmul_batched(x, Trans::no, polynomial, Trans::yes, 0, out);
    } else {
      matmul_batched(polynomial, Trans::no, x, Trans::no, 0, out);
    }
    add_product(q.a, x, out);
  }
  // Muon+ and the variance reduction as one factor for each index of a matrix's longer side (rows if equal):
  // Muon+ gives a matrix the norm sqrt(q), q its shorter side. With v the mean squares over the shorter side
  // after that: second = lerp(second, v, 1-beta2), and factor = max(second, 1e-10)^(-1/2) times what keeps
  // the norm.
  virtual void muon_variance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                             const Tensor& factors)  // (n, max(rows, cols)) master
      = 0;
  // u = x * factor (x without factors), lr' = lr * sqrt(max(1, rows/cols)):
  // p -= lr' * u + lr' * weight_decay * p * [u*p >= 0]   (cautious decay)
  virtual void muon_update(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                           const Tensor* factors) = 0;
  // out = alpha*x + beta*out, any two float dtypes.
  virtual void axpby(double alpha, const Tensor& x, double beta, const Tensor& out) = 0;
  // Index of the first NaN or infinity, or -1. Waits for the device.
  virtual int64_t first_nonfinite(const Tensor& x) = 0;

  // ---- whole steps ----------------------------------------------------------------------------------
  // Waits until all work so far is done; throws what it did wrong.
  virtual void synchronize() {}
  // Records the kernels that `step` calls. Numbers that `step` passes by value stay as they are in every
  // replay; what shall change must come from memory. A device that can record calls `step` once, here, and
  // runs nothing before replay(); `step` must then not read from the device or copy to and from host memory,
  // which is an error. Others call `step` at every replay().
  virtual std::unique_ptr<StepGraph> capture(std::function<void()> step) {
    struct Again final : StepGraph {
      explicit Again(std::function<void()> s) : step(std::move(s)) {}
      void replay() override { step(); }
      std::function<void()> step;
    };
    return std::make_unique<Again>(std::move(step));
  }

  // A new tensor in this device's memory.
  Tensor empty(Shape shape, DType dtype) { return Tensor(arena(), std::move(shape), dtype); }
  Tensor zeros(Shape shape, DType dtype) {
    Tensor t = empty(std::move(shape), dtype);
    fill(t, 0);
    return t;
  }
  // x where the CPU can read it, or where the device can: x itself if it is there already.
  Tensor to_host(const Tensor& x) { return x.arena().host() ? x : moved(x, host_arena()); }
  Tensor to_device(const Tensor& x) { return &x.arena() == &arena() ? x : moved(x, arena()); }
  Tensor clone(const Tensor& x) {
    Tensor t = empty(x.shape(), x.dtype());
    copy(x, t);
    return t;
  }

 private:
  Tensor moved(const Tensor& x, Arena& to) {
    const Tensor t(to, x.shape(), x.dtype());
    copy(x, t);
    return t;
  }
};

std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_reference_backend();

// By the name users type: "cpu", "reference", "cuda" (its device 0) or "cuda:N"; an unknown one is an error
// that lists them, and so is a CUDA device that cannot be used, with the reason.
std::unique_ptr<Backend> make_backend(std::string_view name);

}  // namespace flexchat
