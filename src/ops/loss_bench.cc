#include "ops/loss_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

constexpr double kSoftcap = 15;
constexpr int kWarmUps = 3;  // load kernels; tune, at a product's second use; take the memory

Tensor random_targets(Backend& backend, int64_t n, int64_t vocab) {
  Rng rng(1, 3);
  const Tensor targets(host_arena(), {n}, DType::i32);
  for (int64_t i = 0; i < n; ++i) {
    targets.as<int32_t>()[i] = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
  }
  return backend.to_device(targets);
}

}  // namespace

LossTiming time_loss(Backend& backend, int64_t n, int64_t c, int64_t vocab, DType dtype,
                     const LossOptions& options, int repeats) {
  check(n > 0 && c > 0 && vocab > 0 && repeats > 0, "a loss of {} x {} x {}, {} times: all must be above 0",
        n, c, vocab, repeats);
  const DType master = backend.master_dtype();
  const Tensor h = backend.empty({n, c}, dtype), value = backend.empty({vocab, c}, master);
  backend.draw({Distribution::normal, 0, 1}, 1, 1, h);
  backend.draw({Distribution::normal, 0, 1 / std::sqrt(static_cast<double>(c))}, 1, 2, value);
  const Tensor targets = random_targets(backend, n, vocab);
  Weight head{value, backend.zeros({vocab, c}, master), value};
  if (dtype != master) {
    head.compute = backend.empty({vocab, c}, dtype);
    backend.copy(value, head.compute);
  }
  LossTiming timing;
  Tensor nll;
  int64_t extra = 0;
  const auto pass = [&] {
    backend.arena().reset_peak();
    Tape tape(backend, true);
    tape.set_fresh(true);
    const Var x = Tape::leaf(h);
    LossResult result =
        linear_cross_entropy(tape, x, head, targets, vocab, kSoftcap, 1 / static_cast<double>(n), options);
    tape.backward();
    // The results are still held: what is above them now was temporary.
    const Arena::Stats stats = backend.arena().stats();
    extra = static_cast<int64_t>(stats.peak - stats.in_use);
    timing.plan = std::move(result.plan);
    nll = result.nll;
  };
  for (int i = 0; i < kWarmUps; ++i) pass();
  timing.extra_bytes = extra;
  std::vector<double> times;
  const std::unique_ptr<StepGraph> graph = backend.capture(pass);
  for (int i = 0; i < repeats; ++i) {
    backend.synchronize();
    const auto start = std::chrono::steady_clock::now();
    graph->replay();
    backend.synchronize();
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    times.push_back(time.count());
  }
  std::sort(times.begin(), times.end());
  timing.ms = times[times.size() / 2];
  const auto flops = 6 * static_cast<double>(n) * static_cast<double>(c) * static_cast<double>(vocab);
  timing.tflops = flops / timing.ms * 1e-9;
  const Tensor host_nll = backend.to_host(nll);
  nll = Tensor();  // the graph's memory goes with the graph
  for (int64_t i = 0; i < n; ++i) timing.mean_nll += host_nll.get(i) / static_cast<double>(n);
  return timing;
}

}  // namespace flexchat
