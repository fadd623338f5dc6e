// NVIDIA GPUs from sm_80 on: cuBLASLt for products, our own kernels for everything else. Built into a shared
// library of its own, which the program loads when it is there (backend/cuda_loader.h).
#pragma once

#include <chrono>

#include "backend/backend.h"
#include "backend/cuda/runtime.h"
#include "backend/profile.h"

namespace flexchat::cuda {

class Products;  // matrix products by cuBLASLt (products.h)
class Staging;   // transfers through pinned memory (staging.h)

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int ordinal);
  ~CudaBackend() override;
  Context& context() { return context_; }
  std::string_view name() const override { return "cuda"; }
  Arena& arena() override { return context_.arena(); }
  DType master_dtype() const override { return DType::f32; }
  // Bounds temporaries. Fewer would do for full products, but each chunk reads and writes the gradients of
  // weights once more.
  int64_t chunk_rows() const override { return 65536; }
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
  void synchronize() override { context_.synchronize(); }
  std::unique_ptr<StepGraph> capture(std::function<void()> step) override;
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
  int64_t linear_softmax_bytes(DType act, int64_t c, int64_t vocab, double cap) const override;
  void linear_softmax(const Tensor& x, const Tensor& w, const Tensor& targets, double cap,
                      const SoftmaxRows& rows, const Tensor* unscaled) override;
  void linear_softmax_gradient(const Tensor& x, const Tensor& w, const Tensor& targets, int64_t first,
                               double cap, double weight, const Tensor& lse, const Tensor& grad) override;
  std::shared_ptr<const UpdatePlan> plan_update(std::vector<UpdateSlot> slots) override;
  void zero_grads(const UpdatePlan& plan) override;
  void grad_norm(const UpdatePlan& plan, const Tensor& rates) override;
  void adamw(const UpdatePlan& plan, const Tensor& rates) override;
  void muon_momentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                     const Tensor& squares) override;
  void muon_equalize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) override;
  void muon_normalize(const Tensor& x, const Tensor& squares, double factor, double eps) override;
  void add_product(double factor, const Tensor& x, const Tensor& out) override;
  void muon_step(const Quintic& q, const Tensor& x, const Tensor& gram, const Tensor& polynomial,
                 const Tensor& out) override;
  void muon_variance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                     const Tensor& factors) override;
  void muon_update(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                   const Tensor* factors) override;
  void axpby(double alpha, const Tensor& x, double beta, const Tensor& out) override;
  int64_t first_nonfinite(const Tensor& x) override;

 private:
  Staging& staging();  // made at the first use
  // Around everything a profiled backend does (backend/profile.h). Measures the device's peaks first.
  void start_profile();
  void stop_profile();  // leaves what was found in add_profile()

  Context context_;
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<Products> products_;
  std::unique_ptr<DeviceProfile> profile_;  // of what runs now; null: none
  std::chrono::steady_clock::time_point profile_start_;
};

}  // namespace flexchat::cuda
