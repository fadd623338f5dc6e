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
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/arena.h"
#include "base/tensor.h"

namespace flexchat {

enum class Trans : bool { no, yes };

// A view of per-head vectors (B, T, heads, D) inside a larger buffer; strides in elements, D contiguous,
// heads D apart.
struct HeadsView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
};

// The view of a tensor (B, T, row) that starts `offset` elements into every row.
inline HeadsView heads_view(const Tensor& x, int64_t offset = 0) {
  return {static_cast<char*>(x.data()) + offset * dtype_size(x.dtype()), x.dtype(), x.dim(1) * x.dim(2),
          x.dim(2)};
}

struct AttentionShape {
  int64_t batch = 0, q_len = 0, kv_len = 0;
  int64_t n_head = 0, n_kv_head = 0, head_dim = 0;
  // Query row r stands at position q_offset + r, key j at position j. Key j is visible to position i iff
  // 0 <= i - j, and i - j <= window when window >= 0.
  int64_t q_offset = 0;
  int64_t window = -1;
  double scale = 1.0;  // scores are scale * q.k
};

// factor * value[index], or just `factor` when value is null: a learned scalar or a constant.
struct Coefficient {
  const Tensor* value = nullptr;  // master
  int64_t index = 0;
  double factor = 1.0;
};

struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // from 1
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  virtual Arena& arena() = 0;
  virtual DType master_dtype() const = 0;

  // ---- memory ---------------------------------------------------------------------------------------
  virtual void copy(const Tensor& source, const Tensor& out) = 0;  // same numel, converts dtypes
  virtual void fill(const Tensor& out, double value) = 0;

  // rows (batch, tokens, width) from one buffer to another of the same dtype; width is the number of elements
  // and must not exceed either token stride.
  virtual void copy_rows(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                         const HeadsView& to) = 0;

  // ---- products -------------------------------------------------------------------------------------
  // out (M, N) = op(a) (M, K) * op(b) (K, N) + beta * out; any mix of float dtypes, f32 accumulation.
  virtual void matmul(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                      const Tensor& out) = 0;

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
  // out = softmax(mask(scale * q k^T)) v; lse (B, H, Tq) master (natural log, -inf for rows that see nothing;
  // their out is 0). Query head h reads key head h / (H/G).
  virtual void attention(const AttentionShape& shape, const HeadsView& q, const HeadsView& k,
                         const HeadsView& v, const HeadsView& out, const Tensor* lse) = 0;
  // dq, dk, dv overwritten. Deterministic: every sum has a fixed order.
  virtual void attention_backward(const AttentionShape& shape, const HeadsView& q, const HeadsView& k,
                                  const HeadsView& v, const HeadsView& out, const HeadsView& dout,
                                  const Tensor& lse, const HeadsView& dq, const HeadsView& dk,
                                  const HeadsView& dv) = 0;

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
  // out[n] = the index of the largest of x[n], the first of equals; -1 for a row of NaN alone. A row that mixes
  // numbers and NaN gives any index.
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

  // ---- optimizers (all tensors master, updated in place) --------------------------------------------
  // p *= 1 - lr*wd; m = lerp(m, g, 1-beta1); v = lerp(v, g^2, 1-beta2);
  // p -= lr/(1-beta1^t) * m / (sqrt(v/(1-beta2^t)) + eps)
  virtual void adamw(const AdamWStep& step, const Tensor& grad, const Tensor& param, const Tensor& m,
                     const Tensor& v) = 0;
  // buffer = lerp(buffer, grad, 1-momentum); out = lerp(grad, buffer, momentum)   (Nesterov)
  virtual void nesterov(double momentum, const Tensor& grad, const Tensor& buffer, const Tensor& out) = 0;
  // out[i] = sum_j x[i,j]^2 over the rows (axis 1) or columns (axis 0) of x (m, n), any float dtype.
  virtual void axis_sum_squares(const Tensor& x, int axis, const Tensor& out) = 0;
  // x[i,j] *= factor[i] (axis 1: one factor a row) or factor[j] (axis 0: one a column).
  virtual void axis_scale(const Tensor& x, int axis, const Tensor& factor) = 0;
  // out = alpha*x + beta*out
  virtual void axpby(double alpha, const Tensor& x, double beta, const Tensor& out) = 0;
  // p -= lr*g + lr*wd*p*[g*p >= 0]   (cautious decay)
  virtual void cautious_update(double lr, double weight_decay, const Tensor& g, const Tensor& param) = 0;
  // Sum of squares in double, summed in a fixed order.
  virtual double sum_squares(const Tensor& x) = 0;
  // Index of the first NaN or infinity, or -1.
  virtual int64_t first_nonfinite(const Tensor& x) = 0;

  // A new tensor in this device's memory.
  Tensor empty(Shape shape, DType dtype) { return Tensor(arena(), std::move(shape), dtype); }
  Tensor zeros(Shape shape, DType dtype) {
    Tensor t = empty(std::move(shape), dtype);
    fill(t, 0);
    return t;
  }
  Tensor clone(const Tensor& x) {
    Tensor t = empty(x.shape(), x.dtype());
    copy(x, t);
    return t;
  }
};

std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_reference_backend();

// By the name users type: "cpu" or "reference"; an unknown one is an error that lists them.
std::unique_ptr<Backend> make_backend(std::string_view name);

}  // namespace flexchat
