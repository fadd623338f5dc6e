#include "cli/command.h"

#include <fmt/core.h>

#include <algorithm>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {

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
