// flexchat bench ops: element-wise, norm and loss kernels, each against a copy on the same device.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "backend/device_options.h"
#include "backend/ops_bench.h"
#include "base/options.h"
#include "cli/bench_output.h"
#include "cli/command.h"
#include "report/environment.h"
#include "report/table.h"

namespace flexchat {
namespace {

struct OpsBench {
  DeviceOptions compute;
  BenchOutput output;
  std::optional<int64_t> rows, width, vocab_size;
  int64_t repeats = 10;

  void declare(Options& o) {
    o.add("--rows", &rows, "tokens (default 2048; 65536 on a GPU)").at_least(1);
    o.add("--width", &width, "channels, even (default 256; 1280 on a GPU)").at_least(2);
    o.add("--vocab-size", &vocab_size, "rows of tables, columns of logits (default 4096; 65536 on a GPU)")
        .at_least(1);
    o.add("--repeats", &repeats, "samples; the median counts").at_least(1);
    compute.declare(o);
    output.declare(o);
  }
};

}  // namespace

int bench_ops(const Words& words) {
  OpsBench c;
  Options options("flexchat bench ops",
                  "Element-wise, norm and loss kernels: time, bandwidth, and its share of a copy's.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  const auto backend = c.compute.open();
  const bool host = backend->arena().host();
  const int64_t n = c.rows.value_or(host ? 2048 : 65536), width = c.width.value_or(host ? 256 : 1280),
                vocab = c.vocab_size.value_or(host ? 4096 : 65536);
  const std::vector<OpTiming> timings =
      time_ops(*backend, n, width, vocab, c.compute.compute_dtype(), static_cast<int>(c.repeats));
  Json rows = Json::array();
  Table table({"op", "ms", "GB/s", "of copy"});
  for (const OpTiming& t : timings) {
    table.row({t.op, fmt::format("{:.4f}", t.seconds * 1e3), fmt::format("{:.1f}", t.gb_per_s),
               fmt::format("{:.0f}%", 100 * t.fraction_of_copy)});
    rows.push_back({{"op", t.op},
                    {"ms", t.seconds * 1e3},
                    {"bytes", t.bytes},
                    {"gb_s", t.gb_per_s},
                    {"fraction_of_copy", t.fraction_of_copy}});
  }
  const Json summary = {
      {"result", "done"}, {"repro", command_line()}, {"device", backend->name()},    {"tokens", n},
      {"width", width},   {"vocab_size", vocab},     {"options", options.to_json()}, {"rows", rows}};
  return c.output.finish(summary, table);
}

}  // namespace flexchat
