// The optimizers of the two architectures: AdamW for embeddings, head and scalars, Muon for the matrices of
// the blocks. Parameters fall into groups by name and shape; every group has its own rate and constants.
//   classic  lm_head | wte | block matrices
//   modern   lm_head | wte | value_embeds | resid_lambdas | x0_lambdas | smear and backout | block matrices,
//   one
//            group per shape, shapes ascending
// The same parameters, gradients, rates and state give the same bits.
//
// An update is kernels only: rates lie in the backend's memory, so that a captured graph of a training step
// can be replayed with new ones, and whether to skip it is decided on the device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "grad/parameter.h"
#include "models/config.h"
#include "optim/muon.h"

namespace flexchat {

struct OptimizerConfig {
  Arch arch = Arch::classic;
  int64_t n_embd = 768;  // embedding and unembedding rates are scaled by (n_embd/768)^(-1/2)
  double embedding_lr = 0.2;
  double unembedding_lr = 0.004;
  double matrix_lr = 0.02;
  double scalar_lr = 0.5;         // modern
  double adamw_weight_decay = 0;  // classic: lm_head and wte; modern has constants in its table
  // Of Muon's iterations: the backend's master dtype, or bf16 where that is f32.
  DType muon_dtype = DType::bf16;
  // Temporaries of Muon on a device, where those of forward and backward lay. In host memory matrices are
  // worked through one by one, for caches.
  int64_t muon_stack_bytes = int64_t{2048} << 20;

  // The rates a base training run starts from: the member defaults for classic; for modern embedding 0.3,
  // unembedding 0.008.
  static OptimizerConfig base_defaults(Arch arch, int64_t n_embd);
};

struct OptimizerSlot {
  Parameter* param = nullptr;
  Tensor first;   // AdamW: exp_avg; Muon: momentum_buffer
  Tensor second;  // AdamW: exp_avg_sq; modern Muon: second_momentum_buffer; classic Muon: undefined
};

struct OptimizerGroup {
  std::string name;  // "lm_head", "muon (64, 256)"
  bool muon = false;
  double lr = 0;  // before the schedule's multiplier
  double beta1 = 0, beta2 = 0, eps = 0;
  double weight_decay = 0;  // AdamW; Muon's is an argument of set_rates()
  std::vector<OptimizerSlot> slots;
};

// What an update makes of the gradients before it uses them.
struct GradientLimits {
  double max_norm = 0;    // gradients whose norm is above are scaled down to it; none when <= 0
  double loss_scale = 1;  // they are divided by it first
};

class Optimizer {
 public:
  // The parameters must outlive the optimizer. State is allocated here, zero. Errors: a parameter that no
  // group takes, none at all, or a muon_dtype the backend cannot iterate in.
  Optimizer(Backend& backend, const std::vector<Parameter*>& params, const OptimizerConfig& config);

  // Begins the next step: writes its rates to the device and makes ready what update() launches. Not for
  // capture. Errors: a parameter without a fitting gradient, a classic muon_weight_decay other than 0.
  void set_rates(double lr_multiplier, double muon_momentum, double muon_weight_decay,
                 const GradientLimits& limits = {});
  // One update of every parameter and its compute copy from its gradient, with the latest rates. Kernels
  // only. Gradients whose norm is NaN or infinite change nothing at all: see result().
  void update();
  // Both.
  void step(double lr_multiplier, double muon_momentum, double muon_weight_decay,
            const GradientLimits& limits = {});
  // What the latest update found. Waits for the device. A skipped step is not counted.
  struct Result {
    double grad_norm = 0;  // over all parameters, divided by the loss scale, before max_norm
    bool skipped = false;
  };
  Result result();
  // Every gradient becomes 0, in one launch where the device can; before a fresh pass (Tape::set_fresh) only
  // those that it adds to. Kernels only after the first set_rates().
  void zero_grad(bool fresh_pass = false);
  int64_t steps_done() const { return steps_; }

  // Groups in the order above; rates and constants may be changed between steps.
  std::vector<OptimizerGroup>& groups() { return groups_; }
  const std::vector<OptimizerGroup>& groups() const { return groups_; }
  void set_lr(double lr);  // of every group: what the ordinal scheduler asks for

  // Every state tensor under "<parameter>.<exp_avg|exp_avg_sq|momentum_buffer|second_momentum_buffer>", and
  // "step" (1) i64 in host memory: in group order, sharing storage. Rates are not state.
  using NamedTensors = std::vector<std::pair<std::string, Tensor>>;
  NamedTensors state() const;
  // Restores what state() gave. `find` returns a host tensor by name, undefined when there is none. Nothing
  // is changed unless everything fits: Error names the first tensor that is missing or has another shape or
  // dtype.
  void load_state(const std::function<Tensor(const std::string& name)>& find);
  // As if just constructed: all moments zero, step count 0 (an ordinal restart).
  void clear_state();

 private:
  // The slots of all groups with tables on the device, for parameters as they are.
  struct Plans {
    std::shared_ptr<const UpdatePlan> all, adamw;  // adamw: null when there is none
    std::shared_ptr<const UpdatePlan> added_to;    // those whose gradient a fresh pass adds to
    std::vector<Muon> muon;                        // one for each shape
  };
  void add_slot(OptimizerGroup& group, Parameter* param);
  std::vector<UpdateSlot> group_slots(size_t group) const;
  void prepare();  // builds plans_ when there are none or a parameter's tensors are others
  bool plans_are_current() const;

  Backend& backend_;
  OptimizerConfig config_;
  std::vector<OptimizerGroup> groups_;
  Plans plans_;
  Tensor rates_, host_rates_;  // (1 + groups, kRatesPerRow) f64: see backend/update_rates.h
  int64_t steps_ = 0;          // set_rates() calls whose updates were not found to be skipped
  bool result_read_ = true;    // of the latest step
};

}  // namespace flexchat
