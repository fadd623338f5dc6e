// flexchat eval bpb: bits per byte of a trained model on text.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/options.h"
#include "cli/command.h"
#include "cli/model_options.h"
#include "train/evaluate.h"

namespace flexchat {
namespace {

struct BpbCommand {
  ModelOptions model;
  std::string split = "val";
  std::vector<std::string> data;
  int64_t tokens = 1 << 20, batch = 8;
  bool json = false;

  void declare(Options& o) {
    model.declare(o);
    o.add("--data", &data, "files, globs or folders of .txt, .md, .jsonl, .parquet").required();
    o.add("--split", &split, "which part of the data: the one training leaves out, or all")
        .choices({"val", "all"});
    o.add("--tokens", &tokens, "how many tokens to evaluate").at_least(1);
    o.add("--batch", &batch, "rows at a time").at_least(1);
    o.add("--json", &json, "print JSON");
  }
};

int eval_bpb(const Words& words) {
  BpbCommand c;
  Options options("flexchat eval bpb", "Bits per byte of a trained model.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  const auto opened = c.model.open();
  const LoadedModel& loaded = opened.loaded;
  LoaderConfig config;
  config.data = c.data;
  if (c.split == "all") config.val_data = c.data;
  config.packing = loaded.model->config().arch == Arch::classic ? Packing::classic : Packing::bestfit;
  config.batch_size = c.batch;
  config.sequence_len = loaded.model->config().sequence_len;
  config.bos = loaded.tokenizer.bos();
  const auto loader = make_val_loader(
      config, [&](const std::vector<std::string>& docs, std::vector<std::vector<int32_t>>& ids) {
        ids = loaded.tokenizer.encode_batch(std::vector<std::string_view>(docs.begin(), docs.end()));
      });
  const double bpb = bits_per_byte(*loaded.model, *loader, loaded.tokenizer.token_bytes(), c.tokens);
  if (c.json) {
    const Json out = {{"model", loaded.checkpoint.string()},
                      {"step", loaded.step},
                      {"bpb", bpb},
                      {"attention", attention_record(*loaded.model)}};
    fmt::print("{}\n", out.dump());
  } else {
    fmt::print("{}: {:.6f} bits per byte at step {}\n", loaded.checkpoint.string(), bpb, loaded.step);
  }
  return 0;
}

}  // namespace

int cmd_eval(const Words& words) {
  if (!words.empty() && words[0] == "bpb") return eval_bpb({words.begin() + 1, words.end()});
  if (!words.empty() && (words[0] == "--help" || words[0] == "-h")) {
    fmt::print("usage: flexchat eval bpb --model DIR --data PATH... [options]\n");
    return 0;
  }
  fail("flexchat eval: {}; allowed: bpb", words.empty() ? "what?" : "unknown evaluation '" + words[0] + "'");
}

}  // namespace flexchat
