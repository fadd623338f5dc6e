// The oracle: every kernel as the plainest loop over double. Slow and obvious on purpose; all tensors it
// gets must be f64 (ids i32). Files mirror src/backend/cpu.
#pragma once

#include "backend/backend.h"

namespace flexchat {

// Of an attention's scores (ReferenceBackend::score_sizes).
struct ScoreSizes {
  double score = 0, rounded = 0;
};

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  Arena& arena() override { return host_arena(); }
  DType master_dtype() const override { return DType::f64; }
  int64_t chunk_rows() const override { return 1024; }
  void copy(const Tensor& source, const Tensor& out) override;
  void add_sum(const Tensor& x, const Tensor& out) override;
  void copy_rows(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                 const HeadsView& to) override;
  void fill(const Tensor& out, double value) override;
  void draw(const Distribution& distribution, uint64_t seed, uint64_t stream, const Tensor& out) override;
  void matmul(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
              const Tensor& out) override;
  void matmul_batched(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                      const Tensor& out) override;
  void rms_norm(const Tensor& x, const Tensor& y, const Tensor& rstd) override;
  void rms_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& rstd, bool accumulate,
                         const Tensor& dx) override;
  void embed_norm(const Tensor& table, const Tensor& ids, const Tensor& y, const Tensor& rstd) override;
  void embed_norm_backward(const Tensor& dy, const Tensor& table, const Tensor& ids, const Tensor& rstd,
                           const Tensor& dtable) override;
  void rope_norm(const Tensor& x, const Tensor& cos_table, const Tensor& sin_table, int64_t n_heads,
                 int64_t q_offset, double scale, const Tensor& rstd) override;
  void rope_norm_backward(const Tensor& y, const Tensor& cos_table, const Tensor& sin_table, int64_t n_heads,
                          int64_t q_offset, double scale, const Tensor& rstd, const Tensor& dx) override;
  void value_gate(const Tensor& table, const Tensor& ids, const Tensor& h, const Tensor& gate_weight,
                  const Tensor& qkv, const Tensor& gate) override;
  void value_gate_backward(const Tensor& dqkv, const Tensor& table, const Tensor& ids, const Tensor& h,
                           const Tensor& gate_weight, const Tensor& gate, const Tensor& dtable,
                           const Tensor& dgate_weight, const Tensor& dh) override;
  std::shared_ptr<const AttentionPlan> plan_attention(const AttentionShape& shape, const AttentionSpec& spec,
                                                      std::string_view kernel) override;
  std::vector<std::string> attention_kernels() const override;
  void attention(const AttentionPlan& plan, const AttentionTensors& x) override;
  void attention_backward(const AttentionPlan& plan, const AttentionTensors& x,
                          const AttentionGradients& grads) override;
  // What rounding can do to a result. Of each gradient, the sum of the sizes of the terms that it is the sum
  // of: where they cancel, no arithmetic is precise relative to what is left.
  void attention_term_sizes(const AttentionPlan& plan, const AttentionTensors& x,
                            const AttentionGradients& sizes);
  // Of scores whose weight is not negligible, mods included, the largest size, and the largest sum of sizes
  // of what is rounded on the way: the product of q and k, every result inside the mod, and the LSE. Scores
  // are exponents, so that their absolute rounding is the weight's relative one. x.lse must be that of the
  // forward.
  ScoreSizes score_sizes(const AttentionPlan& plan, const AttentionTensors& x);
  void relu_squared(const Tensor& u, const Tensor& y) override;
  void relu_squared_backward(const Tensor& u, const Tensor& dy) override;
  void mix(const Coefficient& a, const Tensor& x, const Coefficient& b, const Tensor& y,
           const Tensor& out) override;
  void mix_backward(const Tensor& dout, const Coefficient& a, const Tensor& x, const Coefficient& b,
                    const Tensor& y, bool accumulate_dx, const Tensor& dx, bool accumulate_dy,
                    const Tensor& dy, const Tensor* da, const Tensor* db) override;
  void smear(const Tensor& e, const Tensor* previous, const Tensor& weight, const Tensor& lambda,
             const Tensor& out, const Tensor& sigmoid) override;
  void smear_backward(const Tensor& dout, const Tensor& e, const Tensor& weight, const Tensor& lambda,
                      const Tensor& sigmoid, const Tensor& de, const Tensor& dweight,
                      const Tensor& dlambda) override;
  void argmax(const Tensor& x, const Tensor& out) override;
  void softcap(const Tensor& z, double cap) override;
  void cross_entropy(const Tensor& logits, const Tensor& targets, double cap, double weight,
                     const Tensor& nll, const Tensor* grad) override;
  void softmax_panel(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                     const SoftmaxRows& rows, const Tensor* unscaled) override;
  void softmax_nll(const SoftmaxRows& rows, const Tensor& targets, const Tensor& lse,
                   const Tensor& nll) override;
  void softmax_factor(const SoftmaxRows& rows, const Tensor& lse, const Tensor& targets, double cap,
                      double weight, const Tensor& unscaled, const Tensor& factor) override;
  bool softmax_gradient(const Tensor& logits, const Tensor& targets, int64_t first, double cap, double weight,
                        const Tensor& lse, double filter, const Tensor& grad) override;
  void row_scale(const Tensor& x, const Tensor& factor, const Tensor& out) override;
  void zero_grads(const UpdatePlan& plan) override;
  void grad_norm(const UpdatePlan& plan, const Tensor& rates) override;
  void adamw(const UpdatePlan& plan, const Tensor& rates) override;
  void muon_momentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                     const Tensor& squares) override;
  void muon_equalize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) override;
  void muon_normalize(const Tensor& x, const Tensor& squares, double factor, double eps) override;
  void add_product(double factor, const Tensor& x, const Tensor& out) override;
  void muon_variance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                     const Tensor& factors) override;
  void muon_update(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                   const Tensor* factors) override;
  void axpby(double alpha, const Tensor& x, double beta, const Tensor& out) override;
  int64_t first_nonfinite(const Tensor& x) override;
};

}  // namespace flexchat
