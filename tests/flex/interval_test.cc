// Interval analysis: every value in the box lies within the bounds; common forms are bounded exactly.
#include "flex/interval.h"

#include <gtest/gtest.h>

#include <cmath>

#include "flex/eval.h"
#include "flex/parse.h"
#include "testing/random_expression.h"

namespace flexchat::flex {
namespace {

TEST(RangeTable, EqualsAScan) {
  Rng rng(5);
  for (const int64_t n : {1, 63, 64, 65, 200, 1000}) {
    Tensor t(host_arena(), {n, 3}, DType::i64);
    for (int64_t i = 0; i < t.numel(); ++i) t.set(i, static_cast<double>(rng.below(1000)));
    const RangeTable table(t, 1, 3, n);
    for (int round = 0; round < 300; ++round) {
      const auto first = static_cast<int64_t>(rng.below(static_cast<uint64_t>(n)));
      const auto last = first + static_cast<int64_t>(rng.below(static_cast<uint64_t>(n - first)));
      double lo = 1e9, hi = -1e9;
      for (int64_t i = first; i <= last; ++i) {
        lo = std::min(lo, t.get(3 * i + 1));
        hi = std::max(hi, t.get(3 * i + 1));
      }
      const Interval range = table.range(first, last);
      ASSERT_EQ(range.lo, lo);
      ASSERT_EQ(range.hi, hi);
    }
  }
}

TEST(Interval, HoldsEveryValueOfRandomExpressions) {
  const Capture gain("gain", {Axis::pos}), bias("bias", {Axis::q, Axis::kv}),
      doc("doc", {Axis::b, Axis::pos}, Type::integer);
  RandomExpressions random(21, {gain, bias, doc}, false);
  Rng& rng = random.rng();
  int finite = 0;
  for (int round = 0; round < 6000; ++round) {
    constexpr int64_t n = 12;
    Bindings bindings;
    Tensor gains(host_arena(), {n}, DType::f32), biases(host_arena(), {n, n}, DType::bf16),
        docs(host_arena(), {2, n}, DType::i32);
    for (Tensor* t : {&gains, &biases}) {
      // Infinities and NaN are values too.
      for (int64_t i = 0; i < t->numel(); ++i) {
        const uint64_t pick = rng.below(60);
        t->set(i, pick == 0 ? std::nan("") : pick == 1 ? HUGE_VAL : pick == 2 ? -HUGE_VAL : rng.normal());
      }
    }
    for (int64_t i = 0; i < docs.numel(); ++i) docs.set(i, static_cast<double>(rng.below(5)));
    bindings.set("gain", gains).set("bias", biases).set("doc", docs);
    const int depth = static_cast<int>(rng.below(5));
    const Expr e = round % 2 == 0 ? random.number(depth) : random.integer(depth);
    IntervalAnalysis analysis(e, bindings);
    Evaluator evaluator({e}, bindings);
    const auto pick = [&](int64_t from) {
      return from + static_cast<int64_t>(rng.below(static_cast<uint64_t>(n - from)));
    };
    const int64_t q = pick(0), kv = pick(0);
    const Box box{q, pick(q), kv, pick(kv)};
    analysis.set_row(1, 0, 9, 11);
    const Interval range = analysis.range(box);
    finite += std::isfinite(range.lo) && std::isfinite(range.hi);
    for (int64_t i = box.q_first; i <= box.q_last; ++i) {
      for (int64_t j = box.kv_first; j <= box.kv_last; ++j) {
        const double x = evaluator({0, 1, 0, i, j, 9, 11});
        const bool inside = std::isnan(x) ? range.nan : range.lo <= x && x <= range.hi;
        ASSERT_TRUE(inside) << to_text(e) << " is " << x << " at q " << i << ", kv " << j << ", outside ["
                            << range.lo << ", " << range.hi << "]";
      }
    }
  }
  EXPECT_GT(finite, 3000);
}

TEST(Interval, IsExactForLinearForms) {
  IntervalAnalysis analysis(parse_expression("2*(q - kv) + q - 3*q + b"), {});
  analysis.set_row(5, 0, 0, 0);
  const Interval range = analysis.range({100, 227, 64, 127});  // -2*kv + 5
  EXPECT_EQ(range.lo, -249);
  EXPECT_EQ(range.hi, -123);
}

Truth truth_of(const std::string& text, const Box& box, int64_t n_kv = 1000) {
  IntervalAnalysis analysis(parse_mask(text), {});
  analysis.set_row(0, 0, 1000, n_kv);
  return analysis.truth(box);
}

TEST(Interval, DecidesDiagonals) {
  EXPECT_EQ(truth_of("causal", {127, 254, 0, 127}), Truth::always);
  EXPECT_EQ(truth_of("causal", {126, 254, 0, 127}), Truth::mixed);
  EXPECT_EQ(truth_of("causal", {0, 127, 128, 255}), Truth::never);
  EXPECT_EQ(truth_of("q - kv < 256", {256, 383, 0, 127}), Truth::mixed);
  EXPECT_EQ(truth_of("q - kv < 256", {383, 400, 0, 127}), Truth::never);
  EXPECT_EQ(truth_of("q - kv < 256", {300, 355, 100, 127}), Truth::always);
  EXPECT_EQ(truth_of("abs(q - kv) < 10", {0, 5, 10, 15}), Truth::mixed);
  EXPECT_EQ(truth_of("abs(q - kv) < 10", {0, 5, 15, 20}), Truth::never);
  EXPECT_EQ(truth_of("q // 64 == kv // 64", {64, 127, 64, 127}), Truth::always);
  EXPECT_EQ(truth_of("q // 64 == kv // 64", {64, 127, 0, 63}), Truth::never);
  EXPECT_EQ(truth_of("kv < n_kv - 3", {0, 0, 0, 6}, 10), Truth::always);
  EXPECT_EQ(truth_of("(q - kv) / 2 < 3.5", {10, 12, 6, 9}), Truth::always);
  EXPECT_EQ(truth_of("exp(-abs(q - kv)/10) > 0.5", {0, 7, 50, 60}), Truth::never);
  EXPECT_EQ(truth_of("log(kv - q) < 100", {5, 5, 0, 3}),
            Truth::mixed);  // NaN compares false; cautious is right
}

}  // namespace
}  // namespace flexchat::flex
