// The two paths of attention, built in and as an expression, through whole models: training, prefill, chunks
// and decode.
#include <gtest/gtest.h>

#include "base/error.h"
#include "testing/tiny_gpt.h"

namespace flexchat {
namespace {

struct Precision {
  const char* backend;
  DType dtype;
  double tolerance;
};
const Precision kReference = {"reference", DType::f64, 1e-12}, kCpu = {"cpu", DType::f32, 2e-5};

Tensor logits_of(Gpt& model, AttentionPath path, const Tensor& ids, const std::vector<int64_t>& pieces) {
  model.set_attention(path);
  EXPECT_EQ(model.attention_path(), path);
  KvCache cache = model.make_cache(1, ids.dim(1));
  const int64_t vocab = model.config().vocab_size;
  const Tensor all(host_arena(), {1, ids.dim(1), vocab}, DType::f64);
  int64_t at = 0;
  for (const int64_t piece : pieces) {
    const Tensor part = model.logits(ids.reshape({ids.dim(1)}).rows(at, piece).reshape({1, piece}), &cache);
    for (int64_t i = 0; i < part.numel(); ++i) all.set(at * vocab + i, part.get(i));
    at += piece;
  }
  return all;
}

TEST(AttentionPaths, GiveTheSameLogits) {
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    for (const Precision& p : {kReference, kCpu}) {
      const auto backend = make_backend(p.backend);
      Gpt model(tiny_config(arch), *backend, p.dtype);
      randomize(model, 3);
      // The modern model's window of 128 ends inside; the last pieces are prefill, chunk and decode.
      const Tensor ids = random_batch(model.config(), 1, 150, 4).ids;
      for (const std::vector<int64_t>& pieces : {std::vector<int64_t>{150}, {130, 15, 1, 1, 3}}) {
        const Tensor sdpa = logits_of(model, AttentionPath::sdpa, ids, pieces),
                     flex = logits_of(model, AttentionPath::flex, ids, pieces);
        EXPECT_GT(max_abs(sdpa), 1);
        EXPECT_LE(max_difference(sdpa, flex), p.tolerance) << p.backend << " " << pieces.size() << " pieces";
      }
    }
  }
}

TEST(AttentionPaths, GiveTheSameGradients) {
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    for (const bool checkpointing : {false, true}) {
      const auto backend = make_reference_backend();
      Gpt model(tiny_config(arch), *backend, DType::f64);
      randomize(model, 5);
      model.set_checkpoint_activations(checkpointing);
      const Batch batch = random_batch(model.config(), 1, 140, 6);
      std::vector<std::vector<Tensor>> gradients;
      for (const AttentionPath path : {AttentionPath::sdpa, AttentionPath::flex}) {
        model.set_attention(path, "auto");
        model.zero_grad();
        Tape tape(*backend, true);
        model.nll(tape, batch.ids, batch.targets, 1.0 / 140);
        tape.backward();
        auto& list = gradients.emplace_back();
        for (const Parameter& parameter : model.parameters()) list.push_back(duplicate(parameter.grad));
      }
      for (size_t i = 0; i < gradients[0].size(); ++i) {
        EXPECT_LE(max_difference(gradients[0][i], gradients[1][i]), 1e-12) << model.parameters()[i].name;
      }
    }
  }
}

TEST(AttentionPaths, UnknownKernel) {
  const auto backend = make_cpu_backend();
  Gpt model(tiny_config(Arch::classic), *backend, DType::f32);
  model.set_attention(AttentionPath::flex, "cpu");
  try {
    model.set_attention(AttentionPath::sdpa, "cuda_mma");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "the cpu backend has no attention kernel 'cuda_mma'; allowed: auto, cpu");
  }
}

}  // namespace
}  // namespace flexchat
