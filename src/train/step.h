// One optimizer step as work on the device: the batches go into fixed buffers, the loss is summed there, and
// on a device that can record (CUDA) the kernels of a step are recorded once and replayed, so that the host
// launches one graph where there were thousands of kernels.
//
//   step.begin();
//   for each micro batch but the last: step.add(ids, targets)
//   step.finish(ids, targets, rates...)        the last micro batch, and the update
//   step.result()                              waits for the device
//
// The first step runs kernel by kernel: it compiles, tunes and allocates. The second records. What changes
// from step to step comes from memory: ids, rates, the number of steps done.
#pragma once

#include <memory>
#include <vector>

#include "models/gpt.h"
#include "optim/optimizer.h"

namespace flexchat {

struct StepRates {
  double lr_multiplier = 1, muon_momentum = 0.95, muon_weight_decay = 0;
  GradientLimits limits;
};

class TrainStep {
 public:
  // `graph`: record and replay where the device can.
  TrainStep(Gpt& model, Optimizer& optimizer, int64_t batch, int64_t sequence_len, int64_t micro_batches,
            bool graph);

  void begin();
  // ids and targets (B, T) i32 in host memory, all below the vocabulary; targets below 0 are ignored.
  // Gradients are those of loss_scale * mean loss over all micro batches.
  void add(const Tensor& ids, const Tensor& targets, double loss_scale = 1);
  void finish(const Tensor& ids, const Tensor& targets, const StepRates& rates);

  struct Result {
    double loss = 0;       // mean over the step's tokens, in nats
    double grad_norm = 0;  // before the limit
    bool skipped = false;  // gradients that are not numbers: nothing was updated
  };
  Result result();

  bool replays() const { return last_ != nullptr; }

 private:
  void load(const Tensor& ids, const Tensor& targets, double loss_scale);
  void forward_backward();
  void run(std::unique_ptr<StepGraph>& graph, const std::function<void()>& work);

  Gpt& model_;
  Optimizer& optimizer_;
  Backend& backend_;
  int64_t batch_, sequence_len_, micro_batches_;
  bool graph_, warm_ = false;
  double loss_scale_ = 1;
  std::vector<AttentionPlanPtr> plans_;      // recorded kernels point into them
  Tensor ids_, targets_, loss_;              // (B, T) i32, (1) f64: the sum over tokens
  std::unique_ptr<StepGraph> micro_, last_;  // forward and backward; the same and the update
};

}  // namespace flexchat
