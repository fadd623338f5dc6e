// flexchat train base: parse the options, settle a fresh or a resumed run, train.
#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"
#include "checkpoint/state_json.h"
#include "cli/command.h"
#include "train/trainer.h"

namespace flexchat {
namespace {

constexpr const char* kCommand = "flexchat train base";
constexpr const char* kSummary =
    "Pretrain a GPT on text. Ctrl-C saves and stops; --resume goes on, bit for bit.";

// A resumed run is the recorded one: its options are the defaults, and what the command line changes of them
// is refused, but for what cannot change the result.
void refuse_changes(const Json& recorded, const Json& asked, const std::string& where) {
  std::vector<std::string> changes;
  const auto& may_change = TrainOptions::resumable_keys();
  for (const auto& [key, value] : recorded.items()) {
    if (std::find(may_change.begin(), may_change.end(), key) != may_change.end()) continue;
    if (asked.at(key) != value)
      changes.push_back(fmt::format("{}: {} there, {} asked", key, value.dump(), asked.at(key).dump()));
  }
  check(changes.empty(), "cannot resume {} with other options: {}", where, join(changes, "; "));
}

// The word behind --name or in --name=word.
std::string word_of(const Words& words, const std::string& name, const std::string& otherwise) {
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == name && i + 1 < words.size()) return words[i + 1];
    if (words[i].starts_with(name + "=")) return words[i].substr(name.size() + 1);
  }
  return otherwise;
}

int train_fresh(const Words& words) {
  TrainOptions parsed;
  Options options(kCommand, kSummary);
  parsed.declare(options);
  if (!options.parse(words)) return 0;
  Tokenizer tokenizer = Tokenizer::load(parsed.tokenizer);
  const GptConfig config = parsed.model_config(tokenizer.vocab_size());
  RunFolder run = RunFolder::create("train", parsed.run_id, RunMode::fresh, parsed.runs);
  const std::filesystem::path run_dir = run.path();
  try {
    return Trainer(parsed, config, std::move(tokenizer), options.to_json(), std::move(run)).run();
  } catch (const Error&) {
    // Bad input found late, in the data: an empty folder must not block the run id.
    if (!find_latest_checkpoint(run_dir)) std::filesystem::remove_all(run_dir);
    throw;
  }
}

int train_resumed(const Words& words) {
  TrainOptions parsed;
  Options options(kCommand, kSummary);
  parsed.declare(options);
  // The record holds the required options, so the run must be found before the strict parse.
  const std::string run_id = word_of(words, "--run-id", "");
  check(!run_id.empty(), "{}: --resume needs --run-id", kCommand);
  const auto run_dir = std::filesystem::path(word_of(words, "--runs", parsed.runs)) / "train" / run_id;
  const auto config_file = run_dir / "config.json";
  check(std::filesystem::exists(config_file), "{}: no run to resume at {}", kCommand, run_dir.string());
  const Json recorded = parse_state_json(read_file(config_file), config_file.string());
  options.load_json(recorded, config_file.string());
  if (!options.parse(words)) return 0;
  refuse_changes(recorded, options.to_json(), run_dir.string());
  Tokenizer tokenizer = Tokenizer::load(run_dir / "tokenizer");
  const GptConfig config = parsed.model_config(tokenizer.vocab_size());
  RunFolder run = RunFolder::create("train", parsed.run_id, RunMode::resume, parsed.runs);
  return Trainer(parsed, config, std::move(tokenizer), options.to_json(), std::move(run)).run();
}

}  // namespace

int cmd_train(const Words& words) {
  if (!words.empty() && words[0] == "base") {
    const Words rest(words.begin() + 1, words.end());
    const bool resume = std::find(rest.begin(), rest.end(), "--resume") != rest.end();
    return resume ? train_resumed(rest) : train_fresh(rest);
  }
  if (!words.empty() && (words[0] == "--help" || words[0] == "-h")) {
    fmt::print("usage: flexchat train base --data PATH... --tokenizer DIR [options]\n");
    return 0;
  }
  fail("flexchat train: {}; allowed: base", words.empty() ? "what?" : "unknown stage '" + words[0] + "'");
}

}  // namespace flexchat
