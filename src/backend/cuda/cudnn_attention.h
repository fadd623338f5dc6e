// The attention of cuDNN, NVIDIA's own kernels, as a baseline: forward and backward of plain attention
// through its graph API. What it can do stands in backend/attention_support.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace flexchat::cuda {

class CudaBackend;

class CudnnAttentionPlan : public AttentionPlan {
 public:
  using AttentionPlan::AttentionPlan;
  std::string_view kernel() const override { return "cudnn"; }
  virtual void forward(CudaBackend& backend, const AttentionTensors& x) const = 0;
  virtual void backward(CudaBackend& backend, const AttentionTensors& x,
                        const AttentionGradients& grads) const = 0;
};

// Errors: there is no cuDNN or one older than the headers of this build, what the kernel does not do.
std::shared_ptr<const CudnnAttentionPlan> plan_cudnn_attention(CudaBackend& backend,
                                                               const AttentionShape& shape,
                                                               const AttentionSpec& spec);

}  // namespace flexchat::cuda
