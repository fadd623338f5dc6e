// flexchat generate: continue a prompt.
#include <fmt/core.h>

#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/options.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "cli/command.h"
#include "cli/model_options.h"
#include "engine/generate.h"

namespace flexchat {
namespace {

struct GenerateCommand {
  ModelOptions model;
  std::string prompt;
  int64_t max_tokens = 128, top_k = 50, seed = 42;
  double temperature = 0.8;
  bool json = false;

  void declare(Options& o) {
    model.declare(o);
    o.add("--prompt", &prompt, "text to continue; empty: from nothing");
    o.add("--max-tokens", &max_tokens, "new tokens at most").at_least(1);
    o.add("--temperature", &temperature, "0: always the likeliest token").at_least(0);
    o.add("--top-k", &top_k, "sample among this many likeliest tokens; 0: all").at_least(0);
    o.add("--seed", &seed, "of the sampling").at_least(0);
    o.add("--json", &json, "print ids, text, rate and attention kernel instead of streaming the text");
  }
};

// Length of the longest prefix of `text` that does not end inside a UTF-8 sequence.
size_t whole_utf8(const std::string& text) {
  size_t i = text.size();
  for (int back = 0; back < 4 && i > 0; ++back) {
    const auto c = static_cast<unsigned char>(text[--i]);
    if (c < 0x80) return text.size();
    if (c >= 0xC0) {
      const size_t length = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
      return text.size() - i >= length ? text.size() : i;
    }
  }
  return text.size();
}

}  // namespace

int cmd_generate(const Words& words) {
  GenerateCommand c;
  Options options("flexchat generate", "Continue a prompt with a trained model.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  const auto [backend, loaded] = c.model.open();
  const Tokenizer& tokenizer = loaded.tokenizer;
  const std::vector<int32_t> prompt = tokenizer.encode(c.prompt, {tokenizer.bos(), {}, nullptr});

  std::vector<int32_t> ids;
  std::string pending;  // bytes not yet printed: the start of an unfinished character
  const auto start = std::chrono::steady_clock::now();
  if (!c.json) fmt::print("{}", c.prompt);
  generate(*loaded.model, prompt, c.max_tokens, {c.temperature, c.top_k, static_cast<uint64_t>(c.seed)},
           [&](int32_t id) {
             if (tokenizer.is_special(id)) return false;  // the document ends here
             ids.push_back(id);
             if (!c.json) {
               pending += tokenizer.token(id);
               const size_t whole = whole_utf8(pending);
               fmt::print("{}", replace_invalid_utf8(pending.substr(0, whole), nullptr));
               std::fflush(stdout);
               pending.erase(0, whole);
             }
             return true;
           });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (c.json) {
    const Json out = {{"model", loaded.checkpoint.string()},
                      {"step", loaded.step},
                      {"prompt", c.prompt},
                      {"prompt_ids", prompt},
                      {"ids", ids},
                      {"text", tokenizer.decode(ids)},
                      {"attention", attention_record(*loaded.model)},
                      {"tok_per_sec", static_cast<double>(ids.size()) / seconds}};
    fmt::print("{}\n", out.dump(-1, ' ', false, Json::error_handler_t::replace));
  } else {
    fmt::print("{}\n", replace_invalid_utf8(pending, nullptr));
  }
  return 0;
}

}  // namespace flexchat
