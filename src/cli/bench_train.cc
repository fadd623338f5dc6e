// flexchat bench train: whole optimizer steps of a model with random weights on random tokens: forward,
// backward and update, over sweeps of batch and sequence length.
#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <nlohmann/json.hpp>
#include <sstream>

#include "backend/device_options.h"
#include "base/error.h"
#include "base/options.h"
#include "base/rng.h"
#include "base/strings.h"
#include "cli/bench_output.h"
#include "cli/command.h"
#include "models/run_options.h"
#include "optim/budget.h"
#include "report/environment.h"
#include "report/table.h"
#include "train/step.h"

namespace flexchat {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Point {
  int64_t batch, sequence_len;
};

// "b=1,2,4 t=512,1024": every combination.
std::vector<Point> parse_sweep(const std::string& text) {
  std::vector<int64_t> batches, lengths;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    check(word.starts_with("b=") || word.starts_with("t="),
          "--sweep: '{}' is not of the form b=1,2 or t=512,1024", word);
    auto& values = word[0] == 'b' ? batches : lengths;
    std::istringstream numbers(word.substr(2));
    for (std::string number; std::getline(numbers, number, ',');) {
      int64_t value = 0;
      const auto [rest, error] = std::from_chars(number.data(), number.data() + number.size(), value);
      check(error == std::errc() && rest == number.data() + number.size() && value > 0,
            "--sweep: '{}' is not a whole number above 0", number);
      values.push_back(value);
    }
  }
  check(!batches.empty() && !lengths.empty(), "--sweep needs both, as in \"b=1,2,4 t=512,1024\"");
  std::vector<Point> points;
  for (const int64_t t : lengths) {
    for (const int64_t b : batches) points.push_back({b, t});
  }
  return points;
}

struct TrainBench {
  DeviceOptions compute;
  BenchOutput output;
  AttentionOptions attention;
  HeadLossOptions loss;
  std::string arch = "classic", sweep = "b=8 t=1024";
  int64_t depth = 4, vocab_size = 65536, steps = 8, micro_batches = 1;
  bool cuda_graph = true, checkpoint_activations = false;

  void declare(Options& o) {
    o.add("--arch", &arch, "model variant").choices({"classic", "modern"});
    o.add("--depth", &depth, "blocks; width and heads follow").at_least(1);
    o.add("--vocab-size", &vocab_size, "vocabulary").at_least(2);
    o.add("--sweep", &sweep, "rows of a micro batch and tokens of a row: \"b=1,2,4 t=512,1024\"");
    o.add("--micro-batches", &micro_batches, "of a step").at_least(1);
    o.add("--steps", &steps, "timed steps; the median counts").at_least(1);
    o.add("--cuda-graph", &cuda_graph, "on CUDA record a step's kernels once and replay them");
    o.add("--checkpoint-activations", &checkpoint_activations, "recompute blocks in backward");
    compute.declare(o);
    attention.declare(o);
    loss.declare(o);
    output.declare(o);
  }
};

Json bench_point(const TrainBench& c, Backend& backend, const Point& point) {
  const auto start = Clock::now();
  const GptConfig config =
      config_for_depth(parse_arch(c.arch), c.depth, point.sequence_len, c.vocab_size, {});
  backend.arena().reset_peak();
  Gpt model(config, backend, c.compute.compute_dtype());
  model.set_checkpoint_activations(c.checkpoint_activations);
  c.attention.apply(model);
  c.loss.apply(model);
  model.init_weights(1);
  std::vector<Parameter*> parameters;
  uint64_t stream = 1000;
  for (Parameter& p : model.parameters()) {  // no zero matrices: real data in every product
    if (p.value.rank() == 2) backend.draw({Distribution::normal, 0, 0.02}, 1, stream++, p.value);
    parameters.push_back(&p);
  }
  model.weights_changed();
  OptimizerConfig optimizer_config = OptimizerConfig::base_defaults(config.arch, config.n_embd);
  const DType compute = c.compute.compute_dtype();
  optimizer_config.muon_dtype = compute == DType::f64 || compute == DType::bf16 ? compute : DType::f32;
  Optimizer optimizer(backend, parameters, optimizer_config);
  TrainStep step(model, optimizer, point.batch, point.sequence_len, c.micro_batches, c.cuda_graph);
  Rng rng(2);
  const auto random_ids = [&] {
    const Tensor t(host_arena(), {point.batch, point.sequence_len}, DType::i32);
    for (int64_t i = 0; i < t.numel(); ++i) {
      t.as<int32_t>()[i] = static_cast<int32_t>(rng.below(static_cast<uint64_t>(c.vocab_size)));
    }
    return t;
  };
  const Tensor ids = random_ids(), targets = random_ids();
  StepRates rates;
  rates.limits.max_norm = config.arch == Arch::classic ? 1.0 : 0.0;
  if (compute == DType::f16) rates.limits.loss_scale = 1024;
  const auto one = [&] {
    step.begin();
    for (int64_t i = 1; i < c.micro_batches; ++i) step.add(ids, targets, rates.limits.loss_scale);
    step.finish(ids, targets, rates);
    return step.result();
  };
  TrainStep::Result last = one();
  const double first_step = seconds_since(start);
  last = one();  // records
  std::vector<double> seconds;
  for (int64_t i = 0; i < c.steps; ++i) {
    const auto begin = Clock::now();
    last = one();
    seconds.push_back(seconds_since(begin));
  }
  std::nth_element(seconds.begin(), seconds.begin() + std::ssize(seconds) / 2, seconds.end());
  const double median = seconds[seconds.size() / 2];
  const auto tokens = static_cast<double>(point.batch * point.sequence_len * c.micro_batches);
  const double flops = tokens * flops_per_token(config) / median;
  return {{"batch", point.batch},
          {"sequence_len", point.sequence_len},
          {"parameters", count_params(config).total()},
          {"step_ms", median * 1e3},
          {"tok_s", tokens / median},
          {"tflops", flops / 1e12},
          {"peak_gb", static_cast<double>(backend.arena().stats().peak) / 1e9},
          {"first_step_s", first_step},
          {"loss", last.loss},
          {"grad_norm", last.grad_norm},
          {"graph", step.replays()},
          {"attention", attention_line(model)},
          {"loss_plan", loss_line(model.loss_plan(point.batch * point.sequence_len, true))}};
}

}  // namespace

int bench_train(const Words& words) {
  const auto process_start = Clock::now();
  TrainBench c;
  Options options("flexchat bench train",
                  "Whole training steps (forward, backward, optimizer) of a model with random weights.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  const std::vector<Point> points = parse_sweep(c.sweep);
  const auto backend = c.compute.open();
  const double open_seconds = seconds_since(process_start);
  Json rows = Json::array();
  Table table({"batch", "tokens", "step ms", "tok/s", "TFLOP/s", "peak GB", "first step s", "graph"});
  for (const Point& point : points) {
    const Json row = bench_point(c, *backend, point);
    const auto number = [&](const char* key) { return row.at(key).get<double>(); };
    table.row({std::to_string(point.batch), std::to_string(point.sequence_len),
               fmt::format("{:.2f}", number("step_ms")), format_count(std::llround(number("tok_s"))),
               fmt::format("{:.1f}", number("tflops")), fmt::format("{:.2f}", number("peak_gb")),
               fmt::format("{:.2f}", number("first_step_s")), row.at("graph").get<bool>() ? "yes" : "no"});
    rows.push_back(row);
  }
  const Json summary = {{"result", "done"},          {"repro", command_line()},
                        {"device", backend->name()}, {"options", options.to_json()},
                        {"open_s", open_seconds},    {"rows", rows}};
  return c.output.finish(summary, table);
}

}  // namespace flexchat
