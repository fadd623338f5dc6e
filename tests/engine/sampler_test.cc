// Sampling: greedy, top-k with ties, the distribution, seeds.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "support/temp_folder.h"

namespace flexchat {
namespace {

const std::vector<float> kLogits = {0.5f, 2.0f, -1.0f, 2.0f, 1.0f, -30.0f, 0.0f};

std::vector<int32_t> draw(const SamplingOptions& options, const std::vector<float>& logits, int n) {
  Sampler sampler(options);
  std::vector<int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(sampler.sample(logits));
  return tokens;
}

// softmax of logits/temperature over the tokens `kept`.
std::map<int32_t, double> expected(const std::vector<float>& logits, double temperature,
                                   const std::vector<int32_t>& kept) {
  std::map<int32_t, double> p;
  double sum = 0;
  for (const int32_t t : kept) {
    sum += p[t] = std::exp(static_cast<double>(logits[static_cast<size_t>(t)]) / temperature);
  }
  for (auto& [t, value] : p) value /= sum;
  return p;
}

// Every frequency within 5 standard deviations of its probability; nothing outside `p` is drawn.
void expect_frequencies(const SamplingOptions& options, const std::vector<float>& logits,
                        const std::map<int32_t, double>& p) {
  constexpr int kDraws = 40000;
  std::map<int32_t, int> counts;
  for (const int32_t t : draw(options, logits, kDraws)) ++counts[t];
  for (const auto& [t, count] : counts)
    EXPECT_TRUE(p.contains(t)) << "token " << t << " drawn " << count << " times";
  for (const auto& [t, probability] : p) {
    const double bound = 5 * std::sqrt(probability * (1 - probability) / kDraws) + 1e-4;
    EXPECT_NEAR(static_cast<double>(counts[t]) / kDraws, probability, bound) << "token " << t;
  }
}

TEST(Sampler, TemperatureZeroTakesTheFirstOfTheLargest) {
  for (const int64_t top_k : {0, 1, 3}) {
    EXPECT_EQ(draw({0, top_k, 7}, kLogits, 5), (std::vector<int32_t>(5, 1)));
  }
  EXPECT_EQ(draw({0, 0, 1}, {-5.0f}, 1), (std::vector<int32_t>{0}));
  EXPECT_EQ(draw({0, 0, 1}, {-5.0f, -4.0f}, 1), (std::vector<int32_t>{1}));
}

TEST(Sampler, FrequenciesAreProbabilities) {
  for (const double temperature : {0.5, 1.0, 3.0}) {
    expect_frequencies({temperature, 0, 3}, kLogits, expected(kLogits, temperature, {0, 1, 2, 3, 4, 5, 6}));
  }
  // The size of logits does not matter, only their differences.
  std::vector<float> large = kLogits;
  for (float& x : large) x += 5000;
  expect_frequencies({1, 0, 4}, large, expected(kLogits, 1, {0, 1, 2, 3, 4, 5, 6}));
}

TEST(Sampler, TopKKeepsTies) {
  expect_frequencies({1, 1, 5}, kLogits, expected(kLogits, 1, {1, 3}));
  expect_frequencies({1, 2, 5}, kLogits, expected(kLogits, 1, {1, 3}));
  expect_frequencies({1, 3, 5}, kLogits, expected(kLogits, 1, {1, 3, 4}));
  expect_frequencies({0.7, 4, 5}, kLogits, expected(kLogits, 0.7, {0, 1, 3, 4}));
  for (const int64_t all : {7, 8, 1000}) {
    EXPECT_EQ(draw({1, all, 5}, kLogits, 200), draw({1, 0, 5}, kLogits, 200));
  }
}

// Chosen by top-k before the temperature: a cold sampler still has the ties to choose from, and no
// temperature lets others in.
TEST(Sampler, ExtremeTemperatures) {
  expect_frequencies({1e-300, 0, 6}, kLogits, {{1, 0.5}, {3, 0.5}});
  expect_frequencies({1e300, 2, 6}, kLogits, {{1, 0.5}, {3, 0.5}});
  expect_frequencies({1e300, 0, 6}, {1.0f, -80.0f, 3.0f, 90.0f},
                     {{0, 0.25}, {1, 0.25}, {2, 0.25}, {3, 0.25}});
}

TEST(Sampler, MaskedLogitsAreNeverDrawn) {
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<float> logits = {none, 1.0f, none, 1.0f, none};
  expect_frequencies({1, 0, 8}, logits, {{1, 0.5}, {3, 0.5}});
  expect_frequencies({1, 4, 8}, logits, {{1, 0.5}, {3, 0.5}});
}

TEST(Sampler, TheSeedDecides) {
  const SamplingOptions options = {1, 0, 11}, other = {1, 0, 12};
  EXPECT_EQ(draw(options, kLogits, 100), draw(options, kLogits, 100));
  EXPECT_NE(draw(options, kLogits, 100), draw(other, kLogits, 100));
}

TEST(Sampler, RefusesOptionsOutOfRange) {
  EXPECT_EQ(message_of<Error>([] { Sampler({-0.5, 0, 1}); }), "temperature -0.5 must be 0 or more");
  EXPECT_EQ(message_of<Error>([] { Sampler({HUGE_VAL, 0, 1}); }), "temperature inf must be 0 or more");
  EXPECT_NE(message_of<Error>([] { Sampler({std::nan(""), 0, 1}); }), "");
  EXPECT_EQ(message_of<Error>([] { Sampler({1, -1, 1}); }), "top-k -1 must be 0 (off) or more");
}

}  // namespace
}  // namespace flexchat
