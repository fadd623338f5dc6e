// The whole model, in double: the gradient of every parameter against finite differences.
#include <gtest/gtest.h>

#include "testing/gradient_check.h"
#include "testing/tiny_gpt.h"

namespace flexchat {
namespace {

void check_model(const GptConfig& config, int64_t batch, int64_t t_len, int64_t samples, bool checkpointing) {
  const auto backend = make_reference_backend();
  Gpt model(config, *backend, DType::f64);
  randomize(model, 3);
  model.set_checkpoint_activations(checkpointing);
  const Batch data = random_batch(config, batch, t_len, 4);
  const double weight = 0.7;
  const auto loss = [&](bool recording) {
    Tape tape(*backend, recording);
    const double sum = weight * sum_of(model.nll(tape, data.ids, data.targets, weight));
    tape.backward();
    return sum;
  };
  model.zero_grad();
  EXPECT_EQ(loss(true), loss(false));
  for (const Parameter& p : model.parameters()) {
    EXPECT_GT(max_abs(p.grad), 0) << p.name;
    expect_gradient(
        p.name, p.value, p.grad, [&] { return loss(false); }, samples);
  }
}

TEST(GptGradients, Classic) { check_model(tiny_config(Arch::classic), 2, 5, 40, false); }
TEST(GptGradients, Modern) { check_model(tiny_config(Arch::modern), 2, 5, 40, false); }

// More tokens than the short window of 128.
TEST(GptGradients, ModernBeyondTheWindow) { check_model(tiny_config(Arch::modern), 1, 131, 2, false); }

TEST(GptGradients, WithActivationCheckpointing) {
  check_model(tiny_config(Arch::classic), 1, 5, 4, true);
  check_model(tiny_config(Arch::modern), 1, 5, 4, true);
}

// One layer: the block's input is also x0, its output also what the backout takes away.
TEST(GptGradients, OneLayer) {
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    GptConfig config = tiny_config(arch);
    config.n_layer = 1;
    for (const bool checkpointing : {false, true}) check_model(config, 1, 5, 8, checkpointing);
  }
}

// Gradients of two calls add up.
TEST(GptGradients, Accumulate) {
  const auto backend = make_reference_backend();
  Gpt model(tiny_config(Arch::modern), *backend, DType::f64);
  randomize(model, 3);
  const Batch a = random_batch(model.config(), 1, 6, 1), b = random_batch(model.config(), 2, 3, 2);
  const auto step = [&](const Batch& data) {
    Tape tape(*backend, true);
    model.nll(tape, data.ids, data.targets, 0.5);
    tape.backward();
  };
  std::vector<Tensor> expected;
  for (const Batch& data : {a, b}) {
    model.zero_grad();
    step(data);
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      const Tensor grad = model.parameters()[i].grad;
      if (expected.size() <= i) {
        expected.push_back(duplicate(grad));
      } else {
        backend->axpby(1, grad, 1, expected[i]);
      }
    }
  }
  model.zero_grad();
  step(a);
  step(b);
  for (size_t i = 0; i < expected.size(); ++i) {
    const Parameter& p = model.parameters()[i];
    EXPECT_LE(max_difference(p.grad, expected[i]), 1e-12 * max_abs(expected[i])) << p.name;
  }
}

// Rows of the padded vocabulary are named by no token and stand behind no logit.
TEST(GptGradients, PaddedVocabularyRowsGetNone) {
  const Threads one_thread(1);
  const auto cpu = make_cpu_backend();
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    Gpt model(tiny_config(arch), *cpu, DType::f32);
    randomize(model, 3);
    model.zero_grad();
    const Batch data = random_batch(model.config(), 2, 33, 4);
    Tape tape(*cpu, true);
    model.nll(tape, data.ids, data.targets, 1);
    tape.backward();
    int tables = 0;
    for (const Parameter& p : model.parameters()) {
      if (p.value.dim(0) != model.config().padded_vocab()) continue;
      ++tables;
      const int64_t v = model.config().vocab_size;
      EXPECT_EQ(max_abs(p.grad.rows(v, p.value.dim(0) - v)), 0) << p.name;
      EXPECT_GT(max_abs(p.grad), 0) << p.name;
    }
    EXPECT_EQ(tables, arch == Arch::classic ? 2 : 4);
  }
}

// Ignored targets: no loss, and the gradient is that of the rest.
TEST(GptGradients, AllTargetsIgnored) {
  const auto backend = make_reference_backend();
  Gpt model(tiny_config(Arch::modern), *backend, DType::f64);
  randomize(model, 3);
  model.zero_grad();
  const Batch data = random_batch(model.config(), 2, 5, 4);
  backend->fill(data.targets, -1);
  Tape tape(*backend, true);
  EXPECT_EQ(max_abs(model.nll(tape, data.ids, data.targets, 1)), 0);
  tape.backward();
  for (const Parameter& p : model.parameters()) EXPECT_EQ(max_abs(p.grad), 0) << p.name;
}

}  // namespace
}  // namespace flexchat
