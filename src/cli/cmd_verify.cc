// flexchat verify: golden FILE... here, attention in verify_attention.cc.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "backend/device_options.h"
#include "base/error.h"
#include "base/options.h"
#include "cli/command.h"
#include "report/run_folder.h"
#include "verify/golden.h"

namespace flexchat {
namespace {

struct GoldenCommand {
  std::vector<std::string> files;
  DeviceOptions compute;
  AttentionOptions attention;
  std::string muon_dtype = "auto";
  std::string run_id, runs = "runs";
  bool json = false;

  void declare(Options& o) {
    o.add("files", &files, "golden .safetensors files (classic_*, modern_*)").required();
    compute.declare(o);
    attention.declare(o);
    o.add("--muon-dtype", &muon_dtype,
          "dtype of Muon's iterations; auto: bf16 when computing in bf16, else f32")
        .choices({"auto", "bf16", "f32"});
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
  const auto backend = c.compute.open();
  GoldenOptions golden{c.compute.compute_dtype(), {}, c.attention};
  if (c.muon_dtype != "auto") golden.muon_dtype = parse_dtype(c.muon_dtype);

  std::vector<Check> checks;
  Json attention;
  for (const std::string& file : c.files) {
    const std::vector<Check> of_file = verify_golden(file, *backend, golden, &attention);
    checks.insert(checks.end(), of_file.begin(), of_file.end());
  }
  const bool pass = all_pass(checks);
  const RunFolder run = RunFolder::create("verify", c.run_id, RunMode::fresh, c.runs);
  Json summary = {{"result", pass ? "pass" : "fail"}, {"checks_run", checks.size()},
                  {"device", backend->name()},        {"attention", attention},
                  {"options", options.to_json()},     {"checks", checks_to_json(checks)}};
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
  return run_subcommand(
      "verify",
      {{"golden", verify_golden_command, "a model against tensors of the reference systems"},
       {"attention", verify_attention_command, "programmable attention against double"}},
      words);
}

}  // namespace flexchat
