#include "cli/bench_output.h"

#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "report/run_folder.h"

namespace flexchat {

void BenchOutput::declare(Options& o) {
  o.add("--run-id", &run_id, "name of the run folder (default: time and a random word)");
  o.add("--runs", &runs, "folder that holds run folders").not_recorded();
  o.add("--json", &json, "print the summary as JSON instead of the table").not_recorded();
}

int BenchOutput::finish(const Json& summary, const Table& table) const {
  const RunFolder run = RunFolder::create("bench", run_id, RunMode::fresh, runs);
  run.write_summary(summary);
  if (json) {
    fmt::print("{}\n", summary.dump(2));
  } else {
    fmt::print("{}run folder {}\n", table.text(), run.path().string());
  }
  return 0;
}

}  // namespace flexchat
