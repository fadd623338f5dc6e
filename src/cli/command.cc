#include "cli/command.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstdio>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

struct Command {
  const char* name;
  int (*run)(const Words&);
  const char* summary;
};
constexpr Command kCommands[] = {
    {"train", cmd_train, "train a model: train base"},
    {"generate", cmd_generate, "continue a prompt with a trained model"},
    {"eval", cmd_eval, "evaluate a model: eval bpb"},
    {"tokenizer", cmd_tokenizer, "train, use and evaluate a tokenizer"},
    {"verify", cmd_verify, "check numerics against references: verify golden, verify attention"},
    {"bench", cmd_bench, "measure speed and memory"},
    {"mask", cmd_mask, "count and draw the blocks that a mask expression visits"},
    {"report", cmd_report, "training runs as one HTML page, several over each other"},
    {"profile", cmd_profile, "run another command and tell which kernels took the time"},
    {"info", cmd_info, "build, processor, devices, kernels that can run here"},
};

int usage(std::FILE* to, int code) {
  fmt::print(to,
             "flexchat: trains, verifies, benchmarks and serves nanochat-style GPTs\n\nusage: flexchat "
             "COMMAND ...\n");
  for (const Command& c : kCommands) fmt::print(to, "  {:<10} {}\n", c.name, c.summary);
  fmt::print(to, "\nflexchat COMMAND --help tells a command's options.\n");
  return code;
}

}  // namespace

int run_command(const Words& words) {
  if (words.empty()) return usage(stderr, 2);
  if (words[0] == "--help" || words[0] == "-h" || words[0] == "help") return usage(stdout, 0);
  std::vector<std::string> names;
  for (const Command& c : kCommands) {
    if (words[0] == c.name) return c.run({words.begin() + 1, words.end()});
    names.emplace_back(c.name);
  }
  fail("unknown command '{}'{}; allowed: {}", words[0], did_you_mean(words[0], names), join(names));
}

int run_subcommand(const char* command, const std::vector<Subcommand>& known, const Words& words) {
  std::vector<std::string> names;
  for (const Subcommand& s : known) names.emplace_back(s.name);
  check(!words.empty(), "flexchat {}: what? allowed: {}", command, join(names));
  if (words[0] == "--help" || words[0] == "-h") {
    for (const Subcommand& s : known) fmt::print("flexchat {} {:<10} {}\n", command, s.name, s.summary);
    fmt::print("flexchat {} NAME --help tells the options of each.\n", command);
    return 0;
  }
  const auto found =
      std::find_if(known.begin(), known.end(), [&](const Subcommand& s) { return s.name == words[0]; });
  check(found != known.end(), "flexchat {}: unknown '{}'{}; allowed: {}", command, words[0],
        did_you_mean(words[0], names), join(names));
  return found->run({words.begin() + 1, words.end()});
}

}  // namespace flexchat
