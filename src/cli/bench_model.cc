#include "cli/bench_model.h"

#include <fmt/core.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "backend/timing.h"
#include "base/error.h"
#include "models/run_options.h"
#include "report/table.h"

namespace flexchat {

void draw_weights(Gpt& model, Rng& rng) {
  for (Parameter& p : model.parameters()) {
    const Tensor host(host_arena(), p.value.shape(), DType::f32);
    for (int64_t i = 0; i < host.numel(); ++i) host.set(i, 0.02 * rng.normal());
    model.backend().copy(host, p.value);
  }
  model.weights_changed();
}

Tensor draw_ids(Rng& rng, int64_t rows, int64_t columns, int64_t vocab_size) {
  const Tensor t(host_arena(), {rows, columns}, DType::i32);
  for (int64_t i = 0; i < t.numel(); ++i)
    t.as<int32_t>()[i] = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab_size)));
  return t;
}

void AttentionModelBench::declare(Options& o) {
  config.n_layer = 8;
  config.n_head = 8;
  config.n_kv_head = 4;
  config.n_embd = 512;
  config.vocab_size = 4096;
  config.sequence_len = 512;
  const auto size = [&](const char* name, int64_t* target, const char* help) {
    o.add(name, target, help).at_least(1).group("Whole model");
  };
  size("--n-layer", &config.n_layer, "blocks");
  size("--n-head", &config.n_head, "query heads");
  size("--n-kv-head", &config.n_kv_head, "key and value heads");
  size("--n-embd", &config.n_embd, "width");
  size("--vocab-size", &config.vocab_size, "vocabulary");
  size("--sequence-len", &config.sequence_len, "tokens of a row");
  size("--batch", &batch, "rows");
}

int AttentionModelBench::run(Backend& backend, DType dtype, const std::vector<std::string>& paths,
                             const std::string& kernel, int repeats, Json summary,
                             const BenchOutput& output) const {
  config.validate();
  std::vector<std::unique_ptr<Gpt>> models;
  std::vector<std::function<void()>> forwards, steps;
  std::vector<int64_t> peaks;
  Rng rng(1, /*stream=*/1 << 20);
  const Tensor ids = draw_ids(rng, batch, config.sequence_len, config.vocab_size),
               targets = draw_ids(rng, batch, config.sequence_len, config.vocab_size);
  const auto tokens = static_cast<double>(ids.numel());
  for (const std::string& path : paths) {
    check(path == "sdpa" || path == "flex",
          "--mods: '{}' is no path of a model's attention; allowed with --model: sdpa, flex", path);
    Rng weights(2, /*stream=*/1 << 20);  // the same for all
    Gpt& model = *models.emplace_back(std::make_unique<Gpt>(config, backend, dtype));
    model.set_attention(path == "flex" ? AttentionPath::flex : AttentionPath::sdpa, kernel);
    draw_weights(model, weights);
    const auto step = [&model, &backend, &ids, &targets, tokens](bool training) {
      Tape tape(backend, training);
      model.nll(tape, ids, targets, 1.0 / tokens);
      if (training) tape.backward();
    };
    forwards.emplace_back([step] { step(false); });
    steps.emplace_back([step] { step(true); });
    steps.back()();  // compiles, tunes
    const auto before = static_cast<int64_t>(backend.arena().stats().in_use);
    backend.arena().reset_peak();
    steps.back()();
    peaks.push_back(static_cast<int64_t>(backend.arena().stats().peak) - before);
  }
  const std::vector<double> forward = median_seconds_in_turn(backend, forwards, repeats),
                            step = median_seconds_in_turn(backend, steps, repeats);

  Json rows = Json::array();
  Table table({"mod", "kernel", "forward ms", "tok/s", "TFLOP/s", "step ms", "tok/s", "TFLOP/s", "peak MB"});
  const double flops = flops_per_token(config) * tokens;  // of forward and backward
  for (size_t i = 0; i < paths.size(); ++i) {
    const Json attention = attention_record(*models[i]);
    const double peak_mb = static_cast<double>(peaks[i]) / 1e6;
    table.row({paths[i], attention["kernel"].get<std::string>(), fmt::format("{:.3f}", 1e3 * forward[i]),
               format_number(tokens / forward[i]), fmt::format("{:.3g}", flops / 3 / forward[i] / 1e12),
               fmt::format("{:.3f}", 1e3 * step[i]), format_number(tokens / step[i]),
               fmt::format("{:.3g}", flops / step[i] / 1e12), fmt::format("{:.1f}", peak_mb)});
    rows.push_back({{"mod", paths[i]},
                    {"kernel", attention["kernel"]},
                    {"reason", attention["reason"]},
                    {"forward_ms", 1e3 * forward[i]},
                    {"forward_tok_s", tokens / forward[i]},
                    {"forward_tflops", flops / 3 / forward[i] / 1e12},
                    {"fwd_bwd_ms", 1e3 * step[i]},
                    {"fwd_bwd_tok_s", tokens / step[i]},
                    {"fwd_bwd_tflops", flops / step[i] / 1e12},
                    {"peak_mb", peak_mb}});
  }
  summary["parameters"] = count_params(config).total();
  summary["rows"] = rows;
  return output.finish(summary, table);
}

}  // namespace flexchat
