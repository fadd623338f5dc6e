// Microbenchmarks of the CPU backend's kernels, with bytes and FLOPs so that each line reads against the
// machine's ceilings. Usage: cmake --build --preset cpu --target ops_bench && build/cpu/ops_bench
#include <benchmark/benchmark.h>

#include <cmath>

#include "backend/backend.h"
#include "base/rng.h"
#include "flex/mods.h"

namespace flexchat {
namespace {

Backend& backend() {
  static const auto instance = make_cpu_backend();
  return *instance;
}

Tensor random(const Shape& shape, DType dtype = DType::f32) {
  static Rng rng(1);
  const Tensor t = backend().empty(shape, dtype);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, 0.1 * rng.normal());
  return t;
}

void report(benchmark::State& state, double flops, double bytes) {
  const auto runs = static_cast<double>(state.iterations());
  state.counters["GFLOP/s"] = benchmark::Counter(flops * runs / 1e9, benchmark::Counter::kIsRate);
  state.counters["GB/s"] = benchmark::Counter(bytes * runs / 1e9, benchmark::Counter::kIsRate);
}

// (M, N, K): M = 1 is decoding.
void matmul(benchmark::State& state) {
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  const Tensor a = random({m, k}), b = random({n, k}), c = random({m, n});
  for (auto _ : state) backend().matmul(a, Trans::no, b, Trans::yes, 0, c);
  report(state, 2.0 * static_cast<double>(m * n * k), 4.0 * static_cast<double>(m * k + n * k + m * n));
}
BENCHMARK(matmul)
    ->Args({1, 4096, 256})
    ->Args({1, 256, 1024})
    ->Args({2048, 768, 256})
    ->Args({512, 4096, 256})
    ->UseRealTime();

void rms_norm(benchmark::State& state) {
  const int64_t n = state.range(0), c = state.range(1);
  const Tensor x = random({n, c}), y = random({n, c}), rstd = random({n});
  for (auto _ : state) backend().rms_norm(x, y, rstd);
  report(state, 4.0 * static_cast<double>(n * c), 8.0 * static_cast<double>(n * c));
}
BENCHMARK(rms_norm)->Args({2048, 256})->Args({2048, 1280})->UseRealTime();

void cross_entropy(benchmark::State& state) {
  const int64_t n = state.range(0), v = state.range(1);
  const Tensor logits = random({n, v}), nll = random({n}), targets(host_arena(), {n}, DType::i32);
  backend().fill(targets, 3);
  for (auto _ : state) backend().cross_entropy(logits, targets, 15, 1e-3, nll, &logits);
  report(state, 40.0 * static_cast<double>(n * v), 8.0 * static_cast<double>(n * v));
}
BENCHMARK(cross_entropy)->Args({512, 4096})->Args({128, 65536})->UseRealTime();

// Specs of attention to compare: the built-in causal mask, the same as an expression, a score mod on top.
enum AttentionKind { built_in, expression, soft_cap };

AttentionSpec attention_spec(AttentionKind kind, int64_t head_dim) {
  AttentionSpec spec;
  spec.scale = 1 / std::sqrt(static_cast<double>(head_dim));
  spec.causal = kind == built_in;
  if (kind != built_in) spec.mask = flex::causal();
  if (kind == soft_cap) spec.score_mod = flex::softcap(30);
  return spec;
}

// (T, D, backward, kind) with 8 rows and 4 heads; half the square counts, backward 2.5 times forward.
void attention(benchmark::State& state) {
  const bool backward = state.range(2) != 0;
  AttentionShape s;
  s.batch = 8;
  s.q_len = s.kv_len = state.range(0);
  s.n_head = s.n_kv_head = 4;
  s.head_dim = state.range(1);
  const auto kind = static_cast<AttentionKind>(state.range(3));
  const auto plan = backend().plan_attention(s, attention_spec(kind, s.head_dim));
  const int64_t width = s.n_head * s.head_dim;
  const Tensor x = random({s.batch, s.q_len, 3 * width}), out = random({s.batch, s.q_len, width});
  const Tensor dx = random({s.batch, s.q_len, 3 * width}), dout = random({s.batch, s.q_len, width});
  const Tensor lse = random({s.batch, s.n_head, s.q_len});
  const AttentionTensors tensors = {heads_view(x), heads_view(x, width), heads_view(x, 2 * width),
                                    heads_view(out), &lse};
  const AttentionGradients grads = {heads_view(dout),          nullptr, heads_view(dx), heads_view(dx, width),
                                    heads_view(dx, 2 * width), {}};
  backend().attention(*plan, tensors);
  for (auto _ : state) {
    if (backward) {
      backend().attention_backward(*plan, tensors, grads);
    } else {
      backend().attention(*plan, tensors);
    }
  }
  const double flops = 2.0 * static_cast<double>(s.batch * s.n_head * s.q_len * s.q_len * s.head_dim);
  report(state, backward ? 2.5 * flops : flops,
         static_cast<double>(x.bytes() + out.bytes()) * (backward ? 2 : 1));
}
BENCHMARK(attention)
    ->ArgsProduct({{256}, {128}, {0, 1}, {built_in}})
    ->ArgsProduct({{1024}, {64}, {0, 1}, {built_in, expression, soft_cap}})
    ->UseRealTime();

}  // namespace
}  // namespace flexchat

BENCHMARK_MAIN();
