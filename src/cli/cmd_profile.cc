// flexchat profile -- COMMAND ...: runs another command in this process and tells which kernels took the time
// on the device. Steps are not recorded as graphs meanwhile, so that every launch can be timed.
#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "backend/profile.h"
#include "base/error.h"
#include "base/options.h"
#include "base/strings.h"
#include "cli/command.h"
#include "report/environment.h"
#include "report/run_folder.h"
#include "report/table.h"

namespace flexchat {
namespace {

struct ProfileOptions {
  std::string run_id, runs = "runs";
  int64_t rows = 40;
  bool json = false;

  void declare(Options& o) {
    o.add("--rows", &rows, "kernels that the table shows, the longest time first").at_least(1);
    o.add("--run-id", &run_id, "name of the run folder (default: time and a random word)");
    o.add("--runs", &runs, "folder that holds run folders").not_recorded();
    o.add("--json", &json, "print the summary as JSON instead of the table").not_recorded();
  }
};

double total_seconds(const DeviceProfile& profile) {
  double seconds = 0;
  for (const KernelTotal& k : profile.kernels) seconds += k.seconds;
  return seconds;
}

// What a kernel reaches of what the device can: of the copy's bytes/s or the product's FLOP/s, whichever it
// is nearer to.
struct Reach {
  double bytes_rate = 0, flops_rate = 0;  // a second
  double fraction = 0;
  bool computes = false;  // nearer to the product
};
Reach reach_of(const KernelTotal& k, const DeviceProfile& profile) {
  Reach reach;
  if (k.seconds <= 0) return reach;
  reach.bytes_rate = k.bytes / k.seconds;
  reach.flops_rate = k.flops / k.seconds;
  const double copy = reach.bytes_rate / profile.copy_rate, product = reach.flops_rate / profile.product_rate;
  reach.computes = product > copy;
  reach.fraction = std::max(copy, product);
  return reach;
}

Json to_json(const DeviceProfile& profile) {
  Json kernels = Json::array();
  const double total = total_seconds(profile);
  for (const KernelTotal& k : profile.kernels) {
    const Reach reach = reach_of(k, profile);
    kernels.push_back({{"name", k.name},
                       {"kernels", k.kernels},
                       {"share", total > 0 ? k.seconds / total : 0},
                       {"launches", k.launches},
                       {"ms", k.seconds * 1e3},
                       {"gb_s", reach.bytes_rate / 1e9},
                       {"tflop_s", reach.flops_rate / 1e12},
                       {"of_peak", reach.fraction}});
  }
  return {{"device", profile.device},
          {"timer", profile.timer},
          {"copy_gb_s", profile.copy_rate / 1e9},
          {"product_tflop_s", profile.product_rate / 1e12},
          {"seconds", profile.seconds},
          {"kernel_seconds", total},
          {"kernels", kernels}};
}

std::string shortened(const std::string& text, size_t most) {
  return text.size() <= most ? text : text.substr(0, most - 2) + "..";
}

void print_profile(const DeviceProfile& profile, size_t rows) {
  const double total = total_seconds(profile);
  Table table({"operation", "share", "calls", "ms", "rate", "of peak", "kernel"});
  const size_t shown = std::min(rows, profile.kernels.size());
  for (size_t i = 0; i < shown; ++i) {
    const KernelTotal& k = profile.kernels[i];
    const Reach reach = reach_of(k, profile);
    table.row({k.name, fmt::format("{:.1f}%", total > 0 ? 100 * k.seconds / total : 0),
               format_count(k.launches), fmt::format("{:.3f}", k.seconds * 1e3),
               reach.computes ? fmt::format("{:.0f} TFLOP/s", reach.flops_rate / 1e12)
                              : fmt::format("{:.0f} GB/s", reach.bytes_rate / 1e9),
               fmt::format("{:.0f}%", 100 * reach.fraction),
               k.kernels.empty() ? "-" : shortened(k.kernels, 70)});
  }
  fmt::print("{}", table.text());
  if (shown < profile.kernels.size()) fmt::print("and {} more\n", profile.kernels.size() - shown);
  fmt::print(
      "{}: kernels {:.3f} ms of {:.3f} ms, timed by {}; peaks: copy {:.0f} GB/s, bf16 product {:.0f} "
      "TFLOP/s\n",
      profile.device, total * 1e3, profile.seconds * 1e3, profile.timer, profile.copy_rate / 1e9,
      profile.product_rate / 1e12);
}

}  // namespace

int cmd_profile(const Words& words) {
  ProfileOptions c;
  Options options("flexchat profile",
                  "Runs another command and tells which kernels took the time on the GPU: flexchat profile "
                  "[options] -- COMMAND ...");
  c.declare(options);
  const auto split = std::find(words.begin(), words.end(), "--");
  if (!options.parse({words.begin(), split})) return 0;
  check(split != words.end() && split + 1 != words.end(),
        "flexchat profile: of what? Name the command after '--', as in: flexchat profile -- bench train "
        "--device cuda");
  Words command(split + 1, words.end());
  // As every other profiler is called: the program's own name goes first.
  if (command.size() > 1 && std::filesystem::path(command[0]).filename() == "flexchat") {
    command.erase(command.begin());
  }
  check(command[0] != "profile", "flexchat profile: a profile of a profile is none");
  set_profiling(true);
  int code = 0;
  try {
    code = run_command(command);
  } catch (...) {
    set_profiling(false);
    take_profiles();
    throw;
  }
  set_profiling(false);
  const std::vector<DeviceProfile> profiles = take_profiles();
  check(!profiles.empty(),
        "flexchat profile: '{}' ran no kernels on a GPU, which alone are timed; allowed: commands with "
        "--device cuda or cuda:N",
        join(command, " "));
  Json devices = Json::array();
  for (const DeviceProfile& profile : profiles) devices.push_back(to_json(profile));
  const Json summary = {{"result", "done"},
                        {"repro", command_line()},
                        {"options", options.to_json()},
                        {"profiled", join(command, " ")},
                        {"exit_code", code},
                        {"profiles", devices}};
  const RunFolder run = RunFolder::create("profile", c.run_id, RunMode::fresh, c.runs);
  run.write_summary(summary);
  if (c.json) {
    fmt::print("{}\n", summary.dump(2));
    return code;
  }
  for (const DeviceProfile& profile : profiles) print_profile(profile, static_cast<size_t>(c.rows));
  fmt::print("run folder {}\n", run.path().string());
  return code;
}

}  // namespace flexchat
