// flexchat verify golden FILE...
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/options.h"
#include "base/parallel.h"
#include "cli/command.h"
#include "report/run_folder.h"
#include "verify/golden.h"

namespace flexchat {
namespace {

struct GoldenCommand {
  std::vector<std::string> files;
  std::string device = "cpu", dtype = "f32", muon_dtype = "auto";
  std::string run_id, runs = "runs";
  int64_t threads = num_threads();
  bool json = false;

  void declare(Options& o) {
    o.add("files", &files, "golden .safetensors files (classic_*, modern_*)").required();
    o.add("--device", &device, "where to run").choices({"cpu", "reference"});
    o.add("--dtype", &dtype, "compute dtype on the CPU; the reference runs in f64")
        .choices({"f32", "bf16", "f16"});
    o.add("--muon-dtype", &muon_dtype,
          "dtype of Muon's iterations; auto: bf16 when computing in bf16, else f32")
        .choices({"auto", "bf16", "f32"});
    o.add("--threads", &threads, "CPU threads").at_least(1);
    o.add("--run-id", &run_id, "name of the run folder (default: time and a random word)");
    o.add("--runs", &runs, "folder that holds run folders").not_recorded();
    o.add("--json", &json, "print the summary as JSON instead of the table").not_recorded();
  }
};

int verify_golden_command(const Words& words) {
  GoldenCommand c;
  Options options("flexchat verify golden",
                  "Compare a model with tensors that the reference systems produced.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  set_num_threads(static_cast<int>(c.threads));
  const auto backend = make_backend(c.device);
  const bool reference = c.device == "reference";
  GoldenOptions golden{reference ? DType::f64 : parse_dtype(c.dtype), {}};
  if (c.muon_dtype != "auto") golden.muon_dtype = parse_dtype(c.muon_dtype);

  std::vector<Check> checks;
  for (const std::string& file : c.files) {
    const std::vector<Check> of_file = verify_golden(file, *backend, golden);
    checks.insert(checks.end(), of_file.begin(), of_file.end());
  }
  const bool pass = all_pass(checks);
  const RunFolder run = RunFolder::create("verify", c.run_id, RunMode::fresh, c.runs);
  Json summary = {{"result", pass ? "pass" : "fail"},
                  {"checks_run", checks.size()},
                  {"options", options.to_json()},
                  {"checks", checks_to_json(checks)}};
  run.write_summary(summary);
  if (c.json) {
    summary["run"] = run.path().string();
    fmt::print("{}\n", summary.dump(2));
  } else {
    int64_t failed = 0;
    for (const Check& k : checks) failed += k.pass ? 0 : 1;
    fmt::print("{}\n{} checks, {} failed; run folder {}\n", checks_table(checks), checks.size(), failed,
               run.path().string());
  }
  return pass ? 0 : 1;
}

}  // namespace

int cmd_verify(const Words& words) {
  if (!words.empty() && words[0] == "golden") return verify_golden_command({words.begin() + 1, words.end()});
  if (!words.empty() && (words[0] == "--help" || words[0] == "-h")) {
    fmt::print("usage: flexchat verify golden FILE... [options]\n");
    return 0;
  }
  fail("flexchat verify: {}; allowed: golden", words.empty() ? "what?" : "unknown check '" + words[0] + "'");
}

}  // namespace flexchat
