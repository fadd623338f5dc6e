// Groups, rates, state: which parameter is updated by which rule with which constants, and that a run resumed
// from its state goes on bit for bit.
#include "optim/optimizer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "base/error.h"
#include "base/parallel.h"
#include "optim/gradients.h"
#include "optim/matrices.h"

namespace flexchat {
namespace {

constexpr int64_t kEmbd = 12, kKeys = 6;

std::vector<std::pair<std::string, Shape>> parameter_shapes(Arch arch) {
  std::vector<std::pair<std::string, Shape>> shapes = {{"transformer.wte.weight", {64, kEmbd}}};
  for (int layer = 0; layer < 2; ++layer) {
    const std::string block = "transformer.h." + std::to_string(layer) + ".";
    shapes.push_back({block + "attn.c_q.weight", {kEmbd, kEmbd}});
    shapes.push_back({block + "attn.c_k.weight", {kKeys, kEmbd}});
    shapes.push_back({block + "attn.c_proj.weight", {kEmbd, kEmbd}});
    if (arch == Arch::modern && layer == 1) shapes.push_back({block + "attn.ve_gate.weight", {2, 12}});
    shapes.push_back({block + "mlp.c_fc.weight", {4 * kEmbd, kEmbd}});
    shapes.push_back({block + "mlp.c_proj.weight", {kEmbd, 4 * kEmbd}});
  }
  shapes.push_back({"lm_head.weight", {64, kEmbd}});
  if (arch == Arch::modern) {
    shapes.insert(
        shapes.begin(),
        {{"resid_lambdas", {2}}, {"x0_lambdas", {2}}, {"smear_lambda", {1}}, {"backout_lambda", {1}}});
    shapes.push_back({"smear_gate.weight", {1, 24}});
    shapes.push_back({"value_embeds.1.weight", {64, kKeys}});
  }
  return shapes;
}

// A model's parameters and an optimizer for them; gradients depend on the step alone.
struct Training {
  Backend& backend;
  std::vector<Parameter> params;
  std::unique_ptr<Optimizer> optimizer;

  Training(Backend& b, const OptimizerConfig& config) : backend(b) {
    set_num_threads(1);  // on such sizes threads would only wait for each other
    uint64_t seed = 1;
    for (const auto& [name, shape] : parameter_shapes(config.arch)) {
      params.push_back(random_parameter(b, name, shape, seed++));
    }
    optimizer = std::make_unique<Optimizer>(b, pointers(), config);
  }
  std::vector<Parameter*> pointers() {
    std::vector<Parameter*> out;
    for (Parameter& p : params) out.push_back(&p);
    return out;
  }
  void set_gradients(int64_t step) {
    for (size_t i = 0; i < params.size(); ++i) {
      fill_normal(backend, params[i].grad, static_cast<uint64_t>(step) * 1000 + i, 0.02);
    }
  }
  void step(int64_t t) {
    set_gradients(t);
    const bool modern = optimizer->groups().back().beta2 != 0;
    const auto x = static_cast<double>(t);
    optimizer->step(1 / (1 + 0.1 * x), 0.85 + 0.01 * x, modern ? 0.1 / (1 + x) : 0);
  }
  std::vector<double> all_values() const {
    std::vector<double> out;
    for (const Parameter& p : params) {
      for (double x : values(backend, p.value)) out.push_back(x);
    }
    return out;
  }
};

OptimizerConfig config_of(Arch arch, DType muon_dtype) {
  OptimizerConfig config = OptimizerConfig::base_defaults(arch, kEmbd);
  config.muon_dtype = muon_dtype;
  return config;
}

struct Setup {
  const char* name;
  Arch arch;
  const char* backend;
  DType muon_dtype;
};
class Optimizers : public testing::TestWithParam<Setup> {
 protected:
  void SetUp() override {
    std::string why;
    if (std::string_view(GetParam().backend) == "cuda" && !cuda_available(&why)) GTEST_SKIP() << why;
    backend = make_backend(GetParam().backend);
  }
  std::unique_ptr<Backend> backend;
  OptimizerConfig config = config_of(GetParam().arch, GetParam().muon_dtype);
};
INSTANTIATE_TEST_SUITE_P(All, Optimizers,
                         testing::Values(Setup{"classic_cpu", Arch::classic, "cpu", DType::f32},
                                         Setup{"classic_cpu_bf16", Arch::classic, "cpu", DType::bf16},
                                         Setup{"classic_reference", Arch::classic, "reference", DType::f64},
                                         Setup{"classic_cuda", Arch::classic, "cuda", DType::f32},
                                         Setup{"classic_cuda_bf16", Arch::classic, "cuda", DType::bf16},
                                         Setup{"modern_cpu", Arch::modern, "cpu", DType::f32},
                                         Setup{"modern_cpu_bf16", Arch::modern, "cpu", DType::bf16},
                                         Setup{"modern_reference", Arch::modern, "reference", DType::f64},
                                         Setup{"modern_cuda", Arch::modern, "cuda", DType::f32},
                                         Setup{"modern_cuda_bf16", Arch::modern, "cuda", DType::bf16}),
                         [](const auto& setup) { return setup.param.name; });

// Copies of every state tensor, as a checkpoint would hold them.
std::map<std::string, Tensor> saved(Backend& backend, const Optimizer& optimizer) {
  std::map<std::string, Tensor> out;
  for (const auto& [name, tensor] : optimizer.state()) {
    Tensor copy(host_arena(), tensor.shape(), tensor.dtype());
    backend.copy(tensor, copy);
    EXPECT_TRUE(out.emplace(name, copy).second) << name;
  }
  return out;
}

auto finder(const std::map<std::string, Tensor>& tensors) {
  return [&tensors](const std::string& name) {
    const auto it = tensors.find(name);
    return it == tensors.end() ? Tensor() : it->second;
  };
}

TEST_P(Optimizers, ResumesBitForBit) {
  Training whole(*backend, config), first(*backend, config), second(*backend, config);
  for (int64_t t = 0; t < 5; ++t) whole.step(t);
  for (int64_t t = 0; t < 2; ++t) first.step(t);
  const std::map<std::string, Tensor> state = saved(*backend, *first.optimizer);
  second.step(7);  // must leave no trace
  second.optimizer->load_state(finder(state));
  for (size_t i = 0; i < first.params.size(); ++i)
    backend->copy(first.params[i].value, second.params[i].value);
  EXPECT_EQ(second.optimizer->steps_done(), 2);
  for (int64_t t = 2; t < 5; ++t) second.step(t);
  EXPECT_EQ(second.all_values(), whole.all_values());
  EXPECT_EQ(saved(*backend, *second.optimizer).size(), state.size());
}

TEST_P(Optimizers, ClearedStateIsANewOptimizer) {
  Training used(*backend, config), fresh(*backend, config);
  for (int64_t t = 0; t < 2; ++t) used.step(t);
  used.optimizer->clear_state();
  for (size_t i = 0; i < used.params.size(); ++i) backend->copy(used.params[i].value, fresh.params[i].value);
  for (int64_t t = 2; t < 4; ++t) {
    used.step(t);
    fresh.step(t);
  }
  EXPECT_EQ(used.all_values(), fresh.all_values());
  EXPECT_EQ(used.optimizer->steps_done(), 2);
}

TEST_P(Optimizers, BadStateChangesNothing) {
  Training run(*backend, config), untouched(*backend, config);
  run.step(0);
  untouched.step(0);
  Training other(*backend, config);
  other.step(5);
  const std::map<std::string, Tensor> good = saved(*backend, *other.optimizer);
  const std::string name = "lm_head.weight.exp_avg_sq";
  const auto refuse = [&](const Tensor& replacement) -> std::string {
    std::map<std::string, Tensor> bad = good;
    bad[name] = replacement;
    try {
      run.optimizer->load_state(finder(bad));
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  const DType master = backend->master_dtype();
  EXPECT_EQ(refuse(Tensor()), "the optimizer state lacks '" + name + "'");
  EXPECT_EQ(refuse(backend->zeros({64, 2}, master)),
            "optimizer state '" + name + "' is (64, 2), not (64, 12)");
  EXPECT_EQ(refuse(backend->zeros({64, kEmbd}, DType::i32)).find("optimizer state '" + name + "' is i32"),
            0u);
  run.step(1);
  untouched.step(1);
  EXPECT_EQ(run.all_values(), untouched.all_values());
}

// The optimizer against its rules applied one by one with the constants of the table.
TEST_P(Optimizers, EveryGroupHasItsRuleAndConstants) {
  Training run(*backend, config), expected(*backend, config);
  const bool modern = config.arch == Arch::modern;
  const double sigma = 8;  // (12/768)^(-1/2)
  struct Constants {
    double lr, beta1, beta2, decay;
  };
  const std::map<std::string, Constants> adam =
      modern ? std::map<std::string, Constants>{{"lm_head.weight", {0.008 * sigma, 0.8, 0.96, 0.01}},
                                                {"transformer.wte.weight", {0.3 * sigma, 0.8, 0.995, 0.001}},
                                                {"value_embeds.1.weight", {0.15 * sigma, 0.8, 0.995, 0.01}},
                                                {"resid_lambdas", {0.005, 0.8, 0.95, 0.05}},
                                                {"x0_lambdas", {0.5, 0.96, 0.95, 0}},
                                                {"smear_gate.weight", {0.2, 0.8, 0.95, 0}},
                                                {"smear_lambda", {0.2, 0.8, 0.95, 0}},
                                                {"backout_lambda", {0.2, 0.8, 0.95, 0}}}
             : std::map<std::string, Constants>{{"lm_head.weight", {0.004 * sigma, 0.8, 0.95, 0}},
                                                {"transformer.wte.weight", {0.2 * sigma, 0.8, 0.95, 0}}};
  const double multiplier = 0.7, momentum = 0.9, decay = modern ? 0.2 : 0;
  run.set_gradients(3);
  expected.set_gradients(3);
  run.optimizer->step(multiplier, momentum, decay);
  size_t adam_count = 0;
  for (Parameter& p : expected.params) {
    const auto zeros = [&](const Shape& shape) { return backend->zeros(shape, backend->master_dtype()); };
    const Shape& shape = p.value.shape();
    if (const auto it = adam.find(p.name); it != adam.end()) {
      ++adam_count;
      const Constants& c = it->second;
      adamw(*backend, {c.lr * multiplier, c.beta1, c.beta2, 1e-10, c.decay, 1}, p, zeros(shape),
            zeros(shape));
    } else if (modern) {
      modern_muon(*backend, {0.02 * multiplier, momentum, 0.9, decay, config.muon_dtype}, p, zeros(shape),
                  zeros(second_momentum_shape(shape)));
    } else {
      classic_muon(*backend, {.lr = 0.02 * multiplier, .momentum = momentum, .dtype = config.muon_dtype}, p,
                   zeros(shape));
    }
  }
  EXPECT_EQ(adam_count, adam.size());
  // On a device a stack of matrices is multiplied by another algorithm than one, and bf16 turns the last bits
  // of its sums into larger ones.
  const bool exact = backend->arena().host() || config.muon_dtype != DType::bf16;
  for (size_t i = 0; i < run.params.size(); ++i) {
    EXPECT_LT(
        relative_error(values(*backend, run.params[i].value), values(*backend, expected.params[i].value)),
        exact ? 1e-7 : 1e-4)
        << run.params[i].name;
  }
}

TEST(Optimizer, GroupOrder) {
  const auto backend = make_cpu_backend();
  const auto names = [](const Optimizer& optimizer) {
    std::vector<std::string> out;
    for (const OptimizerGroup& group : optimizer.groups()) out.push_back(group.name);
    return out;
  };
  Training modern(*backend, config_of(Arch::modern, DType::f32)),
      classic(*backend, config_of(Arch::classic, DType::f32));
  EXPECT_EQ(names(*modern.optimizer),
            (std::vector<std::string>{"lm_head", "wte", "value_embeds", "resid_lambdas", "x0_lambdas",
                                      "smear and backout", "muon (2, 12)", "muon (6, 12)", "muon (12, 12)",
                                      "muon (12, 48)", "muon (48, 12)"}));
  EXPECT_EQ(names(*classic.optimizer), (std::vector<std::string>{"lm_head", "wte", "muon"}));
  const auto state = modern.optimizer->state();
  EXPECT_EQ(state[0].first, "step");
  EXPECT_EQ(state[1].first, "lm_head.weight.exp_avg");
  EXPECT_EQ(state.back().first, "transformer.h.1.mlp.c_fc.weight.second_momentum_buffer");
  EXPECT_EQ(state.back().second.shape(), (Shape{48, 1}));
  EXPECT_EQ(classic.optimizer->state().back().first, "transformer.h.1.mlp.c_proj.weight.momentum_buffer");
}

TEST(Optimizer, ClassicWeightDecayIsAdamWs) {
  const auto backend = make_cpu_backend();
  OptimizerConfig config = config_of(Arch::classic, DType::f32);
  config.adamw_weight_decay = 0.25;
  Training run(*backend, config);
  EXPECT_EQ(run.optimizer->groups()[0].weight_decay, 0.25);
  EXPECT_EQ(run.optimizer->groups()[1].weight_decay, 0.25);
  EXPECT_THROW(run.optimizer->step(1, 0.95, 0.1), Error);
}

TEST(Optimizer, SetLrFlattensEveryGroup) {
  const auto backend = make_cpu_backend();
  Training run(*backend, config_of(Arch::modern, DType::f32));
  run.optimizer->set_lr(0);
  const std::vector<double> before = run.all_values();
  run.step(0);
  EXPECT_EQ(run.all_values(), before);
}

TEST(Optimizer, RefusesUnknownParametersAndDtypes) {
  const auto backend = make_cpu_backend();
  Parameter stray = random_parameter(*backend, "lm_heads.weight", {4, 4}, 1);
  const OptimizerConfig config = config_of(Arch::classic, DType::f32);
  try {
    const Optimizer optimizer(*backend, {&stray}, config);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(),
                 "no optimizer group of the classic architecture takes parameter 'lm_heads.weight' (4, 4)");
  }
  Parameter bias = random_parameter(*backend, "transformer.h.0.attn.bias", {4}, 1);
  EXPECT_THROW(Optimizer(*backend, {&bias}, config), Error);
  Parameter gate = random_parameter(*backend, "smear_gate.weight", {1, 24}, 1);
  EXPECT_THROW(Optimizer(*backend, {&gate}, config), Error);
  EXPECT_THROW(Optimizer(*backend, {}, config), Error);
  Parameter head = random_parameter(*backend, "lm_head.weight", {4, 4}, 1);
  EXPECT_THROW(Optimizer(*backend, {&head}, config_of(Arch::classic, DType::f16)), Error);
  EXPECT_THROW(Optimizer(*backend, {&head}, config_of(Arch::classic, DType::f64)), Error);
  EXPECT_THROW(Optimizer(*make_reference_backend(), {&head}, config_of(Arch::classic, DType::bf16)), Error);
}

TEST(Optimizer, MissingGradientChangesNothing) {
  const auto backend = make_cpu_backend();
  Training run(*backend, config_of(Arch::modern, DType::f32));
  run.params.back().grad = Tensor();
  const std::vector<double> before = run.all_values();
  EXPECT_THROW(run.optimizer->step(1, 0.95, 0.1), Error);
  EXPECT_EQ(run.all_values(), before);
  EXPECT_EQ(run.optimizer->steps_done(), 0);
}

// f32 stays near f64 on the reference over several steps.
TEST(Optimizer, FollowsReference) {
  const auto reference = make_reference_backend();
  for (const auto& backend : all_backends()) {
    if (backend->master_dtype() == DType::f64) continue;
    for (Arch arch : {Arch::classic, Arch::modern}) {
      Training fast(*backend, config_of(arch, DType::f32)), slow(*reference, config_of(arch, DType::f64));
      for (int64_t t = 0; t < 4; ++t) {
        fast.step(t);
        slow.step(t);
      }
      for (size_t i = 0; i < fast.params.size(); ++i) {
        EXPECT_LT(
            relative_error(values(*backend, fast.params[i].value), values(*reference, slow.params[i].value)),
            2e-5)
            << backend->name() << " " << fast.params[i].name;
      }
    }
  }
}

// A step that limits the norm of loss-scaled gradients is one on gradients divided and shortened in memory.
TEST_P(Optimizers, LimitsGradientsWhileReadingThem) {
  Training run(*backend, config), expected(*backend, config);
  const double scale = 1024;
  for (int64_t t = 0; t < 2; ++t) {
    for (Training* training : {&run, &expected}) {
      training->set_gradients(t);
      for (Parameter& p : training->params) backend->axpby(scale, p.grad, 0, p.grad);
    }
    const std::vector<double> grad = values(*backend, run.params[0].grad);
    run.optimizer->step(1, 0.9, 0, {0.5, scale});
    EXPECT_EQ(values(*backend, run.params[0].grad), grad);
    ASSERT_TRUE(LossScaler(scale).unscale(*backend, expected.pointers()));
    const double norm = clip_gradient_norm(*backend, expected.pointers(), 0.5);
    EXPECT_GT(norm, 0.6);
    expected.optimizer->step(1, 0.9, 0);
    const Optimizer::Result result = run.optimizer->result();
    EXPECT_FALSE(result.skipped);
    EXPECT_NEAR(result.grad_norm, norm, 1e-5 * norm);
    EXPECT_NEAR(expected.optimizer->result().grad_norm, 0.5, 1e-5);
  }
  for (size_t i = 0; i < run.params.size(); ++i) {
    EXPECT_LT(
        relative_error(values(*backend, run.params[i].value), values(*backend, expected.params[i].value)),
        config.muon_dtype == DType::bf16 ? 1e-3 : 1e-5)
        << run.params[i].name;
  }
}

TEST_P(Optimizers, GradientsThatAreNotFiniteChangeNothing) {
  for (const double bad : {HUGE_VAL, std::nan("")}) {
    Training run(*backend, config), untouched(*backend, config);
    for (Training* training : {&run, &untouched}) training->step(0);
    run.set_gradients(1);
    const Tensor& grad = run.params.back().grad;
    set_element(*backend, grad, grad.numel() - 1, bad);
    const auto before = saved(*backend, *run.optimizer);
    const std::vector<double> values_before = run.all_values();
    run.optimizer->step(1, 0.9, 0);
    EXPECT_EQ(run.optimizer->steps_done(), 2);
    EXPECT_TRUE(run.optimizer->result().skipped);
    EXPECT_TRUE(run.optimizer->result().skipped) << "asked again";
    EXPECT_EQ(run.optimizer->steps_done(), 1) << "a skipped step is not counted, and only once";
    EXPECT_EQ(run.all_values(), values_before);
    for (const auto& [name, tensor] : saved(*backend, *run.optimizer)) {
      EXPECT_EQ(std::memcmp(tensor.data(), before.at(name).data(), static_cast<size_t>(tensor.bytes())), 0)
          << name;
    }
    for (Training* training : {&run, &untouched}) training->step(1);
    EXPECT_FALSE(run.optimizer->result().skipped);
    EXPECT_EQ(run.all_values(), untouched.all_values());
  }
}

// The copies that products read follow the masters without a pass of their own.
TEST_P(Optimizers, RefreshesComputeCopies) {
  if (backend->master_dtype() == DType::f64) GTEST_SKIP() << "the reference computes in its masters";
  Training run(*backend, config);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (Parameter& p : run.params) p.compute = backend->zeros(p.value.shape(), dtype);
    run.step(0);
    for (const Parameter& p : run.params) {
      const Tensor expected = backend->zeros(p.value.shape(), dtype);
      backend->copy(p.value, expected);
      EXPECT_EQ(values(*backend, p.compute), values(*backend, expected)) << p.name;
    }
  }
}

TEST_P(Optimizers, ZeroGradZeroesEveryGradient) {
  Training run(*backend, config);
  run.set_gradients(0);
  run.optimizer->zero_grad();
  for (const Parameter& p : run.params) {
    const std::vector<double> grad = values(*backend, p.grad);
    EXPECT_EQ(grad, std::vector<double>(grad.size(), 0)) << p.name;
  }
  run.step(1);  // and another gradient tensor is noticed
  run.params[0].grad = backend->clone(run.params[0].grad);
  run.optimizer->zero_grad();
  EXPECT_EQ(values(*backend, run.params[0].grad)[0], 0);
}

// Rates are data: a recorded update goes on with those of later steps.
TEST_P(Optimizers, RecordedUpdatesFollowTheRates) {
  Training run(*backend, config), expected(*backend, config);
  run.step(0);
  expected.step(0);
  const auto graph = backend->capture([&] { run.optimizer->update(); });
  const bool modern = config.arch == Arch::modern;
  for (int64_t t = 1; t < 4; ++t) {
    const auto x = static_cast<double>(t);
    run.set_gradients(t);
    expected.set_gradients(t);
    run.optimizer->set_rates(1 / x, 0.8 + 0.03 * x, modern ? 0.1 * x : 0, {1 / x, x});
    graph->replay();
    expected.optimizer->step(1 / x, 0.8 + 0.03 * x, modern ? 0.1 * x : 0, {1 / x, x});
    EXPECT_EQ(run.optimizer->result().grad_norm, expected.optimizer->result().grad_norm);
    EXPECT_EQ(run.all_values(), expected.all_values()) << "step " << t;
  }
  EXPECT_EQ(run.optimizer->steps_done(), 4);
}

}  // namespace
}  // namespace flexchat
