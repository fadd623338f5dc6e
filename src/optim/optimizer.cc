#include "optim/optimizer.h"

#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <string_view>

#include "base/error.h"
#include "optim/adamw.h"

namespace flexchat {
namespace {

constexpr double kEps = 1e-10;
constexpr double kModernBeta2 = 0.9;  // second momentum of Muon
constexpr const char* kStepName = "step";

// Which AdamW group takes a parameter name; `prefix` matches "name" itself and "name.<anything>".
struct AdamWRule {
  std::string group;
  std::vector<std::string> prefixes;
  double lr, beta1, beta2, weight_decay;
};

std::vector<AdamWRule> adamw_rules(const OptimizerConfig& c) {
  const double sigma = 1 / std::sqrt(static_cast<double>(c.n_embd) / 768);
  const double head = c.unembedding_lr * sigma, embedding = c.embedding_lr * sigma;
  if (c.arch == Arch::classic) {
    return {{"lm_head", {"lm_head"}, head, 0.8, 0.95, c.adamw_weight_decay},
            {"wte", {"transformer.wte"}, embedding, 0.8, 0.95, c.adamw_weight_decay}};
  }
  return {{"lm_head", {"lm_head"}, head, 0.8, 0.96, 0.01},
          {"wte", {"transformer.wte"}, embedding, 0.8, 0.995, 0.001},
          {"value_embeds", {"value_embeds"}, embedding * 0.5, 0.8, 0.995, 0.01},
          {"resid_lambdas", {"resid_lambdas"}, c.scalar_lr * 0.01, 0.8, 0.95, 0.05},
          {"x0_lambdas", {"x0_lambdas"}, c.scalar_lr, 0.96, 0.95, 0},
          {"smear and backout", {"smear_gate", "smear_lambda", "backout_lambda"}, 0.2, 0.8, 0.95, 0}};
}

bool matches(std::string_view name, std::string_view prefix) {
  return name == prefix || (name.starts_with(prefix) && name[prefix.size()] == '.');
}

const char* first_name(const OptimizerGroup& group) { return group.muon ? "momentum_buffer" : "exp_avg"; }
const char* second_name(const OptimizerGroup& group) {
  return group.muon ? "second_momentum_buffer" : "exp_avg_sq";
}

}  // namespace

OptimizerConfig OptimizerConfig::base_defaults(Arch arch, int64_t n_embd) {
  OptimizerConfig config;
  config.arch = arch;
  config.n_embd = n_embd;
  if (arch == Arch::modern) {
    config.embedding_lr = 0.3;
    config.unembedding_lr = 0.008;
  }
  return config;
}

Optimizer::Optimizer(Backend& backend, const std::vector<Parameter*>& params, const OptimizerConfig& config)
    : backend_(backend), config_(config) {
  check(!params.empty(), "an optimizer needs at least one parameter");
  const DType master = backend.master_dtype();
  check(config.muon_dtype == master || (config.muon_dtype == DType::bf16 && master == DType::f32),
        "Muon cannot iterate in {} on the {} backend; allowed: {}{}", dtype_name(config.muon_dtype),
        backend.name(), dtype_name(master), master == DType::f32 ? ", bf16" : "");
  const std::vector<AdamWRule> rules = adamw_rules(config);
  for (const AdamWRule& rule : rules) {
    groups_.push_back({rule.group, false, rule.lr, rule.beta1, rule.beta2, kEps, rule.weight_decay, {}});
  }
  std::map<Shape, OptimizerGroup> matrices;  // classic: all in one group, under the empty shape
  for (Parameter* param : params) {
    bool taken = false;
    for (size_t i = 0; i < rules.size() && !taken; ++i) {
      for (const std::string& prefix : rules[i].prefixes) taken = taken || matches(param->name, prefix);
      if (taken) add_slot(groups_[i], param);
    }
    if (taken) continue;
    const Shape& shape = param->value.shape();
    check(matches(param->name, "transformer.h") && shape.size() == 2,
          "no optimizer group of the {} architecture takes parameter '{}' {}", arch_name(config.arch),
          param->name, shape_string(shape));
    const bool modern = config.arch == Arch::modern;
    OptimizerGroup& group = matrices[modern ? shape : Shape{}];
    group.name = modern ? "muon " + shape_string(shape) : "muon";
    group.muon = true;
    group.lr = config.matrix_lr;
    group.beta2 = modern ? kModernBeta2 : 0;
    add_slot(group, param);
  }
  for (auto& [shape, group] : matrices) groups_.push_back(std::move(group));
  std::erase_if(groups_, [](const OptimizerGroup& group) { return group.slots.empty(); });
  const Shape shape = {std::ssize(groups_) + 1, kRatesPerRow};
  host_rates_ = Tensor::zeros(host_arena(), shape, DType::f64);
  rates_ = backend.zeros(shape, DType::f64);
}

void Optimizer::add_slot(OptimizerGroup& group, Parameter* param) {
  const Shape& shape = param->value.shape();
  OptimizerSlot slot;
  slot.param = param;
  slot.first = backend_.zeros(shape, backend_.master_dtype());
  if (!group.muon) {
    slot.second = backend_.zeros(shape, backend_.master_dtype());
  } else if (config_.arch == Arch::modern) {
    slot.second = backend_.zeros(second_momentum_shape(shape), backend_.master_dtype());
  }
  group.slots.push_back(std::move(slot));
}

std::vector<UpdateSlot> Optimizer::group_slots(size_t index) const {
  const OptimizerGroup& group = groups_[index];
  const auto row = static_cast<int64_t>(index) + 1;
  std::vector<UpdateSlot> slots;
  for (const OptimizerSlot& slot : group.slots) {
    slots.push_back(group.muon ? muon_slot(config_.arch, *slot.param, slot.first, slot.second, row)
                               : adamw_slot(*slot.param, slot.first, slot.second, row));
  }
  return slots;
}

bool Optimizer::plans_are_current() const {
  if (plans_.all == nullptr) return false;
  const auto same = [](const Tensor& a, const Tensor& b) {
    return a.data() == b.data() && a.shape() == b.shape() && a.dtype() == b.dtype();
  };
  size_t at = 0;
  for (const OptimizerGroup& group : groups_) {
    for (const OptimizerSlot& slot : group.slots) {
      const UpdateSlot& planned = plans_.all->slots()[at++];
      const Parameter& param = *slot.param;
      if (!same(planned.value, param.value) || !same(planned.grad, param.grad) ||
          !same(planned.compute, param.compute)) {
        return false;
      }
    }
  }
  return true;
}

void Optimizer::prepare() {
  if (plans_are_current()) return;
  std::vector<UpdateSlot> all, adamw, added_to;
  std::map<Shape, std::vector<UpdateSlot>> matrices;
  for (size_t i = 0; i < groups_.size(); ++i) {
    std::vector<UpdateSlot> slots = group_slots(i);
    for (size_t k = 0; k < slots.size(); ++k) {
      UpdateSlot& slot = slots[k];
      all.push_back(slot);
      if (!groups_[i].slots[k].param->by_product) added_to.push_back(slot);
      (groups_[i].muon ? matrices[slot.value.shape()] : adamw).push_back(std::move(slot));
    }
  }
  Plans plans;
  plans.all = backend_.plan_update(std::move(all));
  plans.added_to = backend_.plan_update(std::move(added_to));
  if (!adamw.empty()) plans.adamw = backend_.plan_update(std::move(adamw));
  const int64_t stack_bytes = backend_.arena().host() ? 0 : config_.muon_stack_bytes;
  for (auto& [shape, slots] : matrices) {
    plans.muon.emplace_back(backend_, config_.arch, config_.muon_dtype, std::move(slots), stack_bytes);
  }
  plans_ = std::move(plans);
}

void Optimizer::set_rates(double lr_multiplier, double muon_momentum, double muon_weight_decay,
                          const GradientLimits& limits) {
  check(config_.arch == Arch::modern || muon_weight_decay == 0,
        "classic Muon has no weight decay; it cannot use {}", muon_weight_decay);
  check(limits.loss_scale > 0, "the loss scale is {}; it must be above 0", limits.loss_scale);
  prepare();
  ++steps_;
  result_read_ = false;
  auto* row = host_rates_.as<double>();
  const auto write = [&row](const auto& rates) {
    std::memcpy(row, &rates, sizeof(rates));
    row += kRatesPerRow;
  };
  GradientRates gradients;
  gradients.unscale = 1 / limits.loss_scale;
  gradients.max_norm = limits.max_norm;
  write(gradients);
  for (const OptimizerGroup& group : groups_) {
    const double lr = group.lr * lr_multiplier;
    if (group.muon) {
      write(MuonRates{lr, muon_momentum, group.beta2, muon_weight_decay});
    } else {
      write(adamw_rates({lr, group.beta1, group.beta2, group.eps, group.weight_decay, steps_}));
    }
  }
  backend_.copy(host_rates_, rates_);
}

void Optimizer::update() {
  backend_.grad_norm(*plans_.all, rates_);
  if (plans_.adamw) backend_.adamw(*plans_.adamw, rates_);
  for (const Muon& muon : plans_.muon) muon.update(rates_);
}

void Optimizer::step(double lr_multiplier, double muon_momentum, double muon_weight_decay,
                     const GradientLimits& limits) {
  set_rates(lr_multiplier, muon_momentum, muon_weight_decay, limits);
  update();
}

Optimizer::Result Optimizer::result() {
  const Tensor row(host_arena(), {1, kRatesPerRow}, DType::f64);
  backend_.copy(rates_.rows(0, 1), row);
  const GradientRates& found = *row.as<GradientRates>();
  const bool skipped = found.skip != 0;
  if (skipped && !result_read_) --steps_;
  result_read_ = true;
  return {found.norm, skipped};
}

void Optimizer::zero_grad(bool fresh_pass) {
  prepare();
  backend_.zero_grads(fresh_pass ? *plans_.added_to : *plans_.all);
}

void Optimizer::set_lr(double lr) {
  for (OptimizerGroup& group : groups_) group.lr = lr;
}

Optimizer::NamedTensors Optimizer::state() const {
  NamedTensors tensors;
  const Tensor step(host_arena(), {1}, DType::i64);
  *step.as<int64_t>() = steps_;
  tensors.emplace_back(kStepName, step);
  for (const OptimizerGroup& group : groups_) {
    for (const OptimizerSlot& slot : group.slots) {
      tensors.emplace_back(slot.param->name + "." + first_name(group), slot.first);
      if (slot.second.defined())
        tensors.emplace_back(slot.param->name + "." + second_name(group), slot.second);
    }
  }
  return tensors;
}

void Optimizer::load_state(const std::function<Tensor(const std::string&)>& find) {
  const NamedTensors mine = state();
  std::vector<Tensor> found;
  for (const auto& [name, tensor] : mine) {
    found.push_back(find(name));
    check(found.back().defined(), "the optimizer state lacks '{}'", name);
    check(found.back().shape() == tensor.shape(), "optimizer state '{}' is {}, not {}", name,
          shape_string(found.back().shape()), shape_string(tensor.shape()));
    check(found.back().dtype() == tensor.dtype(), "optimizer state '{}' is {}, not {}", name,
          dtype_name(found.back().dtype()), dtype_name(tensor.dtype()));
  }
  const double steps = found[0].item();
  check(steps >= 0 && steps < 0x1p53, "optimizer state '{}' is {}; it must be 0 or more", kStepName, steps);
  steps_ = static_cast<int64_t>(steps);
  for (size_t i = 1; i < mine.size(); ++i) backend_.copy(found[i], mine[i].second);
}

void Optimizer::clear_state() {
  steps_ = 0;
  for (const OptimizerGroup& group : groups_) {
    for (const OptimizerSlot& slot : group.slots) {
      backend_.fill(slot.first, 0);
      if (slot.second.defined()) backend_.fill(slot.second, 0);
    }
  }
}

}  // namespace flexchat
