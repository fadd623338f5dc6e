// Building and printing expressions: types, sharing, folding.
#include "flex/expr.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include <thread>

#include "base/error.h"
#include "flex/eval.h"
#include "flex/mods.h"
#include "flex/parse.h"
#include "flex/program.h"
#include "testing/random_expression.h"

namespace flexchat::flex {
namespace {

std::string error_of(const std::function<void()>& build) {
  try {
    build();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Evaluator, SizesOfWhatAFloatRounds) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  Point p;
  p.score = 3;
  p.q = 2;
  p.kv = 12;
  const auto sizes = [&](const Expr& e) { return Evaluator({e}, Bindings()).rounded_sizes(p); };
  EXPECT_EQ(sizes(score), 0);
  EXPECT_EQ(sizes(where(kv <= q, score, -abs(min(score, 0.0)))), 0) << "these round nothing";
  EXPECT_EQ(sizes(q - kv), 0) << "an integer";
  EXPECT_EQ(sizes(score - 0.5 * (q - kv)), 5 + 8);
  EXPECT_EQ(sizes(max(log(0.0 * q), score)), 0) << "an infinity, from which nothing follows";
}

TEST(Expr, EqualExpressionsAreOneNode) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  EXPECT_TRUE(same((q - kv) * 2 < n_kv, (q - kv) * 2 < n_kv));
  EXPECT_FALSE(same(q - kv, kv - q));
  EXPECT_FALSE(same(Expr(2), Expr(2.0)));
  EXPECT_FALSE(same(Expr(0.0), Expr(-0.0)));
  const Expr distance = q - kv;
  const Program program({score - distance * distance + exp(q - kv)});
  EXPECT_EQ(program.code.size(), 8u);  // score q kv - * - exp +
}

TEST(Expr, FoldsConstantsAndNeutralOperands) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const auto text = [](const Expr& e) { return to_text(e); };
  EXPECT_EQ(text(Expr(2) + 3), "5");
  EXPECT_EQ(text(Expr(7) / 2), "3.5");
  EXPECT_EQ(text(floor_div(-7, 2)), "-4");
  EXPECT_EQ(text(Expr(-7) % 4), "1");
  EXPECT_EQ(text(score + 0), "score");
  EXPECT_EQ(text(score * 1.0), "score");
  EXPECT_EQ(text(q * 0), "0");
  EXPECT_EQ(text(q - q), "0");
  EXPECT_EQ(text(q == q), "true");
  EXPECT_EQ(text(-(-score)), "score");
  EXPECT_EQ(text((q < kv) && true), "q < kv");
  EXPECT_EQ(text((q < kv) || true), "true");
  EXPECT_EQ(text(where(Expr(1) < 2, score, 0.0)), "score");
  // What could be NaN, or would change type, or would overflow, stays.
  EXPECT_EQ(text(score == score), "score == score");
  EXPECT_EQ(text(score * 0.0), "score * 0.0");
  EXPECT_EQ(text(q * 1.0), "q * 1.0");
  EXPECT_EQ(text(sqrt(-1.0)), "sqrt(-1.0)");
  EXPECT_EQ(text(Expr(2000000000) + 2000000000), "2000000000 + 2000000000");
}

TEST(Expr, KnowsTypesAndVariables) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  EXPECT_EQ((q - kv).type(), Type::integer);
  EXPECT_EQ((q / kv).type(), Type::number);
  EXPECT_EQ(min(q, 1.5).type(), Type::number);
  EXPECT_EQ((q < 3).type(), Type::boolean);
  const Capture slope("slope", {Axis::h});
  EXPECT_TRUE((score - slope(h)).uses(Var::h));
  EXPECT_FALSE((score - slope(h)).uses(Var::q));
}

TEST(Expr, ExplainsTypeErrors) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  EXPECT_EQ(error_of([&, q = q] { (void)(q && true); }),
            "'&&' needs booleans, but its left side `q` is an integer");
  EXPECT_EQ(error_of([&, q = q] { (void)((q < 1) + 1); }),
            "'+' needs numbers, but its left side `q < 1` is a boolean");
  EXPECT_EQ(error_of([&, s = score] { (void)(s % 2); }),
            "'%' needs integers, but its left side `score` is a number");
  EXPECT_EQ(error_of([&, q = q] { (void)floor_div(q, 0); }), "'//' divides by zero");
  EXPECT_EQ(error_of([&, q = q] { (void)where(q, 1, 2); }),
            "'where' needs a boolean condition, but its argument 1 `q` is an integer");
  EXPECT_EQ(error_of([] { (void)Expr(int64_t{1} << 40); }),
            "the integer 1099511627776 does not fit 32 bits; write a number (1099511627776.0)");
  const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}), doc("doc", {Axis::b, Axis::pos}, Type::integer);
  EXPECT_EQ(error_of([&, b = b, h = h, kv = kv] { (void)kf(h, b, kv); }),
            "index 1 of kf[b,h,kv] must be b, not `h`");
  EXPECT_EQ(error_of([&, b = b] { (void)kf(b); }), "kf[b,h,kv] has 3 axis indexes, not 1");
  EXPECT_EQ(error_of([&, b = b, h = h] { (void)doc(b, h); }),
            "index 2 of doc[b,pos] must be q or kv, not `h`");
  EXPECT_EQ(error_of([] { Capture("kv", {Axis::h}); }),
            "captured tensor 'kv': the name already means something in expressions");
  EXPECT_NE(error_of([] { Capture("2x", {Axis::h}); }).find("starts with no digit"), std::string::npos);
  EXPECT_NE(error_of([] { Capture("x", {Axis::h}, Type::integer, true); }).find("cannot be differentiable"),
            std::string::npos);
  EXPECT_NE(error_of([] { check_score_mod(causal()); }).find("use it as a mask"), std::string::npos);
}

TEST(Expr, RefusesEndlessNesting) {
  Expr e = variables().score;
  EXPECT_NE(error_of([&] {
              for (int i = 0; i < 100000; ++i) e = exp(e);
            }).find("levels deep"),
            std::string::npos);
}

TEST(Expr, IsSharedSafelyBetweenThreads) {
  std::vector<std::thread> threads;
  std::vector<std::string> texts(4);
  for (size_t t = 0; t < texts.size(); ++t) {
    threads.emplace_back([&texts, t] {
      for (int i = 0; i < 300; ++i) {
        RandomExpressions random(static_cast<uint64_t>(i), {}, true);
        texts[t] += to_text(random.number(3));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : texts) EXPECT_EQ(text, texts[0]);
}

TEST(Eval, FollowsTheDefinitions) {
  const Capture table("table", {Axis::h, Axis::any});
  const Bindings bindings = Bindings().set(
      "table", Tensor::from<double>(std::vector<double>{1, 2, 3, 4, 5, 6}, {2, 3}, DType::f32));
  const Point p{.score = 0.5, .b = 1, .h = 1, .q = 7, .kv = 3, .n_q = 10, .n_kv = 20};
  const auto value = [&](const std::string& text) {
    return evaluate(parse_expression(text, {table}), p, bindings);
  };
  EXPECT_EQ(value("score - 2*(q - kv)"), -7.5);
  EXPECT_EQ(value("(kv - q) // 3"), -2);
  EXPECT_EQ(value("(kv - q) % 3"), 2);
  EXPECT_EQ(value("q // (kv - 3)"), 0);
  EXPECT_EQ(value("q % (kv - 3)"), 7);
  EXPECT_EQ(value("table[h, min(q - kv, 2)]"), 6);
  EXPECT_EQ(value("where(kv <= q && !(b == 0), n_q, n_kv)"), 10);
  EXPECT_EQ(value("max(score, log(-score))"), 0.5);  // log of a negative number is NaN
  EXPECT_DOUBLE_EQ(value("softcap(2)"), 2 * std::tanh(0.25));
  EXPECT_DOUBLE_EQ(value("softplus(score)"), std::log1p(std::exp(0.5)));
  EXPECT_EQ(value("softplus(1000*score)"), 500);
  EXPECT_DOUBLE_EQ(value("sigmoid(-1000*score)"), std::exp(-500.0));
  EXPECT_EQ(error_of([&] { value("table[h, q - kv]"); }),
            "captured tensor table[h,any]: index 4 of axis 2 is outside [0, 3)");
}

TEST(Mods, SpellWhatTheyMean) {
  const Capture slope("slope", {Axis::h}), doc("doc", {Axis::pos}, Type::integer),
      rel("rel", {Axis::h, Axis::any});
  EXPECT_EQ(to_text(causal() && (window(8) || sink(2))), "kv <= q && (q - kv < 8 || kv < 2)");
  EXPECT_EQ(to_text(document(doc)), "doc[q] == doc[kv]");
  EXPECT_EQ(to_text(softcap(30, alibi(slope))), "30 * tanh((score - slope[h] * (q - kv)) / 30)");
  EXPECT_EQ(to_text(relative_position(rel, 4)), "score + rel[h,max(min(q - kv, 4), -4) + 4]");
}

}  // namespace
}  // namespace flexchat::flex
