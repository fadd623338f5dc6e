// Commands as a user meets them: what they print and record, and what bad input gets.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "backend/attention_support.h"
#include "backend/cuda_loader.h"
#include "base/file.h"
#include "base/options.h"
#include "report/devices.h"
#include "support/temp_folder.h"
#include "testing/process.h"

namespace flexchat {
namespace {

using flexchat::testing::Finished;
using flexchat::testing::run_program;
using Words = std::vector<std::string>;

Json json_of(const Finished& end) {
  EXPECT_EQ(end.code, 0) << end.out;
  const Json parsed = Json::parse(end.out, nullptr, false);
  EXPECT_TRUE(parsed.is_object()) << end.out;
  return parsed;
}

Words with(Words words, const Words& more) {
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

TEST(Bench, ModelRecordsWhatRan) {
  const TempFolder runs;
  const Words words = {"bench",    "model", "--n-layer",    "1", "--n-embd",       "32",
                       "--n-head", "2",     "--n-kv-head",  "1", "--vocab-size",   "64",
                       "--batch",  "2",     "--steps",      "1", "--sequence-len", "32",
                       "--prompt", "4",     "--new-tokens", "4", "--runs",         runs.path().string(),
                       "--run-id", "a",     "--json"};
  const Json summary = json_of(run_program(with(words, {"--attention", "flex:cpu", "--loss", "cce"})));
  EXPECT_EQ(summary.at("attention").at("path"), "flex");
  EXPECT_EQ(summary.at("attention").at("kernel"), "cpu");
  EXPECT_NE(summary.at("attention").at("reason").get<std::string>().find("mask"), std::string::npos);
  EXPECT_EQ(summary.at("loss").at("backend"), "cce");
  EXPECT_GT(summary.at("fwd_bwd_ms").get<double>(), 0);
  EXPECT_GT(summary.at("decode_tok_s").get<double>(), 0);
  const Json kept = Json::parse(read_file(runs / "bench/a/summary.json"));
  EXPECT_EQ(kept.at("attention"), summary.at("attention"));
  EXPECT_EQ(kept.at("environment").at("devices").at(0).at("device"), "cpu");
}

TEST(Bench, AttentionTimesModsAndWholeModels) {
  const TempFolder runs;
  const Words common = {"bench", "attention", "--repeats", "1", "--runs", runs.path().string(), "--json"};
  const Json mods =
      json_of(run_program(with(common, {"--mods", "sdpa", "packed", "--shapes", "1x2x1x40x16"})));
  ASSERT_EQ(mods.at("rows").size(), 2u);
  EXPECT_EQ(mods.at("rows").at(0).at("mask_ms"), 0) << "sdpa has no lists of blocks";
  for (const Json& row : mods.at("rows")) {
    EXPECT_GT(row.at("forward_ms").get<double>(), 0) << row;
    EXPECT_GT(row.at("backward_ms").get<double>(), 0) << row;
  }
  const Json model = json_of(
      run_program(with(common, {"--model", "--n-layer", "1", "--n-head", "2", "--n-kv-head", "1", "--n-embd",
                                "32", "--vocab-size", "64", "--sequence-len", "16", "--batch", "2"})));
  ASSERT_EQ(model.at("rows").size(), 2u);
  EXPECT_EQ(model.at("rows").at(0).at("mod"), "sdpa");
  EXPECT_EQ(model.at("rows").at(1).at("mod"), "flex");
  for (const Json& row : model.at("rows")) {
    EXPECT_EQ(row.at("kernel"), "cpu");
    EXPECT_GT(row.at("forward_ms").get<double>(), 0) << row;
    EXPECT_GT(row.at("fwd_bwd_ms").get<double>(), 0) << row;
    EXPECT_GT(row.at("peak_mb").get<double>(), 0) << row;
  }
}

TEST(Bench, TrainTellsAttentionAndLossOfEveryPoint) {
  const TempFolder runs;
  const Json summary =
      json_of(run_program({"bench", "train", "--depth", "1", "--vocab-size", "64", "--sweep", "b=1,2 t=16",
                           "--steps", "1", "--attention", "flex", "--loss", "liger", "--loss-memory", "1024",
                           "--runs", runs.path().string(), "--json"}));
  ASSERT_EQ(summary.at("rows").size(), 2u);
  for (const Json& row : summary.at("rows")) {
    EXPECT_EQ(row.at("attention").get<std::string>().find("flex by cpu ("), 0u) << row;
    EXPECT_EQ(row.at("loss_plan").get<std::string>().find("chunked, 1.0 KiB"), 0u) << row;
  }
}

TEST(Bench, OpsComparesWithACopy) {
  const TempFolder runs;
  const Json summary =
      json_of(run_program({"bench", "ops", "--rows", "32", "--width", "64", "--vocab-size", "50", "--repeats",
                           "1", "--runs", runs.path().string(), "--json"}));
  ASSERT_GT(summary.at("rows").size(), 5u);
  EXPECT_EQ(summary.at("rows").at(0).at("op"), "copy");
  EXPECT_EQ(summary.at("rows").at(0).at("fraction_of_copy"), 1.0);
  for (const Json& row : summary.at("rows")) {
    EXPECT_GT(row.at("gb_s").get<double>(), 0) << row;
    EXPECT_GT(row.at("ms").get<double>(), 0) << row;
  }
}

TEST(Info, PrintsTheMatrixOfAttentionKernels) {
  const Json info = json_of(run_program({"info", "--json"}));
  ASSERT_EQ(info.at("attention").size(), attention_support().size());
  for (size_t i = 0; i < attention_support().size(); ++i) {
    const AttentionSupport& s = attention_support()[i];
    const Json& row = info.at("attention").at(i);
    EXPECT_EQ(row.at("kernel"), s.kernel);
    EXPECT_EQ(row.at("head_dims"), s.head_dims_text());
    EXPECT_EQ(row.at("backward"), s.backward);
    EXPECT_EQ(row.at("splits_keys"), s.splits_keys);
    EXPECT_EQ(row.at("runs"), runs_here(s));
  }
  EXPECT_FALSE(info.at("runtime_compiler").at("how").get<std::string>().empty());
  EXPECT_FALSE(info.at("cudnn").get<std::string>().empty());
  const Finished text = run_program({"info"});
  EXPECT_EQ(text.code, 0);
  for (const char* word :
       {"cuda_mma", "16, 32, 64, 80, 96, 128, 192, 256", "split KV", "GPU kernels: ", "cuDNN: "}) {
    EXPECT_NE(text.out.find(word), std::string::npos) << word << "\n" << text.out;
  }
}

TEST(BadInput, IsOneLineAndExitCode2) {
  struct Bad {
    Words words;
    const char* says;
  };
  const Words model = {"bench", "model", "--n-layer", "1", "--n-embd", "32"};
  std::vector<Bad> all = {
      {with(model, {"--attention", "flash"}),
       "--attention: unknown 'flash'; allowed on cpu: sdpa, flex, auto, cpu, or both as in flex:cpu"},
      {with(model, {"--device", "reference", "--attention", "cpu"}),
       "allowed on reference: sdpa, flex, auto, reference"},
      {with(model, {"--loss", "fused"}), "auto, full, current, chunked, liger, cce"},
      {with(model, {"--loss-memory", "-1"}), "--loss-memory"},
      {{"bench", "attention", "--model", "--mods", "alibi"}, "allowed with --model: sdpa, flex"},
      {{"bench", "attention", "--shapes", "1x2x1x40"}, "is not of the form BxHxGxTxD"},
      {{"bench", "ops", "--width", "3"}, "the width even"},
      {{"bench", "opps"}, "did you mean 'ops'"}};
  if (!cuda_available()) {
    all.push_back({with(model, {"--device", "cuda"}), "no CUDA device can be used: "});
    all.push_back({with(model, {"--device", "cuda:1"}), "no CUDA device can be used: "});
  }
  for (const Bad& bad : all) {
    const Finished end = run_program(bad.words);
    EXPECT_EQ(end.code, 2) << end.out;
    EXPECT_NE(end.out.find(bad.says), std::string::npos) << end.out;
    EXPECT_EQ(std::count(end.out.begin(), end.out.end(), '\n'), 1) << end.out;
  }
}

}  // namespace
}  // namespace flexchat
