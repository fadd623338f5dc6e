// The tape: order, memory given back as backward goes, and activation checkpointing that changes memory
// alone.
#include "grad/tape.h"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ops/ops.h"
#include "support/temp_folder.h"
#include "testing/tiny_gpt.h"

namespace flexchat {
namespace {

int64_t in_use() { return static_cast<int64_t>(host_arena().stats().in_use); }

TEST(Tape, RunsStepsNewestFirstAndOnce) {
  const auto backend = make_reference_backend();
  Tape tape(*backend, true);
  std::vector<int> order;
  for (int i = 0; i < 3; ++i) tape.record([&order, i] { order.push_back(i); });
  tape.backward();
  EXPECT_EQ(order, (std::vector<int>{2, 1, 0}));
  tape.backward();
  EXPECT_EQ(order.size(), 3u);
}

TEST(Tape, GradOfAllocatesOnceThenAccumulates) {
  const auto cpu = make_cpu_backend();
  const Var v = Tape::leaf(filled_tensor({2, 3}, DType::bf16, 1));
  bool accumulate = true;
  const Tensor& first = grad_of(*cpu, v, &accumulate);
  EXPECT_FALSE(accumulate);
  EXPECT_EQ(first.shape(), v->value.shape());
  EXPECT_EQ(first.dtype(), DType::bf16);
  const void* data = first.data();
  EXPECT_EQ(grad_of(*cpu, v, &accumulate).data(), data);
  EXPECT_TRUE(accumulate);
}

// What each step of a chain of norms finds in use: the activations of later steps are gone.
TEST(Tape, FreesActivationsAsItGoes) {
  const auto cpu = make_cpu_backend();
  constexpr int kLength = 8;
  const int64_t bytes = 1024 * 64 * 4, before = in_use();
  std::vector<int64_t> seen;
  {
    Tape tape(*cpu, true);
    Var x = Tape::leaf(filled_tensor({1024, 64}, DType::f32, 1));
    for (int i = 0; i < kLength; ++i) {
      x = rms_norm(tape, x);
      tape.record([&seen] { seen.push_back(in_use()); });
    }
    EXPECT_GE(in_use() - before, (kLength + 1) * bytes) << "activations are kept for backward";
    x->grad = filled_tensor({1024, 64}, DType::f32, 1);
    x = {};
    tape.backward();
    EXPECT_EQ(in_use(), before);
  }
  ASSERT_EQ(seen.size(), static_cast<size_t>(kLength));
  for (size_t i = 1; i < seen.size(); ++i) {
    EXPECT_LE(seen[i], seen[i - 1] - (i > 1 ? bytes : 0)) << "step " << i;
  }
  EXPECT_EQ(in_use(), before);
}

TEST(Tape, InferenceKeepsNothing) {
  const auto cpu = make_cpu_backend();
  const int64_t bytes = 1024 * 64 * 4;
  const Tensor w = filled_tensor({64, 64}, DType::f32, 0.1);
  const Weight weight{w, {}, w};
  Tape tape(*cpu, false);
  Var x = Tape::leaf(filled_tensor({1024, 64}, DType::f32, 1));
  host_arena().reset_peak();
  const int64_t before = in_use();
  for (int i = 0; i < 8; ++i) x = rms_norm(tape, x);
  for (int i = 0; i < 8; ++i) linear_add(tape, x, rms_norm(tape, x), weight);
  EXPECT_EQ(in_use(), before);
  EXPECT_LE(static_cast<int64_t>(host_arena().stats().peak), before + 2 * bytes);
  x = tape.checkpoint(x, [](Tape& t, const Var& v) { return rms_norm(t, v); });
  EXPECT_EQ(in_use(), before);
  tape.backward();  // nothing was recorded
}

// ---- activation checkpointing ---------------------------------------------------------------------------

// A segment that works in place, and one on a variable that others read too: the same bits as without.
TEST(Checkpoint, GradientsAreThoseWithout) {
  const auto cpu = make_cpu_backend();
  Rng rng(1);
  const Tensor input = random_tensor(rng, {17, 33}, DType::f32),
               w = random_tensor(rng, {33, 33}, DType::f32, 0.2),
               seed = random_tensor(rng, {17, 33}, DType::f32);
  for (const bool in_place : {false, true}) {
    const auto run = [&](bool checkpointing) {
      const Weight weight{w, cpu->zeros({33, 33}, DType::f32), w};
      Tape tape(*cpu, true);
      const Var x = Tape::leaf(duplicate(input));
      const Tape::Segment segment = [&](Tape& t, const Var& v) {
        if (!in_place) return mix(t, {}, linear(t, v, weight), {nullptr, 0, 0.3}, v);
        linear_add(t, v, rms_norm(t, v), weight);
        return v;
      };
      const Var y = checkpointing ? tape.checkpoint(x, segment) : segment(tape, x);
      const Var z = in_place ? y : mix(tape, {}, y, {nullptr, 0, -0.7}, x);
      const Tensor result = duplicate(z->value);
      z->grad = duplicate(seed);
      tape.backward();
      return std::vector<Tensor>{result, duplicate(x->grad), weight.grad};
    };
    const std::vector<Tensor> plain = run(false), checkpointed = run(true);
    for (size_t i = 0; i < plain.size(); ++i) {
      EXPECT_TRUE(same_bits(checkpointed[i], plain[i])) << "in place " << in_place << ", tensor " << i;
      EXPECT_GT(max_abs(plain[i]), 0);
    }
  }
}

TEST(Checkpoint, RefusesToWorkInPlaceOnWhatOthersRead) {
  const auto cpu = make_cpu_backend();
  const Tensor w = filled_tensor({7, 7}, DType::f32, 0.1);
  const Weight weight{w, cpu->zeros({7, 7}, DType::f32), w};
  Tape tape(*cpu, true);
  const Var x = Tape::leaf(filled_tensor({3, 7}, DType::f32, 1));
  const Var y = tape.checkpoint(x, [&](Tape& t, const Var& v) {
    linear_add(t, v, rms_norm(t, v), weight);
    return v;
  });
  const Var z = mix(tape, {}, y, {}, x);
  z->grad = filled_tensor({3, 7}, DType::f32, 1);
  EXPECT_EQ(message_of<Error>([&] { tape.backward(); }),
            "a checkpointed segment cannot work in place on what others read");
}

struct Step {
  Tensor nll;
  std::vector<Tensor> gradients;
  int64_t peak = 0;  // bytes above what the model itself holds
};

Step train_step(Gpt& model, const Batch& data, bool checkpointing) {
  model.set_checkpoint_activations(checkpointing);
  model.zero_grad();
  host_arena().reset_peak();
  const int64_t before = in_use();
  Step step;
  {
    Tape tape(model.backend(), true);
    step.nll = duplicate(model.nll(tape, data.ids, data.targets, 0.25));
    tape.backward();
  }
  step.peak = static_cast<int64_t>(host_arena().stats().peak) - before;
  EXPECT_LE(in_use() - before, step.nll.bytes() + 64) << "backward leaves nothing behind";
  for (const Parameter& p : model.parameters()) step.gradients.push_back(duplicate(p.grad));
  return step;
}

// What the gradients of linear weights held before a fresh pass does not matter, in chunks of the loss or
// whole.
TEST(Tape, FreshPassOverwritesGradientsOfLinearProducts) {
  const auto cpu = make_cpu_backend();
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    for (const bool checkpointing : {false, true}) {
      SCOPED_TRACE(fmt::format("{} {}", arch_name(arch), checkpointing));
      const GptConfig config = tiny_config(arch);
      Gpt model(config, *cpu, DType::f32);
      randomize(model, 1);
      const Batch data = random_batch(config, 2, 65, 2);
      const Step plain = train_step(model, data, checkpointing);
      model.zero_grad();
      int64_t linear = 0;
      for (const Parameter& p : model.parameters()) {
        if (!p.by_product) continue;
        ++linear;
        // Rows that only pad the vocabulary are never written: they stay 0 from the start.
        const bool head = p.name == "lm_head.weight";
        cpu->fill(p.grad.rows(0, head ? config.vocab_size : p.grad.dim(0)), std::nan(""));
      }
      EXPECT_EQ(linear, 1 + 6 * config.n_layer);
      Tape tape(*cpu, true);
      tape.set_fresh(true);
      model.nll(tape, data.ids, data.targets, 0.25);
      tape.backward();
      for (size_t i = 0; i < plain.gradients.size(); ++i) {
        EXPECT_TRUE(same_bits(model.parameters()[i].grad, plain.gradients[i])) << model.parameters()[i].name;
      }
    }
  }
}

TEST(Checkpoint, SameBitsOfLossAndGradientsInLessMemory) {
  const auto cpu = make_cpu_backend();
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const int64_t n_layer : {1, 2, 5}) {
        SCOPED_TRACE(fmt::format("{} {} {} layers", arch_name(arch), dtype_name(dtype), n_layer));
        const Threads scope(n_layer == 2 ? 2 : 1);
        GptConfig config = tiny_config(arch);
        config.n_layer = n_layer;
        Gpt model(config, *cpu, dtype);
        randomize(model, 1);
        const Batch data = random_batch(config, 2, 65, 2);
        const Step plain = train_step(model, data, false), checkpointed = train_step(model, data, true);
        EXPECT_TRUE(same_bits(checkpointed.nll, plain.nll));
        for (size_t i = 0; i < plain.gradients.size(); ++i) {
          EXPECT_TRUE(same_bits(checkpointed.gradients[i], plain.gradients[i])) << model.parameters()[i].name;
        }
        if (n_layer == 5) {
          EXPECT_LT(checkpointed.peak, plain.peak * 6 / 10);
        }
      }
    }
  }
}

// A second step reuses the blocks of the first: the arena does not grow.
TEST(Checkpoint, StepsReuseTheirMemory) {
  const Threads one_thread(1);
  const auto cpu = make_cpu_backend();
  for (const bool checkpointing : {false, true}) {
    Gpt model(tiny_config(Arch::modern), *cpu, DType::f32);
    randomize(model, 1);
    const Batch data = random_batch(model.config(), 2, 65, 2);
    train_step(model, data, checkpointing);
    const size_t reserved = host_arena().stats().reserved;
    for (int i = 0; i < 3; ++i) train_step(model, data, checkpointing);
    EXPECT_EQ(host_arena().stats().reserved, reserved);
  }
}

}  // namespace
}  // namespace flexchat
