// The optimizers of the two architectures: AdamW for embeddings, head and scalars, Muon for the matrices of
// the blocks. Parameters fall into groups by name and shape; every group has its own rate and constants.
//   classic  lm_head | wte | block matrices
//   modern   lm_head | wte | value_embeds | resid_lambdas | x0_lambdas | smear and backout | block matrices,
//   one
//            group per shape, shapes ascending
// The same parameters, gradients, rates and state give the same bits.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "grad/parameter.h"
#include "models/config.h"

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
  double weight_decay = 0;  // AdamW; Muon's is an argument of step()
  std::vector<OptimizerSlot> slots;
};

class Optimizer {
 public:
  // The parameters must outlive the optimizer. State is allocated here, zero. Errors: a parameter that no
  // group takes, none at all, or a muon_dtype the backend cannot iterate in.
  Optimizer(Backend& backend, const std::vector<Parameter*>& params, const OptimizerConfig& config);

  // One update of every parameter from its gradient. muon_weight_decay: modern only, 0 for classic.
  void step(double lr_multiplier, double muon_momentum, double muon_weight_decay);
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
  void add_slot(OptimizerGroup& group, Parameter* param);

  Backend& backend_;
  OptimizerConfig config_;
  std::vector<OptimizerGroup> groups_;
  int64_t steps_ = 0;
};

}  // namespace flexchat
