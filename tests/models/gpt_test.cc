// GPT: initial weights, the forward on the CPU against double precision, and the same logits however a
// sequence is cut into prefill, chunks and single tokens.
#include "models/gpt.h"

#include <gtest/gtest.h>

#include "support/temp_folder.h"
#include "testing/tiny_gpt.h"

namespace flexchat {
namespace {

// Columns [begin, end) of (B, T).
Tensor columns(const Tensor& x, int64_t begin, int64_t end) {
  const int64_t batch = x.dim(0), t_len = x.dim(1);
  const Tensor out(host_arena(), {batch, end - begin}, x.dtype());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = begin; t < end; ++t) out.set(b * (end - begin) + t - begin, x.get(b * t_len + t));
  }
  return out;
}

// |a - b| over positions [begin, begin + a's) of b; a (B, n, V), b (B, T, V).
double difference(const Tensor& a, const Tensor& b, int64_t begin) {
  double largest = 0;
  const int64_t v = a.dim(2);
  for (int64_t i = 0; i < a.numel(); ++i) {
    const int64_t row = i / v / a.dim(1), t = i / v % a.dim(1);
    const double d = std::abs(a.get(i) - b.get((row * b.dim(1) + begin + t) * v + i % v));
    if (std::isnan(d)) return HUGE_VAL;
    largest = std::max(largest, d);
  }
  return largest;
}

struct Precision {
  const char* backend;
  DType dtype;
  double tolerance;  // of logits up to 15, however they are computed
};
const Precision kReference = {"reference", DType::f64, 1e-12}, kCpu = {"cpu", DType::f32, 1e-5};

// Compares cached logits with `full` (B, T, V) for one way to cut the sequence.
void expect_same_logits(Gpt& model, const Tensor& ids, const Tensor& full, const std::vector<int64_t>& pieces,
                        double tolerance) {
  KvCache cache = model.make_cache(ids.dim(0), ids.dim(1));
  int64_t at = 0;
  std::string cut;
  for (const int64_t piece : pieces) {
    cut += fmt::format(" {}", piece);
    const Tensor logits = model.logits(columns(ids, at, at + piece), &cache);
    ASSERT_EQ(logits.shape(), (Shape{ids.dim(0), piece, model.config().vocab_size}));
    ASSERT_LE(difference(logits, full, at), tolerance) << "cut" << cut;
    at += piece;
    ASSERT_EQ(cache.length, at);
  }
}

// Every way to write t_len as a sum of pieces.
std::vector<std::vector<int64_t>> all_cuts(int64_t t_len) {
  std::vector<std::vector<int64_t>> cuts;
  for (uint64_t bits = 0; bits < uint64_t{1} << (t_len - 1); ++bits) {
    std::vector<int64_t> pieces = {1};
    for (int64_t t = 1; t < t_len; ++t) {
      if (bits >> (t - 1) & 1) {
        pieces.push_back(1);
      } else {
        ++pieces.back();
      }
    }
    cuts.push_back(pieces);
  }
  return cuts;
}

class GptCache : public testing::Test {
  const Threads one_thread_{1};  // these models are too small for more
};

TEST_F(GptCache, ClassicGivesTheSameLogitsForEveryCut) {
  for (const Precision& p : {kReference, kCpu}) {
    const auto backend = make_backend(p.backend);
    Gpt model(tiny_config(Arch::classic), *backend, p.dtype);
    randomize(model, 1);
    const Tensor ids = random_batch(model.config(), 2, 6, 2).ids, full = model.logits(ids);
    ASSERT_EQ(full.shape(), (Shape{2, 6, 37}));
    EXPECT_GT(max_abs(full), 1);
    for (const auto& pieces : all_cuts(6)) expect_same_logits(model, ids, full, pieces, p.tolerance);
  }
}

// Modern: a prefill, then single tokens. The smear of a chunk's first token is the exception below.
TEST_F(GptCache, ModernGivesTheSameLogitsForPrefillAndDecode) {
  for (const Precision& p : {kReference, kCpu}) {
    const auto backend = make_backend(p.backend);
    Gpt model(tiny_config(Arch::modern), *backend, p.dtype);
    randomize(model, 1);
    const Tensor ids = random_batch(model.config(), 2, 7, 2).ids, full = model.logits(ids);
    for (int64_t prefill = 1; prefill <= 7; ++prefill) {
      std::vector<int64_t> pieces(static_cast<size_t>(8 - prefill), 1);
      pieces[0] = prefill;
      expect_same_logits(model, ids, full, pieces, p.tolerance);
    }
    // Without smear every cut agrees.
    randomize(model, 1);
    model.parameter("smear_lambda").value.set(0, 0);
    model.weights_changed();
    const Tensor unsmeared = model.logits(ids);
    for (const auto& pieces : all_cuts(7)) expect_same_logits(model, ids, unsmeared, pieces, p.tolerance);
  }
}

// The reference system smears no chunk's first token, unless the chunk is that token alone.
TEST_F(GptCache, ModernChunkStartsWithoutSmear) {
  const auto backend = make_reference_backend();
  Gpt model(tiny_config(Arch::modern), *backend, DType::f64);
  randomize(model, 1);
  const Tensor ids = random_batch(model.config(), 1, 6, 2).ids, full = model.logits(ids);
  KvCache cache = model.make_cache(1, 6);
  model.logits(columns(ids, 0, 3), &cache);
  const Tensor chunk = model.logits(columns(ids, 3, 5), &cache);
  EXPECT_GT(difference(chunk, full, 3), 1e-3);
  // The token behind the chunk is smeared with the chunk's last: its previous embedding was kept.
  KvCache again = model.make_cache(1, 6);
  model.logits(columns(ids, 0, 3), &again);
  model.logits(columns(ids, 3, 5), &again);
  const Tensor smeared = model.logits(columns(ids, 5, 6), &cache);
  again.previous_embedding = {};
  const Tensor unsmeared = model.logits(columns(ids, 5, 6), &again);
  EXPECT_GT(max_difference(smeared, unsmeared), 1e-3);
}

// Prefill and decode where the short window of 128 and then the long one of sequence_len cut keys off.
TEST_F(GptCache, BeyondTheWindows) {
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    const auto cpu = make_cpu_backend();
    GptConfig config = tiny_config(arch);
    config.sequence_len = 140;
    Gpt model(config, *cpu, DType::f32);
    randomize(model, 1);
    const Tensor ids = random_batch(config, 1, 160, 2).ids, full = model.logits(ids);
    std::vector<int64_t> pieces(32, 1);
    pieces[0] = 129;
    expect_same_logits(model, ids, full, pieces, kCpu.tolerance);
    if (arch == Arch::modern) continue;
    expect_same_logits(model, ids, full, {65, 70, 1, 24}, kCpu.tolerance);
  }
}

TEST_F(GptCache, LastOnlyIsTheLastRow) {
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    for (const Precision& p : {kReference, kCpu}) {
      const auto backend = make_backend(p.backend);
      Gpt model(tiny_config(arch), *backend, p.dtype);
      randomize(model, 1);
      for (const int64_t batch : {1, 3}) {
        const Tensor ids = random_batch(model.config(), batch, 7, 2).ids, full = model.logits(ids);
        const Tensor last = model.logits(ids, nullptr, true);
        ASSERT_EQ(last.shape(), (Shape{batch, 1, 37}));
        EXPECT_LE(difference(last, full, 6), p.tolerance);
        KvCache cache = model.make_cache(batch, 7);
        EXPECT_LE(difference(model.logits(columns(ids, 0, 6), &cache, true), full, 5), p.tolerance);
        EXPECT_LE(difference(model.logits(columns(ids, 6, 7), &cache, true), full, 6), p.tolerance);
      }
    }
  }
}

TEST_F(GptCache, OverflowIsRefusedAndHarmless) {
  const auto cpu = make_cpu_backend();
  Gpt model(tiny_config(Arch::modern), *cpu, DType::f32);
  randomize(model, 1);
  const Tensor ids = random_batch(model.config(), 2, 5, 2).ids, full = model.logits(ids);
  KvCache cache = model.make_cache(2, 5);
  model.logits(columns(ids, 0, 4), &cache);
  EXPECT_EQ(message_of<Error>([&] { model.logits(columns(ids, 0, 2), &cache); }),
            "2 more tokens do not fit a cache of 5 that holds 4");
  EXPECT_EQ(message_of<Error>([&] { model.logits(ids.rows(0, 1), &cache); }),
            "1 rows of ids for a cache of 2 rows");
  EXPECT_LE(difference(model.logits(columns(ids, 4, 5), &cache), full, 4), 1e-5);
  EXPECT_EQ(message_of<Error>([&] { model.logits(columns(ids, 4, 5), &cache); }),
            "1 more tokens do not fit a cache of 5 that holds 5");
}

TEST(Gpt, PositionsEndWithTheRotaryTable) {
  const auto cpu = make_cpu_backend();
  GptConfig config = tiny_config(Arch::classic);
  config.sequence_len = 2;
  Gpt model(config, *cpu, DType::f32);
  randomize(model, 1);
  model.logits(random_batch(config, 1, 20, 1).ids);
  EXPECT_EQ(message_of<Error>([&] { model.logits(random_batch(config, 1, 21, 1).ids); }),
            "position 20 is beyond the rotary table of 20 positions");
}

TEST(Gpt, BatchRowsAreIndependent) {
  const Threads one_thread(1);
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    const auto cpu = make_cpu_backend();
    Gpt model(tiny_config(arch), *cpu, DType::f32);
    randomize(model, 1);
    const Tensor ids = random_batch(model.config(), 3, 9, 2).ids, before = model.logits(ids);
    for (int64_t t = 0; t < 9; ++t) ids.set(9 + t, 5);
    const Tensor after = model.logits(ids);
    EXPECT_TRUE(same_bits(after.rows(0, 1), before.rows(0, 1)));
    EXPECT_TRUE(same_bits(after.rows(2, 1), before.rows(2, 1)));
    EXPECT_GT(max_difference(after.rows(1, 1), before.rows(1, 1)), 0.1);
    // Nor do later tokens reach earlier ones.
    const Tensor changed = duplicate(ids);
    changed.set(8, ids.get(8) == 0 ? 1 : 0);
    const Tensor causal = model.logits(changed);
    EXPECT_LE(max_difference(columns(causal.reshape({3, 9 * 37}), 0, 8 * 37),
                             columns(after.reshape({3, 9 * 37}), 0, 8 * 37)),
              1e-6);
    EXPECT_GT(max_difference(causal, after), 0.1);
  }
}

// Logits, loss and gradients of the CPU against double precision with the same weights. bf16 and f16 round
// weights and every activation; their bounds are some tens of unit roundoffs.
TEST(Gpt, CpuMatchesTheReference) {
  const Threads one_thread(1);
  const auto reference = make_reference_backend(), cpu = make_cpu_backend();
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    Gpt exact(tiny_config(arch), *reference, DType::f64);
    randomize(exact, 1);
    const Batch data = random_batch(exact.config(), 2, 33, 2);
    const Tensor logits = exact.logits(data.ids);
    exact.zero_grad();
    Tape exact_tape(*reference, true);
    const double loss = sum_of(exact.nll(exact_tape, data.ids, data.targets, 0.1));
    exact_tape.backward();
    for (const auto& [dtype, of_logits, of_gradient] :
         {std::tuple{DType::f32, 1e-5, 1e-5}, {DType::f16, 0.05, 0.02}, {DType::bf16, 0.4, 0.15}}) {
      Gpt model(exact.config(), *cpu, dtype);
      randomize(model, 1);
      // Rotary tables of the modern model are rounded to the compute dtype: part of the bounds.
      EXPECT_LE(max_difference(model.logits(data.ids), logits), of_logits)
          << arch_name(arch) << dtype_name(dtype);
      model.zero_grad();
      Tape tape(*cpu, true);
      EXPECT_NEAR(sum_of(model.nll(tape, data.ids, data.targets, 0.1)), loss, of_logits * 5);
      tape.backward();
      for (size_t i = 0; i < model.parameters().size(); ++i) {
        const Parameter &got = model.parameters()[i], &expected = exact.parameters()[i];
        EXPECT_LE(max_difference(got.grad, expected.grad), of_gradient * max_abs(expected.grad))
            << arch_name(arch) << " " << dtype_name(dtype) << " " << got.name;
      }
    }
  }
}

// The f32 logits must not depend on the number of threads beyond rounding, nor change from run to run.
TEST(Gpt, ThreadsAndRepetition) {
  const auto cpu = make_cpu_backend();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Gpt model(tiny_config(Arch::modern), *cpu, dtype);
    randomize(model, 1);
    const Batch data = random_batch(model.config(), 3, 33, 2);
    const auto gradients = [&] {
      model.zero_grad();
      Tape tape(*cpu, true);
      model.nll(tape, data.ids, data.targets, 1);
      tape.backward();
      std::vector<Tensor> all;
      for (const Parameter& p : model.parameters()) all.push_back(duplicate(p.grad));
      return all;
    };
    for (const int threads : {1, 2}) {
      const Threads scope(threads);
      const std::vector<Tensor> first = gradients();
      for (int repeat = 0; repeat < 3; ++repeat) {
        const std::vector<Tensor> next = gradients();
        for (size_t i = 0; i < first.size(); ++i) {
          EXPECT_TRUE(same_bits(next[i], first[i]))
              << model.parameters()[i].name << ", " << threads << " threads";
        }
      }
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------

struct Moments {
  double mean = 0, deviation = 0;
};
Moments moments_of(const Tensor& x) {
  Moments m;
  const auto n = static_cast<double>(x.numel());
  for (int64_t i = 0; i < x.numel(); ++i) m.mean += x.get(i) / n;
  for (int64_t i = 0; i < x.numel(); ++i) m.deviation += (x.get(i) - m.mean) * (x.get(i) - m.mean) / n;
  m.deviation = std::sqrt(m.deviation);
  return m;
}

// Mean and deviation within 5 standard errors.
void expect_moments(const Parameter& p, double mean, double deviation) {
  const Moments m = moments_of(p.value);
  const double error = 5 * deviation / std::sqrt(static_cast<double>(p.value.numel()));
  EXPECT_NEAR(m.mean, mean, error) << p.name;
  EXPECT_NEAR(m.deviation, deviation, error) << p.name;
}

GptConfig wide_config(Arch arch) {
  GptConfig config = tiny_config(arch);
  config.n_embd = 64;
  config.vocab_size = 250;
  return config;
}

TEST(GptInit, Classic) {
  const auto cpu = make_cpu_backend();
  Gpt model(wide_config(Arch::classic), *cpu, DType::f32);
  model.init_weights(42);
  expect_moments(model.parameter("transformer.wte.weight"), 0, 1);
  expect_moments(model.parameter("transformer.h.0.attn.c_q.weight"), 0, 0.125);
  // min(1, sqrt(out / in)) / sqrt(in)
  expect_moments(model.parameter("transformer.h.1.attn.c_k.weight"), 0, std::sqrt(0.5) * 0.125);
  expect_moments(model.parameter("transformer.h.2.attn.c_v.weight"), 0, std::sqrt(0.5) * 0.125);
  expect_moments(model.parameter("transformer.h.0.mlp.c_fc.weight"), 0, 0.125);
  EXPECT_EQ(max_abs(model.parameter("lm_head.weight").value), 0);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(max_abs(model.parameter(fmt::format("transformer.h.{}.attn.c_proj.weight", i)).value), 0);
    EXPECT_EQ(max_abs(model.parameter(fmt::format("transformer.h.{}.mlp.c_proj.weight", i)).value), 0);
  }
  // No two parameters share their numbers.
  EXPECT_NE(model.parameter("transformer.h.0.attn.c_q.weight").value.get(0),
            model.parameter("transformer.h.1.attn.c_q.weight").value.get(0));
}

TEST(GptInit, Modern) {
  const auto cpu = make_cpu_backend();
  Gpt model(wide_config(Arch::modern), *cpu, DType::f32);
  model.init_weights(42);
  const double s = std::sqrt(3.0 / 64);
  expect_moments(model.parameter("transformer.wte.weight"), 0, 0.8);
  expect_moments(model.parameter("lm_head.weight"), 0, 0.001);
  for (const char* name :
       {"transformer.h.0.attn.c_q.weight", "transformer.h.1.attn.c_k.weight",
        "transformer.h.2.attn.c_v.weight", "value_embeds.0.weight", "value_embeds.2.weight"}) {
    expect_moments(model.parameter(name), 0, 0.125);
    const double largest = max_abs(model.parameter(name).value);
    EXPECT_LE(largest, s * 1.000001) << name << " is uniform";
    EXPECT_GT(largest, 0.99 * s) << name;
  }
  expect_moments(model.parameter("transformer.h.1.mlp.c_fc.weight"), 0, 0.4 * 0.125);
  EXPECT_LE(max_abs(model.parameter("transformer.h.1.mlp.c_fc.weight").value), 0.4 * s * 1.000001);
  for (const char* name : {"smear_gate.weight", "transformer.h.2.attn.ve_gate.weight"}) {
    expect_moments(model.parameter(name), 0.01, 0.02 / std::sqrt(12.0));
    for (int64_t i = 0; i < 24; ++i) EXPECT_GE(model.parameter(name).value.get(i), 0);
  }
  EXPECT_EQ(model.parameter("smear_lambda").value.get(0), 0);
  EXPECT_FLOAT_EQ(static_cast<float>(model.parameter("backout_lambda").value.get(0)), 0.2f);
  for (const auto& [i, resid, x0] : {std::tuple{0, 1.15, 0.20}, {1, 1.10, 0.125}, {2, 1.05, 0.05}}) {
    EXPECT_NEAR(model.parameter("resid_lambdas").value.get(i), resid, 1e-6);
    EXPECT_NEAR(model.parameter("x0_lambdas").value.get(i), x0, 1e-6);
  }
  EXPECT_EQ(max_abs(model.parameter("transformer.h.1.attn.c_proj.weight").value), 0);
  EXPECT_EQ(max_abs(model.parameter("transformer.h.2.mlp.c_proj.weight").value), 0);
}

TEST(GptInit, InitialLossIsThatOfGuessing) {
  const auto cpu = make_cpu_backend();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Gpt model(tiny_config(Arch::classic), *cpu, dtype);
    model.init_weights(1);
    const Batch data = random_batch(model.config(), 2, 9, 1);
    Tape tape(*cpu, false);
    const Tensor nll = model.nll(tape, data.ids, data.targets, 1);
    for (int64_t i = 0; i < nll.numel(); ++i) {
      EXPECT_NEAR(nll.get(i), data.targets.get(i) < 0 ? 0 : std::log(37.0), 1e-6);
    }
  }
}

TEST(GptInit, SameSeedSameBitsOnEveryBackend) {
  const auto cpu = make_cpu_backend(), reference = make_reference_backend();
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    Gpt a(tiny_config(arch), *cpu, DType::f32), b(tiny_config(arch), *cpu, DType::bf16),
        c(tiny_config(arch), *cpu, DType::f32), exact(tiny_config(arch), *reference, DType::f64);
    a.init_weights(7);
    b.init_weights(7);
    c.init_weights(8);
    exact.init_weights(7);
    bool differs = false;
    for (size_t i = 0; i < a.parameters().size(); ++i) {
      EXPECT_TRUE(same_bits(a.parameters()[i].value, b.parameters()[i].value)) << a.parameters()[i].name;
      EXPECT_TRUE(same_bits(a.parameters()[i].value, converted(exact.parameters()[i].value, DType::f32)));
      differs = differs || !same_bits(a.parameters()[i].value, c.parameters()[i].value);
    }
    EXPECT_TRUE(differs);
  }
}

TEST(GptParameters, NamesInStateDictOrder) {
  const auto cpu = make_cpu_backend();
  const auto names = [&](Arch arch) {
    GptConfig config = tiny_config(arch);
    config.n_layer = 2;
    Gpt model(config, *cpu, DType::f32);
    std::vector<std::string> all;
    for (const Parameter& p : model.parameters()) all.push_back(p.name);
    return all;
  };
  EXPECT_EQ(names(Arch::classic),
            (std::vector<std::string>{"transformer.wte.weight", "transformer.h.0.attn.c_q.weight",
                                      "transformer.h.0.attn.c_k.weight", "transformer.h.0.attn.c_v.weight",
                                      "transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight",
                                      "transformer.h.0.mlp.c_proj.weight", "transformer.h.1.attn.c_q.weight",
                                      "transformer.h.1.attn.c_k.weight", "transformer.h.1.attn.c_v.weight",
                                      "transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_fc.weight",
                                      "transformer.h.1.mlp.c_proj.weight", "lm_head.weight"}));
  EXPECT_EQ(names(Arch::modern), (std::vector<std::string>{"resid_lambdas",
                                                           "x0_lambdas",
                                                           "smear_lambda",
                                                           "backout_lambda",
                                                           "transformer.wte.weight",
                                                           "transformer.h.0.attn.c_q.weight",
                                                           "transformer.h.0.attn.c_k.weight",
                                                           "transformer.h.0.attn.c_v.weight",
                                                           "transformer.h.0.attn.c_proj.weight",
                                                           "transformer.h.0.mlp.c_fc.weight",
                                                           "transformer.h.0.mlp.c_proj.weight",
                                                           "transformer.h.1.attn.c_q.weight",
                                                           "transformer.h.1.attn.c_k.weight",
                                                           "transformer.h.1.attn.c_v.weight",
                                                           "transformer.h.1.attn.c_proj.weight",
                                                           "transformer.h.1.attn.ve_gate.weight",
                                                           "transformer.h.1.mlp.c_fc.weight",
                                                           "transformer.h.1.mlp.c_proj.weight",
                                                           "lm_head.weight",
                                                           "smear_gate.weight",
                                                           "value_embeds.1.weight"}));
}

TEST(GptParameters, CountsMatchTheConfiguration) {
  const auto cpu = make_cpu_backend();
  for (const Arch arch : {Arch::classic, Arch::modern}) {
    Gpt model(tiny_config(arch), *cpu, DType::f32);
    int64_t total = 0;
    for (const Parameter& p : model.parameters()) total += p.value.numel();
    EXPECT_EQ(total, count_params(model.config()).total());
    EXPECT_EQ(message_of<Error>([&] { model.parameter("lm_heat.weight"); }),
              "no parameter 'lm_heat.weight' (did you mean 'lm_head.weight'?)");
  }
}

// A failed load leaves the model as it was.
TEST(GptParameters, LoadTakesAllOrNothing) {
  const auto cpu = make_cpu_backend();
  Gpt model(tiny_config(Arch::modern), *cpu, DType::bf16);
  randomize(model, 1);
  const Tensor ids = random_batch(model.config(), 1, 5, 1).ids, before = model.logits(ids);
  EXPECT_THROW(model.load([&](const std::string& name, const Shape& shape) {
    if (name == "lm_head.weight") fail("no lm_head");
    return filled_tensor(shape, DType::f32, 0.5);
  }),
               Error);
  EXPECT_TRUE(same_bits(model.logits(ids), before));
  randomize(model, 2);
  EXPECT_GT(max_difference(model.logits(ids), before), 0.1);
}

TEST(GptParameters, ComputeCopiesFollowWeightsChanged) {
  const auto cpu = make_cpu_backend();
  Gpt model(tiny_config(Arch::classic), *cpu, DType::bf16);
  randomize(model, 1);
  const Tensor ids = random_batch(model.config(), 1, 5, 1).ids, before = model.logits(ids);
  const Tensor head = model.parameter("lm_head.weight").value;
  cpu->axpby(-1, head, 0, head);
  model.weights_changed();
  const Tensor after = model.logits(ids);
  for (int64_t i = 0; i < after.numel(); ++i) ASSERT_EQ(after.get(i), -before.get(i));
}

TEST(Gpt, RefusesAnotherPrecisionThanTheBackends) {
  const auto cpu = make_cpu_backend(), reference = make_reference_backend();
  EXPECT_EQ(message_of<Error>([&] { Gpt(tiny_config(Arch::classic), *cpu, DType::f64); }),
            "the cpu backend does not compute in f64");
  EXPECT_EQ(message_of<Error>([&] { Gpt(tiny_config(Arch::classic), *reference, DType::f32); }),
            "the reference backend does not compute in f32");
  Gpt model(tiny_config(Arch::classic), *cpu, DType::f32);
  Tape tape(*cpu, false);
  EXPECT_EQ(message_of<Error>([&] {
              model.nll(tape, filled_tensor({2, 3}, DType::i32, 0), filled_tensor({3, 2}, DType::i32, 0), 1);
            }),
            "ids (2, 3) and targets (3, 2) must both be (B, T)");
}

TEST(Gpt, IdsOutsideTheVocabularyAreRefused) {
  const auto backend = make_cpu_backend();
  Gpt model({Arch::classic, 8, 37, 1, 2, 2, 16, ""}, *backend, DType::f32);
  model.init_weights(1);
  const Tensor ids(host_arena(), {1, 3}, DType::i32), targets(host_arena(), {1, 3}, DType::i32);
  for (int64_t i = 0; i < 3; ++i) {
    ids.set(i, 36);
    targets.set(i, -1);
  }
  EXPECT_NO_THROW(model.logits(ids));
  for (const double bad : {37.0, -1.0, 64.0}) {
    ids.set(1, bad);
    EXPECT_THROW(model.logits(ids), Error);
  }
  ids.set(1, 0);
  targets.set(2, 37);
  Tape tape(*backend, false);
  EXPECT_THROW(model.nll(tape, ids, targets, 1), Error);
}

}  // namespace
}  // namespace flexchat
