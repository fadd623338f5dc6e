// The certificate itself: it passes on a backend that is right, and fails on one that is not.
#include "verify/attention_suite.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <set>
#include <string>
#include <tuple>

namespace flexchat {
namespace {

void expect_pass(const std::vector<Check>& checks) {
  for (const Check& c : checks) {
    EXPECT_TRUE(c.pass) << c.name << ": max_abs " << c.max_abs << ", max_rel " << c.max_rel << ", limit "
                        << c.limit;
  }
}

// Two heads, 40 queries and keys, nothing masked.
AttentionCase small_case(const std::string& name, double scale) {
  AttentionCase c;
  c.name = name;
  c.shape.batch = 1;
  c.shape.n_head = c.shape.n_kv_head = 2;
  c.shape.q_len = c.shape.kv_len = 40;
  c.shape.head_dim = 32;
  c.spec.scale = scale;
  return c;
}

TEST(AttentionSuite, PassesOnTheCpu) {
  const auto cpu = make_cpu_backend();
  std::set<std::string> names;
  for (const AttentionCase& c : attention_suite()) {
    EXPECT_TRUE(names.insert(c.name).second) << "two cases named " << c.name;
    expect_pass(check_attention(c, *cpu, DType::f32));
  }
}

TEST(AttentionSuite, ModelsAgree) {
  const auto cpu = make_cpu_backend();
  expect_pass(check_models(*cpu, DType::f32));
}

TEST(AttentionSuite, SameBits) {
  const auto cpu = make_cpu_backend();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    expect_pass(
        {check_pages_bit_for_bit(*cpu, dtype, "auto"), check_backward_repeats(*cpu, dtype, "auto", 5)});
  }
}

// FLEXCHAT_FUZZ_CASES=10000 makes this the long run.
TEST(AttentionSuite, RandomCases) {
  const char* const count = std::getenv("FLEXCHAT_FUZZ_CASES");
  const int64_t n = count ? std::atoll(count) : 60;
  const auto cpu = make_cpu_backend();
  for (int64_t seed = 1; seed <= n; ++seed) {
    const AttentionCase c = random_attention_case(static_cast<uint64_t>(seed));
    SCOPED_TRACE(c.name);
    const DType dtype = seed % 3 == 0 ? DType::bf16 : seed % 3 == 1 ? DType::f32 : DType::f16;
    expect_pass(check_attention(c, *cpu, dtype));
    if (HasFailure()) return;
  }
}

// Where scores are small and gradients do not cancel, the limits are those of attention_limits.
TEST(AttentionSuite, LimitsGrowOnlyWhereDigitsAreLost) {
  const auto cpu = make_cpu_backend();
  const AttentionLimits limits = attention_limits(DType::f32);
  AttentionCase c = small_case("case", 0.15);
  for (const Check& check : check_attention(c, *cpu, DType::f32)) {
    const double plain = check.measure == "max_rel"    ? limits.gradient
                         : check.name.ends_with("lse") ? limits.lse
                                                       : limits.out;
    EXPECT_EQ(check.limit, plain) << check.name;
    EXPECT_TRUE(check.pass) << check.name;
  }

  // Every query sees one key: weights are 1, and the gradients of scores dout.v - dout.out are 0.
  c.spec.causal = true;
  c.spec.window = 0;
  const AttentionReference reference = reference_attention(c, DType::f32);
  for (const Check& check : check_attention(c, *cpu, DType::f32)) {
    // What dq and dk are held to is then a rounding of f32 of their terms, not of what is left.
    for (const auto& [name, left, terms] : {std::tuple{"case dq", reference.results.dq, reference.dq},
                                            std::tuple{"case dk", reference.results.dk, reference.dk}}) {
      if (check.name != name) continue;
      EXPECT_GT(check.limit, limits.gradient);
      EXPECT_LT(check.limit * norm(left), 0x1p-23 * norm(terms));
    }
    EXPECT_TRUE(check.pass) << check.name << " " << check.max_rel << " " << check.limit;
  }
  for (int64_t i = 0; i < reference.dq.numel(); ++i) {
    ASSERT_LT(std::abs(reference.results.dq.get(i)), 1e-12);
    ASSERT_GT(reference.dq.get(i), 1e-6);
    ASSERT_NEAR(reference.dv.get(i), std::abs(reference.results.dv.get(i)), 1e-12);  // one term
  }
}

// A backward is given the output as it is stored. Where gradients cancel, as with two keys, the rounding of
// that would be most of what shows.
TEST(AttentionSuite, TheStoredOutputsRoundingIsNobodysError) {
  const auto cpu = make_cpu_backend();
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    AttentionCase c = small_case("two keys", 0.2);
    c.shape.q_len = 1;
    c.shape.kv_len = 2;
    c.seed = seed;
    for (const Check& check : check_attention(c, *cpu, DType::bf16)) {
      if (check.measure == "max_rel") {
        EXPECT_LT(check.max_rel, 0.5 * attention_limits(DType::bf16).gradient) << check.name;
      }
      EXPECT_TRUE(check.pass) << check.name;
    }
  }
}

// A wrong scale, a shifted window, another seed of the dropout: each must show.
TEST(AttentionSuite, AWrongResultFails) {
  const auto cpu = make_cpu_backend();
  AttentionCase right = small_case("right", 0.2);
  right.spec.causal = true;
  right.spec.window = 9;
  right.spec.dropout = 0.1;
  const AttentionResults want = reference_attention(right, DType::f32).results;
  const auto error = [&](const AttentionCase& c) {
    return compare("out", run_attention(c, *cpu, DType::f32).out, want.out, "max_abs", 5e-7);
  };
  EXPECT_TRUE(error(right).pass);
  AttentionCase wrong = right;
  wrong.spec.scale = 0.2001;
  EXPECT_FALSE(error(wrong).pass);
  wrong = right;
  wrong.spec.window = 10;
  EXPECT_FALSE(error(wrong).pass);
  wrong = right;
  wrong.spec.dropout_seed = 1;
  EXPECT_FALSE(error(wrong).pass);
}

}  // namespace
}  // namespace flexchat
