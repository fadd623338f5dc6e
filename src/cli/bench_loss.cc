// flexchat bench loss: time and memory of the output head and its loss, forward and backward, by backend.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "backend/device_options.h"
#include "base/options.h"
#include "base/strings.h"
#include "cli/bench_output.h"
#include "cli/command.h"
#include "ops/loss_bench.h"
#include "report/environment.h"
#include "report/table.h"

namespace flexchat {
namespace {

struct LossBench {
  DeviceOptions compute;
  BenchOutput output;
  std::vector<std::string> losses = {"full", "chunked", "cce"};
  int64_t rows = 2048, width = 256, vocab_size = 4096, repeats = 10, memory_budget = 0;

  void declare(Options& o) {
    o.add("--loss", &losses, "of full (current), chunked (liger), cce, auto");
    o.add("--rows", &rows, "tokens").at_least(1);
    o.add("--width", &width, "channels of the hidden state").at_least(1);
    o.add("--vocab-size", &vocab_size, "vocabulary").at_least(2);
    o.add("--memory-budget", &memory_budget, "bytes of temporary memory; 0: each backend's own").at_least(0);
    o.add("--repeats", &repeats, "timed runs; the median counts").at_least(1);
    compute.declare(o);
    output.declare(o);
  }
};

}  // namespace

int bench_loss(const Words& words) {
  LossBench c;
  Options options("flexchat bench loss",
                  "Time and memory of the output head and its loss, forward and backward.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  std::vector<LossOptions> wanted;
  for (const std::string& name : c.losses) {
    wanted.push_back({.backend = parse_loss_backend(name), .memory_budget = c.memory_budget});
  }
  const auto backend = c.compute.open();
  Json rows = Json::array();
  Table table({"loss", "ms", "TFLOP/s", "extra memory", "panel", "why"});
  for (const LossOptions& loss : wanted) {
    const LossTiming t = time_loss(*backend, c.rows, c.width, c.vocab_size, c.compute.compute_dtype(), loss,
                                   static_cast<int>(c.repeats));
    const std::string name(loss_backend_name(t.plan.backend));
    table.row({name, fmt::format("{:.3f}", t.ms), fmt::format("{:.4g}", t.tflops),
               format_bytes(static_cast<double>(t.extra_bytes)),
               fmt::format("{} x {}", t.plan.rows, t.plan.columns), t.plan.reason});
    rows.push_back({{"loss", name},
                    {"fwd_bwd_ms", t.ms},
                    {"tflops", t.tflops},
                    {"extra_mb", static_cast<double>(t.extra_bytes) / 1e6},
                    {"panel_rows", t.plan.rows},
                    {"panel_columns", t.plan.columns},
                    {"mean_nll", t.mean_nll},
                    {"reason", t.plan.reason}});
  }
  const Json summary = {{"result", "done"},
                        {"repro", command_line()},
                        {"device", backend->name()},
                        {"options", options.to_json()},
                        {"rows", rows}};
  return c.output.finish(summary, table);
}

}  // namespace flexchat
