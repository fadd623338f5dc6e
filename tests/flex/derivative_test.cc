// Symbolic derivatives against central differences.
#include "flex/derivative.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <optional>

#include "base/error.h"
#include "flex/eval.h"
#include "flex/mods.h"
#include "flex/parse.h"
#include "testing/random_expression.h"

namespace flexchat::flex {
namespace {

TEST(Derivative, IsSimplified) {
  const Capture slope("slope", {Axis::h}, Type::number, true),
      amp("amp", {Axis::b, Axis::h, Axis::kv}, Type::number, true);
  const std::vector<Capture> captures = {slope, amp};
  const auto ds = [&](const std::string& text) {
    return to_text(score_derivative(parse_expression(text, captures)));
  };
  EXPECT_EQ(ds("score - slope[h]*(q-kv)"), "1.0");
  EXPECT_EQ(ds("q - kv"), "0.0");
  EXPECT_EQ(ds("score*2.0 + 7"), "2.0");
  EXPECT_EQ(ds("where(kv <= q, score, -inf)"), "where(kv <= q, 1.0, 0.0)");
  EXPECT_EQ(ds("where(kv <= q, score, score + 1)"), "1.0");
  EXPECT_EQ(ds("exp(score)"), "exp(score)");
  EXPECT_EQ(ds("4*tanh(score/4)"), "4 * ((1.0 - tanh(score / 4) * tanh(score / 4)) * 0.25)");
  const auto gradients =
      capture_derivatives(parse_expression("score - slope[h]*(q-kv) + log(amp[b,h,kv])", captures));
  ASSERT_EQ(gradients.size(), 2u);
  EXPECT_EQ(to_text(gradients[0].access), "slope[h]");
  EXPECT_EQ(to_text(gradients[0].derivative), "-(q - kv)");
  EXPECT_EQ(to_text(gradients[1].derivative), "1.0 / amp[b,h,kv]");
}

TEST(Derivative, LeavesFrozenTensorsAlone) {
  const Capture slope("slope", {Axis::h});
  EXPECT_TRUE(capture_derivatives(alibi(slope)).empty());
  EXPECT_THROW(derivative(variables().score, variables().q), Error);
  EXPECT_THROW(derivative(variables().score, variables().score + 1), Error);
}

// The slope at x from central differences with two steps, or nothing when they disagree (a kink is near).
std::optional<double> measured_slope(const std::function<double(double)>& f, double x) {
  const auto slope = [&](double step) { return (f(x + step) - f(x - step)) / (2 * step); };
  const double coarse = slope(2e-4), fine = slope(1e-4);
  const double size = std::max({1.0, std::abs(fine), std::abs(f(x))});
  if (!std::isfinite(coarse) || !std::isfinite(fine) || std::abs(coarse - fine) > 1e-6 * size)
    return std::nullopt;
  return fine + (fine - coarse) / 3;
}

TEST(Derivative, AgreesWithFiniteDifferences) {
  const Capture gain("gain", {Axis::pos}, Type::number, true), slope("slope", {Axis::h}, Type::number, true);
  RandomExpressions random(11, {gain, slope}, true);
  Rng& rng = random.rng();
  int checked = 0, nonzero = 0;
  for (int i = 0; i < 6000; ++i) {
    const Expr mod = random.number(1 + static_cast<int>(rng.below(4)));
    Bindings bindings;
    Tensor gains(host_arena(), {8}, DType::f64), slopes(host_arena(), {2}, DType::f64);
    for (int64_t k = 0; k < 8; ++k) gains.set(k, rng.normal());
    for (int64_t k = 0; k < 2; ++k) slopes.set(k, rng.normal());
    bindings.set("gain", gains).set("slope", slopes);
    Point p{.score = rng.normal(),
            .b = 0,
            .h = static_cast<int64_t>(rng.below(2)),
            .q = static_cast<int64_t>(rng.below(8)),
            .kv = static_cast<int64_t>(rng.below(8)),
            .n_q = 8,
            .n_kv = 8};
    Evaluator evaluator({mod}, bindings);
    const auto compare = [&](double symbolic, const std::function<double(double)>& f, double x,
                             const Expr& leaf) {
      const std::optional<double> slope_at = measured_slope(f, x);
      if (!slope_at) return;
      ++checked;
      nonzero += symbolic != 0;
      const double scale = std::max({1.0, std::abs(symbolic), std::abs(f(x))});
      EXPECT_NEAR(symbolic, *slope_at, 2e-6 * scale) << to_text(mod) << "\nby " << to_text(leaf);
    };
    compare(
        evaluate(score_derivative(mod), p, bindings),
        [&](double x) {
          Point at = p;
          at.score = x;
          return evaluator(at);
        },
        p.score, variables().score);
    // All accesses of one tensor that read entry e add up to the gradient of e.
    for (auto& [capture, tensor] : {std::pair<const Capture&, Tensor&>{gain, gains},
                                    std::pair<const Capture&, Tensor&>{slope, slopes}}) {
      const int64_t entry = capture == gain ? p.q : p.h;
      double symbolic = 0;
      for (const CaptureDerivative& d : capture_derivatives(mod)) {
        const Node& access = d.access.node();
        if (!(*access.capture == capture)) continue;
        if (static_cast<int64_t>(evaluate(access.args[0], p, bindings)) == entry)
          symbolic += evaluate(d.derivative, p, bindings);
      }
      const double x = tensor.get(entry);
      compare(
          symbolic,
          [&, &t = tensor](double v) {
            t.set(entry, v);
            const double y = evaluator(p);
            t.set(entry, x);
            return y;
          },
          x, capture.at({capture == gain ? variables().q : variables().h}));
    }
    if (HasFailure()) FAIL() << "round " << i;
  }
  EXPECT_GT(checked, 15000);
  EXPECT_GT(nonzero, 3000);
}

TEST(Derivative, OfTheSynapticMod) {
  const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}),
      amp("amp", {Axis::b, Axis::h, Axis::kv}, Type::number, true);
  const Expr mod = parse_score_mod(
      "score + log(kf[b,h,kv]*sigmoid(score)*amp[b,h,kv]/4 + 1e-6) - 0.5*abs(q-kv)/n_kv", {kf, amp});
  const Bindings bindings =
      Bindings()
          .set("kf", Tensor::from<double>(std::vector<double>{0.3, 0.7}, {1, 1, 2}, DType::f64))
          .set("amp", Tensor::from<double>(std::vector<double>{1.1, 0.9}, {1, 1, 2}, DType::f64));
  const Point p{.score = 0.4, .q = 5, .kv = 1, .n_q = 8, .n_kv = 8};
  const double s = 1 / (1 + std::exp(-0.4)), e = 0.7 * s * 0.9 / 4 + 1e-6;
  EXPECT_NEAR(evaluate(score_derivative(mod), p, bindings), 1 + 0.7 * s * (1 - s) * 0.9 / 4 / e, 1e-12);
  const auto gradients = capture_derivatives(mod);
  ASSERT_EQ(gradients.size(), 1u);
  EXPECT_NEAR(evaluate(gradients[0].derivative, p, bindings), 0.7 * s / 4 / e, 1e-12);
}

}  // namespace
}  // namespace flexchat::flex
