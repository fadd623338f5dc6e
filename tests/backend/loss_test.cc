// Softcap and cross entropy.
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

const std::vector<int64_t> kVocabularies = {1, 2, 33, 250, 4097};

// Targets below `vocab`, every third one ignored.
Tensor random_targets(Rng& rng, int64_t rows, int64_t vocab) {
  const Tensor t = random_ids(rng, {rows}, vocab);
  for (int64_t i = 2; i < rows; i += 3) t.set(i, -1);
  return t;
}

// z = cap * tanh(z / cap) to 4 ulp at every magnitude: near 0 the series, far out the limits.
TEST(Softcap, AccurateOverTheWholeRange) {
  Rng rng(1);
  for (const double cap : {15.0, 50.0}) {
    const Tensor z(host_arena(), {3, 1001}, DType::f32);
    for (int64_t i = 0; i < z.numel(); ++i) {
      const double magnitude = std::pow(10.0, -6 + 10 * rng.uniform());
      z.set(i, i == 0 ? 0 : rng.uniform() < 0.5 ? magnitude : -magnitude);
    }
    for (int64_t i = 0; i < 1001; ++i) z.set(1001 + i, cap * (-1 + 2 * static_cast<double>(i) / 1000));
    check_kernel(fmt::format("cap {}", cap), {update(z, {1, 2.5e-7, 0})},
                 [=](Backend& b, const Tensors& t) { b.softcap(t[0], cap); });
  }
}

TEST(Softcap, ShapesAndNoCap) {
  Rng rng(2);
  for (const int64_t v : kVocabularies) {
    for (const int64_t rows : {1, 7}) {
      for (const double cap : {0.0, -1.0, 15.0}) {
        check_kernel(fmt::format("({}, {}) cap {}", rows, v, cap),
                     {update(random_tensor(rng, {rows, v}, DType::f32, 20), {1, cap > 0 ? 2e-6 : 0.0, 0})},
                     [=](Backend& b, const Tensors& t) { b.softcap(t[0], cap); });
      }
    }
  }
}

class CrossEntropy : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(CrossEntropy);

// nll is a difference of numbers up to 20 in f32; a gradient is a probability whose exponent has that error.
// In a small vocabulary the target may have nearly all the probability, and p - 1 keeps its absolute error
// alone; in a large one elements far below 1 are held to their own size.
Tolerance gradient_tolerance(int64_t vocab) {
  return vocab < 100 ? Tolerance{1, 2e-5, 2e-6, 1} : Tolerance{1, 2e-5, 1e-7};
}

TEST_P(CrossEntropy, LossAndGradient) {
  for (const int64_t v : kVocabularies) {
    for (const int64_t rows : {1, 3, 33}) {
      for (const double cap : {0.0, 15.0, 50.0}) {
        const Tolerance nll = {.least_scale = 20}, gradient = gradient_tolerance(v);
        check_kernel(
            fmt::format("({}, {}) cap {}", rows, v, cap),
            {scratch(random_tensor(rng, {rows, v}, DType::f32, 5)), in(random_targets(rng, rows, v)),
             out({rows}, DType::f32, nll), out({rows, v}, dtype(), gradient)},
            [=](Backend& b, const Tensors& t) { b.cross_entropy(t[0], t[1], cap, 0.75, t[2], &t[3]); });
      }
    }
  }
}

TEST(CrossEntropyInPlace, GradientMayBeTheLogits) {
  Rng rng(4);
  for (const int64_t v : kVocabularies) {
    for (const double cap : {0.0, 15.0}) {
      check_kernel(
          fmt::format("{} logits, cap {}", v, cap),
          {update(random_tensor(rng, {7, v}, DType::f32, 5), gradient_tolerance(v)),
           in(random_targets(rng, 7, v)), out({7}, DType::f32, {.least_scale = 20})},
          [=](Backend& b, const Tensors& t) { b.cross_entropy(t[0], t[1], cap, -1.5, t[2], &t[0]); });
    }
  }
}

TEST(CrossEntropyLossOnly, WithoutGradient) {
  Rng rng(5);
  for (const int64_t v : kVocabularies) {
    for (const double cap : {0.0, 15.0, 50.0}) {
      check_kernel(fmt::format("{} logits, cap {}", v, cap),
                   {scratch(random_tensor(rng, {33, v}, DType::f32, 5)), in(random_targets(rng, 33, v)),
                    out({33}, DType::f32, {.least_scale = 20})},
                   [=](Backend& b, const Tensors& t) { b.cross_entropy(t[0], t[1], cap, 1, t[2], nullptr); });
    }
  }
}

TEST_P(CrossEntropy, LargeLogitsDoNotOverflow) {
  for (const int64_t v : {2, 33, 250}) {
    for (const double cap : {0.0, 15.0, 50.0}) {
      const Tensor logits(host_arena(), {4, v}, DType::f32);
      for (int64_t i = 0; i < logits.numel(); ++i) logits.set(i, rng.uniform() < 0.5 ? 1e4 : -1e4);
      for (int64_t i = 0; i < v; ++i) {
        logits.set(2 * v + i, 1e4);
        logits.set(3 * v + i, -1e4);
      }
      // An f32 near 1e4 is off by up to 5e-4, and so are nll and the exponents of probabilities.
      const Tolerance nll = {1, 2e-6, 1e-3, 1}, gradient = {1, 2e-3, 1e-6, 1};
      check_kernel(fmt::format("{} logits, cap {}", v, cap),
                   {scratch(logits), in(random_ids(rng, {4}, v)), out({4}, DType::f32, nll),
                    out({4, v}, dtype(), gradient)},
                   [=](Backend& b, const Tensors& t) { b.cross_entropy(t[0], t[1], cap, 1, t[2], &t[3]); });
    }
  }
}

// Ignored rows are exactly 0, even where their logits are not numbers.
TEST_P(CrossEntropy, IgnoredRowsAreZero) {
  const auto cpu = make_cpu_backend();
  for (const double cap : {0.0, 15.0}) {
    const Tensor logits = random_tensor(rng, {3, 65}, DType::f32);
    for (int64_t i = 0; i < 65; ++i) logits.set(65 + i, std::nan(""));
    const Tensor targets = filled_tensor({3}, DType::i32, 4),
                 nll = filled_tensor({3}, DType::f32, std::nan("")),
                 grad = filled_tensor({3, 65}, dtype(), std::nan(""));
    targets.set(1, -1);
    cpu->cross_entropy(logits, targets, cap, 1, nll, &grad);
    EXPECT_EQ(nll.get(1), 0);
    EXPECT_EQ(max_abs(grad.rows(1, 1)), 0);
    EXPECT_GT(nll.get(0), 0);
    EXPECT_GT(max_abs(grad.rows(2, 1)), 0);
    EXPECT_EQ(cpu->first_nonfinite(grad), -1);
  }
}

TEST(Softcap, NanStaysNan) {
  const auto cpu = make_cpu_backend();
  const Tensor z = filled_tensor({1, 21}, DType::f32, 0.5);
  z.set(3, std::nan(""));
  z.set(20, std::nan(""));
  cpu->softcap(z, 15);
  EXPECT_TRUE(std::isnan(z.get(3)));
  EXPECT_TRUE(std::isnan(z.get(20)));
  EXPECT_NEAR(z.get(4), 15 * std::tanh(0.5 / 15), 1e-6);
}

TEST(Argmax, FirstOfTheLargest) {
  Rng rng(3);
  const auto cpu = make_cpu_backend();
  const auto reference = make_reference_backend();
  for (const int64_t v : {1, 2, 7, 16, 33, 250, 4097}) {
    const Tensor x = random_tensor(rng, {5, v}, DType::f32);
    for (int64_t n = 1; n < 5; ++n) {  // equals: the first counts
      x.set(n * v + v / 2, 9);
      x.set(n * v + v - 1, 9);
    }
    const Tensor wide(host_arena(), {5, v}, DType::f64);
    for (int64_t i = 0; i < x.numel(); ++i) wide.set(i, x.get(i));
    const Tensor a = filled_tensor({5}, DType::i32, -7), b = filled_tensor({5}, DType::i32, -7);
    cpu->argmax(x, a);
    reference->argmax(wide, b);
    for (int64_t n = 0; n < 5; ++n) {
      EXPECT_EQ(a.get(n), b.get(n)) << v;
      if (n > 0) {
        EXPECT_EQ(a.get(n), v / 2) << v;
      }
    }
    const Tensor nothing = filled_tensor({1, v}, DType::f32, std::nan(""));
    cpu->argmax(nothing, a);
    EXPECT_EQ(a.get(0), -1);
  }
}

}  // namespace
}  // namespace flexchat
