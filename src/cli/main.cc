// The program: picks the command, runs it, turns errors into one line and an exit code
// (0 pass, 1 a check failed or a run broke, 2 bad usage or bad input).
#include <fmt/core.h>

#include <malloc.h>

#include <csignal>
#include <cstdio>
#include <exception>

#include "base/error.h"
#include "base/strings.h"
#include "cli/command.h"

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

int run(const Words& words) {
  if (words.empty()) return usage(stderr, 2);
  if (words[0] == "--help" || words[0] == "-h" || words[0] == "help") return usage(stdout, 0);
  std::vector<std::string> names;
  for (const Command& c : kCommands) {
    if (words[0] == c.name) return c.run({words.begin() + 1, words.end()});
    names.emplace_back(c.name);
  }
  fail("unknown command '{}'{}; allowed: {}", words[0], did_you_mean(words[0], names), join(names));
}

}  // namespace
}  // namespace flexchat

int main(int argc, char** argv) {
  const auto complain = [](const std::exception& e, int code) {
    const std::string_view text = e.what();  // a command's own errors begin with its name
    fmt::print(stderr, "{}{}\n", text.starts_with("flexchat ") ? "" : "flexchat: ", text);
    return code;
  };
  // oneDNN takes and frees packing buffers in every product: keep that memory instead of faulting it in anew.
  // A file size limit must come back as an error from write(), not as a signal that ends the process.
  std::signal(SIGXFSZ, SIG_IGN);
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  try {
    return flexchat::run({argv + 1, argv + argc});
  } catch (const flexchat::Error& e) {
    return complain(e, 2);
  } catch (const std::exception& e) {
    return complain(e, 1);
  }
}
