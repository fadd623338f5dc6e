// --attention and --loss as words: what they set, what they refuse, what records say, and that no choice
// changes results beyond rounding.
#include "models/run_options.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "support/temp_folder.h"
#include "testing/tiny_gpt.h"

namespace flexchat {
namespace {

TEST(AttentionOptions, WordsAndWhatTheyMean) {
  const auto backend = make_cpu_backend();
  Gpt model(tiny_config(Arch::modern), *backend, DType::f32);
  struct Case {
    const char *word, *path;
  };
  for (const Case& c : {Case{"sdpa", "sdpa"},
                        {"flex", "flex"},
                        {"auto", "sdpa"},
                        {"cpu", "sdpa"},
                        {"flex:cpu", "flex"},
                        {"flex:auto", "flex"},
                        {"sdpa:cpu", "sdpa"}}) {
    AttentionOptions{c.word}.apply(model);
    model.plan_attention(1, 160);
    const Json record = attention_record(model);
    EXPECT_EQ(record.at("path"), c.path) << c.word;
    EXPECT_EQ(record.at("kernel"), "cpu") << c.word;
    EXPECT_NE(record.at("reason"), "") << c.word;
    EXPECT_EQ(attention_line(model).find(std::string(c.path) + " by cpu ("), 0u) << attention_line(model);
  }
}

TEST(AttentionOptions, RecordsNameEachKernelAndReasonOnce) {
  const auto backend = make_cpu_backend();
  Gpt model(tiny_config(Arch::modern), *backend, DType::f32);  // windows and whole rows: two plans
  EXPECT_EQ(attention_record(model).at("kernel"), "");
  model.plan_attention(1, 160);
  ASSERT_EQ(model.attention_plans().size(), 2u);
  ASSERT_EQ(model.attention_plans()[0]->reason(), model.attention_plans()[1]->reason());
  EXPECT_EQ(attention_record(model).at("reason"), model.attention_plans()[0]->reason());
  EXPECT_EQ(attention_record(model).at("kernel"), "cpu");
}

TEST(AttentionOptions, UnknownWordsListWhatIsAllowed) {
  const auto backend = make_cpu_backend();
  Gpt model(tiny_config(Arch::classic), *backend, DType::f32);
  const auto error = [&](const char* word) {
    return message_of<Error>([&] { AttentionOptions{word}.apply(model); });
  };
  const std::string allowed = "; allowed on cpu: sdpa, flex, auto, cpu, or both as in flex:cpu";
  EXPECT_EQ(error("flx"), "--attention: unknown 'flx' (did you mean 'flex'?)" + allowed);
  for (const char* word :
       {"cuda_mma", "flex:cuda_mma", "cpu:flex", "cpu:cpu", "flex:", ":cpu", "", "flex:cpu:x"}) {
    const std::string said = error(word);
    EXPECT_EQ(said.find(fmt::format("--attention: unknown '{}'", word)), 0u) << said;
    EXPECT_NE(said.find(allowed), std::string::npos) << said;
  }
}

// (loss, gradient of the head and of the embedding) of one batch.
std::vector<Tensor> results(Gpt& model, const Batch& batch) {
  model.zero_grad();
  Tape tape(model.backend(), true);
  std::vector<Tensor> out = {model.nll(tape, batch.ids, batch.targets, 1.0 / 96)};
  tape.backward();
  for (const char* name : {"lm_head.weight", "transformer.wte.weight"})
    out.push_back(duplicate(model.parameter(name).grad));
  return out;
}

TEST(HeadLossOptions, EveryChoiceGivesTheSameLossAndGradients) {
  const auto backend = make_reference_backend();
  Gpt model(tiny_config(Arch::classic), *backend, DType::f64);
  randomize(model, 2);
  const Batch batch = random_batch(model.config(), 2, 48, 3);
  HeadLossOptions{"full", 0}.apply(model);
  const std::vector<Tensor> want = results(model, batch);
  EXPECT_GT(max_abs(want[0]), 1);
  for (const HeadLossOptions& choice : {HeadLossOptions{"auto", 0}, {"liger", 3000}, {"cce", 2000}}) {
    choice.apply(model);
    const std::vector<Tensor> got = results(model, batch);
    for (size_t i = 0; i < want.size(); ++i)
      EXPECT_LE(max_difference(got[i], want[i]), 1e-12) << choice.loss << " " << i;
  }
}

TEST(HeadLossOptions, PlansFollowTheBudgetAndSaySo) {
  const auto backend = make_cpu_backend();
  Gpt model(tiny_config(Arch::classic), *backend, DType::f32);
  const auto record = [&](const HeadLossOptions& options, int64_t rows) {
    options.apply(model);
    return loss_record(model.loss_plan(rows, true));
  };
  EXPECT_EQ(record({"auto", 0}, 100).at("backend"), "full");
  EXPECT_EQ(record({"auto", 1 << 16}, 100000).at("backend"), "chunked");
  EXPECT_EQ(record({"auto", 4096}, 100000).at("backend"), "cce");
  EXPECT_EQ(record({"current", 0}, 100000).at("memory_bytes"), 100000 * 37 * 4);
  const Json chunked = record({"liger", 37 * 4 * 10}, 100000);
  EXPECT_EQ(chunked.at("backend"), "chunked");
  EXPECT_EQ(chunked.at("panel_rows"), 10);
  EXPECT_EQ(chunked.at("reason"), "asked for");
  EXPECT_EQ(loss_line(model.loss_plan(100000, true)),
            "chunked, 1.4 KiB of logits (10 x 37) at a time (asked for)");
  EXPECT_NE(message_of<Error>([&] {
              record({"chunked", 10}, 100);
            }).find("one row of 37 logits"),
            std::string::npos);
  EXPECT_THROW(record({"ful", 0}, 1), Error);
}

TEST(HeadLossOptions, ABatchWithoutTargetsIsSaidOnce) {
  // In a process of its own: what was said is remembered.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto twice = [] {
    const auto backend = make_cpu_backend();
    Gpt model(tiny_config(Arch::classic), *backend, DType::f32);
    Batch batch = random_batch(model.config(), 1, 8, 4);
    for (int64_t i = 0; i < 8; ++i) batch.targets.set(i, -1);
    model.check_ids(batch.ids, batch.targets);
    model.check_ids(batch.ids, batch.targets);
    std::exit(0);
  };
  EXPECT_EXIT(twice(), ::testing::ExitedWithCode(0),
              "^flexchat: warning: a batch has no valid target[^\n]*\n$");
}

}  // namespace
}  // namespace flexchat
