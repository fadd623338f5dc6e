// Generation: the cache changes nothing, callbacks stop it, seeds repeat it, limits are told.
#include "engine/generate.h"

#include <gtest/gtest.h>

#include "support/temp_folder.h"
#include "testing/tiny_gpt.h"

namespace flexchat {
namespace {

class Generate : public testing::TestWithParam<Arch> {
 protected:
  Generate() { randomize(model, 1); }
  std::vector<int32_t> run(const std::vector<int32_t>& start, int64_t n, const SamplingOptions& sampling) {
    std::vector<int32_t> tokens;
    generate(model, start, n, sampling, [&](int32_t t) {
      tokens.push_back(t);
      return true;
    });
    return tokens;
  }
  // The same without a cache: a whole forward for every token.
  std::vector<int32_t> run_naively(std::vector<int32_t> tokens, int64_t n, const SamplingOptions& sampling) {
    const auto start = std::ssize(tokens);
    Sampler sampler(sampling);
    for (int64_t i = 0; i < n; ++i) {
      const Tensor ids(host_arena(), {1, std::ssize(tokens)}, DType::i32);
      for (size_t t = 0; t < tokens.size(); ++t) ids.as<int32_t>()[t] = tokens[t];
      const Tensor logits = model.logits(ids, nullptr, true);
      tokens.push_back(sampler.sample({logits.as<float>(), static_cast<size_t>(logits.numel())}));
    }
    return {tokens.begin() + start, tokens.end()};
  }
  const Threads one_thread{1};  // these models are too small for more
  std::unique_ptr<Backend> cpu = make_cpu_backend();
  Gpt model{tiny_config(GetParam()), *cpu, DType::f32};
  const std::vector<int32_t> prompt = {3, 1, 4, 1, 5};
};
INSTANTIATE_TEST_SUITE_P(Archs, Generate, testing::Values(Arch::classic, Arch::modern),
                         [](const auto& arch) { return std::string(arch_name(arch.param)); });

TEST_P(Generate, IsWhatTheModelSaysWithoutCache) {
  for (const SamplingOptions& sampling : {SamplingOptions{0, 0, 1}, {1, 0, 5}, {0.8, 3, 6}}) {
    EXPECT_EQ(run(prompt, 20, sampling), run_naively(prompt, 20, sampling));
    EXPECT_EQ(run({7}, 20, sampling), run_naively({7}, 20, sampling));
  }
}

TEST_P(Generate, TheSeedDecides) {
  EXPECT_EQ(run(prompt, 30, {1, 0, 5}), run(prompt, 30, {1, 0, 5}));
  EXPECT_NE(run(prompt, 30, {1, 0, 5}), run(prompt, 30, {1, 0, 6}));
  EXPECT_EQ(run(prompt, 30, {0, 0, 5}), run(prompt, 30, {0, 0, 6}));
}

TEST_P(Generate, StopsWhenToldTo) {
  const std::vector<int32_t> all = run(prompt, 10, {1, 0, 5});
  ASSERT_EQ(all.size(), 10u);
  std::vector<int32_t> some;
  generate(model, prompt, 10, {1, 0, 5}, [&](int32_t t) {
    some.push_back(t);
    return some.size() < 4;
  });
  EXPECT_EQ(some, (std::vector<int32_t>(all.begin(), all.begin() + 4)));
  EXPECT_EQ(run(prompt, 0, {1, 0, 5}).size(), 0u);
}

TEST_P(Generate, TokensAreOfTheVocabularyNotItsPadding) {
  for (const int32_t t : run(prompt, 60, {1e6, 0, 5})) {
    EXPECT_GE(t, 0);
    EXPECT_LT(t, model.config().vocab_size);
  }
}

TEST_P(Generate, LimitsAreTold) {
  EXPECT_EQ(message_of<Error>([&] { run({}, 5, {}); }), "cannot continue an empty prompt");
  EXPECT_EQ(message_of<Error>([&] { run(prompt, 2556, {}); }),
            "a prompt of 5 tokens and 2556 new ones do not fit the model's 2560 positions");
  EXPECT_EQ(message_of<Error>([&] { run(prompt, std::numeric_limits<int64_t>::max(), {}); }),
            "a prompt of 5 tokens and 9223372036854775807 new ones do not fit the model's 2560 positions");
  EXPECT_EQ(message_of<Error>([&] { run(std::vector<int32_t>(2561, 1), 0, {}); }),
            "a prompt of 2561 tokens and 0 new ones do not fit the model's 2560 positions");
}

// The last position of the rotary table can be reached.
TEST(GenerateToTheEnd, UsesEveryPosition) {
  const auto cpu = make_cpu_backend();
  GptConfig config = tiny_config(Arch::classic);
  config.sequence_len = 2;
  Gpt model(config, *cpu, DType::bf16);
  randomize(model, 1);
  int count = 0;
  generate(model, {1, 2, 3}, 17, {1, 0, 1}, [&](int32_t) { return ++count > 0; });
  EXPECT_EQ(count, 17);
}

}  // namespace
}  // namespace flexchat
