// flexchat bench: model here (speed and memory of a whole model on random data), the others in bench_*.cc.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "backend/device_options.h"
#include "base/error.h"
#include "base/options.h"
#include "base/strings.h"
#include "cli/bench_model.h"
#include "cli/command.h"
#include "engine/generate.h"
#include "models/gpt.h"
#include "models/run_options.h"
#include "report/environment.h"
#include "report/run_folder.h"
#include "report/table.h"

namespace flexchat {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

struct ModelBench {
  GptConfig config;
  DeviceOptions compute;
  AttentionOptions attention;
  HeadLossOptions loss;
  std::string arch = "classic", run_id, runs = "runs";
  int64_t batch = 8, steps = 8, prompt = 64, new_tokens = 200, seed = 1;
  bool json = false;

  void declare(Options& o) {
    config.n_layer = 4;
    config.n_head = config.n_kv_head = 2;
    config.n_embd = 256;
    config.vocab_size = 4096;
    config.sequence_len = 256;
    o.add("--arch", &arch, "model variant").choices({"classic", "modern"});
    o.add("--n-layer", &config.n_layer, "blocks").at_least(1);
    o.add("--n-head", &config.n_head, "query heads").at_least(1);
    o.add("--n-kv-head", &config.n_kv_head, "key and value heads").at_least(1);
    o.add("--n-embd", &config.n_embd, "width").at_least(1);
    o.add("--vocab-size", &config.vocab_size, "vocabulary").at_least(2);
    o.add("--sequence-len", &config.sequence_len, "tokens of a row").at_least(2);
    o.add("--batch", &batch, "rows of a training step").at_least(1);
    o.add("--steps", &steps, "timed training steps; the median counts").at_least(1);
    o.add("--prompt", &prompt, "tokens before decoding").at_least(1);
    o.add("--new-tokens", &new_tokens, "decoded tokens").at_least(1);
    compute.declare(o);
    attention.declare(o);
    loss.declare(o);
    o.add("--seed", &seed, "of weights and data").at_least(0);
    o.add("--run-id", &run_id, "name of the run folder (default: time and a random word)");
    o.add("--runs", &runs, "folder that holds run folders").not_recorded();
    o.add("--json", &json, "print the summary as JSON instead of the table").not_recorded();
  }
};

struct StepResult {
  double seconds = 0;      // median of forward and backward
  double loss = 0;         // mean, of the last step
  int64_t peak_bytes = 0;  // activations and temporaries above weights and gradients
};

StepResult bench_step(Gpt& model, const Tensor& ids, const Tensor& targets, int64_t steps,
                      bool checkpointing) {
  model.set_checkpoint_activations(checkpointing);
  Backend& backend = model.backend();
  Arena& arena = backend.arena();
  const auto before = static_cast<int64_t>(arena.stats().in_use);
  arena.reset_peak();
  StepResult result;
  std::vector<double> times;
  for (int64_t i = 0; i < steps + 2; ++i) {  // two steps to warm up
    backend.synchronize();
    const auto start = Clock::now();
    Tape tape(backend, true);
    const Tensor nll = model.nll(tape, ids, targets, 1.0 / static_cast<double>(ids.numel()));
    tape.backward();
    backend.synchronize();
    if (i >= 2) times.push_back(seconds_since(start));
    const Tensor host = backend.to_host(nll);
    result.loss = 0;
    for (int64_t n = 0; n < host.numel(); ++n) result.loss += host.get(n);
    result.loss /= static_cast<double>(nll.numel());
  }
  result.seconds = median(times);
  result.peak_bytes = static_cast<int64_t>(arena.stats().peak) - before;
  return result;
}

int bench_model(const Words& words) {
  ModelBench c;
  Options options(
      "flexchat bench model",
      "Forward and backward, greedy decoding and activation memory of a model with random weights.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  if (!options.given("--n-kv-head")) c.config.n_kv_head = c.config.n_head;
  c.config.arch = parse_arch(c.arch);
  const auto backend = c.compute.open();
  Gpt model(c.config, *backend, c.compute.compute_dtype());
  c.attention.apply(model);
  c.loss.apply(model);
  model.init_weights(static_cast<uint64_t>(c.seed));
  Rng rng(static_cast<uint64_t>(c.seed), /*stream=*/1 << 20);
  draw_weights(model, rng);
  const Tensor ids = draw_ids(rng, c.batch, c.config.sequence_len, c.config.vocab_size),
               targets = draw_ids(rng, c.batch, c.config.sequence_len, c.config.vocab_size);
  const StepResult plain = bench_step(model, ids, targets, c.steps, false);
  const StepResult saving = bench_step(model, ids, targets, c.steps, true);
  check(plain.loss == saving.loss, "activation checkpointing changed the loss: {} and {}", plain.loss,
        saving.loss);
  const Json trained_by = attention_record(model);

  std::vector<int32_t> prompt(ids.as<int32_t>(), ids.as<int32_t>() + std::min(c.prompt, ids.numel()));
  Clock::time_point decode_start;
  int64_t produced = 0;
  generate(model, prompt, c.new_tokens + 1, {0.0, 0, 0}, [&](int32_t) {
    if (produced++ == 0) decode_start = Clock::now();  // the first token belongs to the prefill
    return true;
  });
  const double decode_rate = static_cast<double>(produced - 1) / seconds_since(decode_start);

  const auto tokens = static_cast<double>(ids.numel());
  const double flops = flops_per_token(c.config);
  const Json summary = {{"result", "done"},
                        {"device", backend->name()},
                        {"options", options.to_json()},
                        {"attention", trained_by},
                        {"loss", loss_record(model.loss_plan(ids.numel(), true))},
                        {"parameters", count_params(c.config).total()},
                        {"fwd_bwd_ms", plain.seconds * 1e3},
                        {"fwd_bwd_tok_s", tokens / plain.seconds},
                        {"fwd_bwd_gflop_s", tokens / plain.seconds * flops / 1e9},
                        {"fwd_bwd_checkpoint_tok_s", tokens / saving.seconds},
                        {"activation_peak_mb", static_cast<double>(plain.peak_bytes) / 1e6},
                        {"activation_peak_checkpoint_mb", static_cast<double>(saving.peak_bytes) / 1e6},
                        {"loss_bits_equal", true},
                        {"decode_tok_s", decode_rate}};
  const RunFolder run = RunFolder::create("bench", c.run_id, RunMode::fresh, c.runs);
  run.write_summary(summary);
  if (c.json) {
    fmt::print("{}\n", summary.dump(2));
    return 0;
  }
  Table table({"work", "tok/s", "GFLOP/s", "activations"});
  table.row({"forward + backward", format_number(tokens / plain.seconds),
             format_number(tokens / plain.seconds * flops / 1e9),
             format_bytes(static_cast<double>(plain.peak_bytes))});
  table.row({"the same, checkpointed", format_number(tokens / saving.seconds),
             format_number(tokens / saving.seconds * flops / 1e9),
             format_bytes(static_cast<double>(saving.peak_bytes))});
  table.row({"decode, batch 1", format_number(decode_rate),
             format_number(decode_rate * decode_flops_per_token(c.config, c.prompt) / 1e9), "-"});
  fmt::print("{}run folder {}\n", table.text(), run.path().string());
  return 0;
}

}  // namespace

int cmd_bench(const Words& words) {
  return run_subcommand("bench",
                        {{"model", bench_model, "forward and backward, decoding and memory of a whole model"},
                         {"train", bench_train, "whole training steps, over sweeps of batch and length"},
                         {"attention", bench_attention, "attention by shape, mod and kernel"},
                         {"loss", bench_loss, "the output head and its loss, by backend"},
                         {"ops", bench_ops, "element-wise, norm and loss kernels against a copy"}},
                        words);
}

}  // namespace flexchat
