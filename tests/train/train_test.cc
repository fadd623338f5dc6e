// Training as a user meets it: whole runs of the program on a small corpus.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/file.h"
#include "base/rng.h"
#include "checkpoint/checkpoint.h"
#include "models/gpt.h"
#include "testing/process.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;
using flexchat::testing::Finished;
using flexchat::testing::Process;
using flexchat::testing::run_program;
using Words = std::vector<std::string>;

// Sentences of a tiny language: learnable, and different in every document.
std::string document(uint64_t seed) {
  static const Words nouns = {"cat", "dog", "river", "stone", "bird"}, verbs = {"sees", "finds", "follows"};
  Rng rng(seed);
  std::string text;
  for (int i = 0; i < 30; ++i) {
    text += "the " + nouns[rng.below(nouns.size())] + " " + verbs[rng.below(verbs.size())] + " the " +
            nouns[rng.below(nouns.size())] + ".\n";
  }
  return text;
}

class Train : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    root_ = fs::temp_directory_path() / ("flexchat_train_test_" + std::to_string(::getpid()));
    fs::create_directories(root_ / "data");
    for (uint64_t i = 0; i < 40; ++i) {
      std::ofstream(root_ / "data" / ("doc" + std::to_string(100 + i) + ".txt")) << document(i);
    }
    const Finished made = run_program({"tokenizer", "train", "--data", (root_ / "data").string(),
                                       "--vocab-size", "300", "--out", (root_ / "tok").string()});
    ASSERT_EQ(made.code, 0) << made.out;
  }
  static void TearDownTestSuite() { fs::remove_all(root_); }

  static Words base(const std::string& run_id, Words more = {}) {
    Words words = {"train",
                   "base",
                   "--data",
                   (root_ / "data").string(),
                   "--tokenizer",
                   (root_ / "tok").string(),
                   "--n-layer",
                   "2",
                   "--n-head",
                   "2",
                   "--n-kv-head",
                   "1",
                   "--n-embd",
                   "32",
                   "--sequence-len",
                   "32",
                   "--device-batch-size",
                   "2",
                   "--total-batch-size",
                   "128",
                   "--num-iterations",
                   "12",
                   "--eval-every",
                   "6",
                   "--eval-tokens",
                   "256",
                   "--save-every",
                   "4",
                   "--sample-every",
                   "0",
                   "--threads",
                   "2",
                   "--runs",
                   (root_ / "runs").string(),
                   "--run-id",
                   run_id};
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
  static Words resume(const std::string& run_id, Words more = {}) {
    Words words = {"train", "base", "--resume", "--runs", (root_ / "runs").string(), "--run-id", run_id};
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
  static fs::path run_dir(const std::string& run_id) { return root_ / "runs" / "train" / run_id; }

  // Every tensor file of the newest checkpoint, byte for byte.
  static void expect_same_end(const std::string& a, const std::string& b) {
    const auto last_a = find_latest_checkpoint(run_dir(a)), last_b = find_latest_checkpoint(run_dir(b));
    ASSERT_TRUE(last_a && last_b);
    EXPECT_EQ(last_a->filename(), last_b->filename());
    for (const char* file : {"model.safetensors", "optimizer.safetensors", "loader.safetensors"}) {
      EXPECT_EQ(read_file(*last_a / file), read_file(*last_b / file)) << file;
    }
  }

  static inline fs::path root_;
};

class Variant : public Train, public ::testing::WithParamInterface<Words> {};

TEST_P(Variant, StopAndResumeIsTheUninterruptedRunBitForBit) {
  const std::string tag = ::testing::UnitTest::GetInstance()->current_test_info()->value_param()
                              ? std::to_string(std::hash<std::string>{}(
                                    ::testing::UnitTest::GetInstance()->current_test_info()->value_param()))
                              : "";
  const std::string whole = "whole" + tag, parts = "parts" + tag;
  const Finished one = run_program(base(whole, GetParam()));
  ASSERT_EQ(one.code, 0) << one.out;
  Words first = GetParam();
  first.insert(first.end(), {"--stop-after", "5"});
  const Finished two = run_program(base(parts, first));
  ASSERT_EQ(two.code, 0) << two.out;
  EXPECT_NE(two.out.find("stopped at step 5"), std::string::npos) << two.out;
  const Finished three = run_program(resume(parts));
  ASSERT_EQ(three.code, 0) << three.out;
  expect_same_end(whole, parts);
  // The record of the run is one run, too: every step once.
  std::ifstream metrics(run_dir(parts) / "metrics.jsonl");
  std::vector<int64_t> steps;
  for (std::string line; std::getline(metrics, line);) {
    const Json j = Json::parse(line);
    if (j.contains("loss")) steps.push_back(j.at("step").get<int64_t>());
  }
  ASSERT_EQ(steps.size(), 12u);
  for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i], static_cast<int64_t>(i) + 1);
}

INSTANTIATE_TEST_SUITE_P(
    All, Variant,
    ::testing::Values(Words{"--arch", "classic"}, Words{"--arch", "modern"},
                      Words{"--arch", "modern", "--packing", "classic", "--dtype", "bf16"},
                      Words{"--arch", "classic", "--dtype", "f16", "--packing", "bestfit"},
                      Words{"--schedule", "ordinal", "--ordinal-patience", "2", "--checkpoint-activations"}));

TEST_F(Train, KillAtAnyMomentLosesNothingThatWasSaved) {
  ASSERT_EQ(run_program(base("calm", {"--save-every", "2"})).code, 0);
  Rng rng(7);
  Finished last;
  bool started = false;
  for (int kills = 0; kills < 12; ++kills) {
    const auto latest = find_latest_checkpoint(run_dir("hit"));
    if (!latest && started) fs::remove_all(run_dir("hit"));  // died before its first checkpoint
    Process process(FLEXCHAT_PROGRAM, latest ? resume("hit") : base("hit", {"--save-every", "2"}));
    started = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(20 + rng.below(250)));
    process.signal(SIGKILL);
    process.wait();
  }
  const auto latest = find_latest_checkpoint(run_dir("hit"));
  if (!latest) fs::remove_all(run_dir("hit"));
  last = run_program(latest ? resume("hit") : base("hit", {"--save-every", "2"}));
  ASSERT_EQ(last.code, 0) << last.out;
  expect_same_end("calm", "hit");
}

TEST_F(Train, TerminationFinishesTheStepAndSaves) {
  Process process(FLEXCHAT_PROGRAM,
                  base("term", {"--num-iterations", "100000", "--save-every", "0", "--eval-every", "0"}));
  const fs::path metrics = run_dir("term") / "metrics.jsonl";
  for (int i = 0; i < 3000 && (!fs::exists(metrics) || fs::file_size(metrics) < 500); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  process.signal(SIGTERM);
  const Finished end = process.wait();
  EXPECT_EQ(end.code, 128 + SIGTERM) << end.out;
  const auto latest = find_latest_checkpoint(run_dir("term"));
  ASSERT_TRUE(latest) << end.out;
  const Checkpoint saved = load_checkpoint(*latest);
  const std::string lines = read_file(metrics);
  EXPECT_NE(lines.find("\"step\":" + std::to_string(saved.step())), std::string::npos);
  EXPECT_EQ(lines.find("\"step\":" + std::to_string(saved.step() + 1)), std::string::npos);
}

TEST_F(Train, LossAndBitsPerByteFall) {
  const Finished done = run_program(base("learn", {"--num-iterations", "60", "--eval-every", "60"}));
  ASSERT_EQ(done.code, 0) << done.out;
  std::ifstream metrics(run_dir("learn") / "metrics.jsonl");
  std::vector<double> bpb, loss;
  for (std::string line; std::getline(metrics, line);) {
    const Json j = Json::parse(line);
    if (j.contains("val_bpb")) bpb.push_back(j.at("val_bpb").get<double>());
    if (j.contains("loss")) loss.push_back(j.at("loss").get<double>());
  }
  ASSERT_EQ(bpb.size(), 2u);
  EXPECT_LT(bpb[1], 0.6 * bpb[0]);
  EXPECT_NEAR(loss[0], std::log(300.0), 1e-3);  // the head starts at zero
  EXPECT_LT(loss.back(), 0.6 * loss[0]);
  EXPECT_TRUE(fs::exists(run_dir("learn") / "report.html"));

  const Words ask = {
      "generate", "--model", run_dir("learn").string(), "--prompt", "the ", "--max-tokens", "12", "--seed",
      "3",        "--json"};
  const Finished a = run_program(ask), b = run_program(ask);
  ASSERT_EQ(a.code, 0) << a.out;
  EXPECT_EQ(Json::parse(a.out).at("ids"), Json::parse(b.out).at("ids"));
  const Finished eval = run_program({"eval", "bpb", "--model", run_dir("learn").string(), "--data",
                                     (root_ / "data").string(), "--tokens", "256", "--batch", "2", "--json"});
  ASSERT_EQ(eval.code, 0) << eval.out;
  EXPECT_NEAR(Json::parse(eval.out).at("bpb").get<double>(), bpb[1], 1e-9);
}

// The baselines of one budget: the same model and FLOPs with both paths of attention.
TEST_F(Train, AFlopBudgetLeavesComparableRuns) {
  double steps = 0;
  for (const char* path : {"sdpa", "flex"}) {
    Words words = base(path, {"--target-flops", "2e9", "--attention", path, "--loss", "chunked"});
    const auto horizon = std::find(words.begin(), words.end(), "--num-iterations");
    words.erase(horizon, horizon + 2);
    const Finished done = run_program(words);
    ASSERT_EQ(done.code, 0) << done.out;
    EXPECT_NE(done.out.find(fmt::format("{} by cpu (", path)), std::string::npos) << done.out;
    const Json summary = Json::parse(read_file(run_dir(path) / "summary.json"));
    const Json& results = summary.at("results");
    EXPECT_NEAR(results.at("flops").get<double>(), 2e9, 1e8);
    EXPECT_GT(results.at("tok_per_sec").get<double>(), 0);
    EXPECT_GT(results.at("tflops").get<double>(), 0);
    EXPECT_GT(results.at("peak_memory_bytes").get<int64_t>(), 0);
    EXPECT_EQ(summary.at("horizon").at("from"), "target_flops");
    EXPECT_EQ(summary.at("attention").at("path"), path);
    EXPECT_EQ(summary.at("attention").at("kernel"), "cpu");
    EXPECT_EQ(summary.at("loss").at("backend"), "chunked");
    EXPECT_EQ(summary.at("loss").at("reason"), "asked for");
    if (steps == 0) steps = results.at("steps").get<double>();
    EXPECT_EQ(results.at("steps").get<double>(), steps);
  }
}

TEST(Accumulation, MicroBatchesAddUpToTheBigBatch) {
  const auto backend = make_cpu_backend();
  Gpt model({Arch::classic, 16, 50, 2, 2, 2, 32, ""}, *backend, DType::f32);
  model.init_weights(1);
  Rng rng(2);
  for (Parameter& p : model.parameters()) {
    for (int64_t i = 0; i < p.value.numel(); ++i) p.value.set(i, 0.1 * rng.normal());
  }
  const Tensor ids(host_arena(), {4, 16}, DType::i32), targets(host_arena(), {4, 16}, DType::i32);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    ids.set(i, static_cast<double>(rng.below(50)));
    targets.set(i, static_cast<double>(rng.below(50)));
  }
  const auto gradients = [&](int64_t rows) {
    model.zero_grad();
    for (int64_t r = 0; r < 4; r += rows) {
      Tape tape(*backend, true);
      model.nll(tape, ids.rows(r, rows), targets.rows(r, rows), 1.0 / 64);
      tape.backward();
    }
    std::vector<Tensor> out;
    for (const Parameter& p : model.parameters()) out.push_back(backend->clone(p.grad));
    return out;
  };
  const std::vector<Tensor> whole = gradients(4), micro = gradients(1);
  for (size_t k = 0; k < whole.size(); ++k) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < whole[k].numel(); ++i) {
      difference += std::pow(whole[k].get(i) - micro[k].get(i), 2);
      size += std::pow(whole[k].get(i), 2);
    }
    EXPECT_GT(size, 0) << model.parameters()[k].name;
    EXPECT_LE(std::sqrt(difference / size), 1e-5) << model.parameters()[k].name;
  }
}

TEST_F(Train, ANanStopsTheRunAndNamesATensor) {
  const Finished end =
      run_program(base("nan", {"--matrix-lr", "1e38", "--save-every", "1", "--grad-clip", "0"}));
  EXPECT_EQ(end.code, 1) << end.out;
  EXPECT_NE(end.out.find("first bad tensor: the "), std::string::npos) << end.out;
  EXPECT_NE(end.out.find("transformer."), std::string::npos) << end.out;
  EXPECT_NE(end.out.find("last good checkpoint"), std::string::npos) << end.out;
}

TEST_F(Train, ResumeRefusesOtherOptionsAndDamage) {
  ASSERT_EQ(run_program(base("strict", {"--stop-after", "4"})).code, 0);
  const Finished other = run_program(resume("strict", {"--matrix-lr", "0.5"}));
  EXPECT_EQ(other.code, 2);
  EXPECT_NE(other.out.find("matrix_lr: null there, 0.5 asked"), std::string::npos) << other.out;
  EXPECT_EQ(run_program(base("strict")).code, 2);  // the run exists
  EXPECT_EQ(run_program(resume("never")).code, 2);

  const fs::path weights = *find_latest_checkpoint(run_dir("strict")) / "model.safetensors";
  std::string bytes = read_file(weights);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  std::ofstream(weights, std::ios::binary) << bytes;
  const Finished damaged = run_program(resume("strict"));
  EXPECT_EQ(damaged.code, 2);
  EXPECT_NE(damaged.out.find("model.safetensors"), std::string::npos) << damaged.out;
  std::ofstream(weights, std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  EXPECT_EQ(run_program(resume("strict")).code, 2);
}

struct BadInput {
  Words more;
  std::string says;
};
class Bad : public Train, public ::testing::WithParamInterface<BadInput> {};

TEST_P(Bad, IsOneClearLineAndExitCode2) {
  const Finished end = run_program(base("bad", GetParam().more));
  EXPECT_EQ(end.code, 2) << end.out;
  EXPECT_NE(end.out.find(GetParam().says), std::string::npos) << end.out;
  EXPECT_FALSE(fs::exists(run_dir("bad")));
}

INSTANTIATE_TEST_SUITE_P(
    All, Bad,
    ::testing::Values(BadInput{{"--data", "/no/such/place"}, "/no/such/place"},
                      BadInput{{"--n-head", "3", "--n-kv-head", "3"}, "n_head 3 must divide n_embd 32"},
                      BadInput{{"--n-kv-head", "3"}, "n_kv_head 3"}, BadInput{{"--n-embd", "0"}, "--n-embd"},
                      BadInput{{"--detph", "3"}, "did you mean '--depth'"},
                      BadInput{{"--arch", "moderm"}, "modern"}, BadInput{{"--dtype", "f8"}, "bf16"},
                      BadInput{{"--total-batch-size", "100"}, "total"},
                      BadInput{{"--depth", "2"}, "--depth sets the shape"},
                      BadInput{{"--sequence-len", "40000", "--total-batch-size", "80000"}, "token"},
                      BadInput{{"--tokenizer", "/no/such/tokenizer"}, "/no/such/tokenizer"},
                      BadInput{{"--attention", "flx"}, "did you mean 'flex'"},
                      BadInput{{"--attention", "flex:cuda_mma"}, "allowed on cpu: sdpa, flex, auto, cpu"},
                      BadInput{{"--loss", "liger", "--loss-memory", "99"}, "one row of 300 logits"}));

}  // namespace
}  // namespace flexchat
