// The optimizers' kernels: AdamW, Nesterov momentum, sums and scales along axes, cautious decay, checks.
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

std::vector<int64_t> sizes() {
  std::vector<int64_t> sizes = kAwkward;
  sizes.push_back(3 * 16384 + 5);  // several threads, the last with a rest
  return sizes;
}

TEST(AdamW, FirstAndLaterSteps) {
  Rng rng(1);
  for (const int64_t n : sizes()) {
    for (const int64_t step : {1, 2, 1000}) {
      const AdamWStep s = {0.02, 0.9, 0.95, 1e-8, 0.1, step};
      check_kernel(fmt::format("{} elements, step {}", n, step),
                   {in(random_tensor(rng, {n}, DType::f32)), update(random_tensor(rng, {n}, DType::f32)),
                    update(random_tensor(rng, {n}, DType::f32)),
                    update(uniform_tensor(rng, {n}, DType::f32, 0.01, 2))},
                   [&](Backend& b, const Tensors& t) { b.adamw(s, t[0], t[1], t[2], t[3]); });
    }
  }
}

// The state starts at 0: the first update is lr * sign(g) for any size of g above eps.
TEST(AdamW, FromZeroMoments) {
  const auto cpu = make_cpu_backend();
  const Tensor grad = filled_tensor({3}, DType::f32, 0), param = filled_tensor({3}, DType::f32, 1),
               m = filled_tensor({3}, DType::f32, 0), v = filled_tensor({3}, DType::f32, 0);
  grad.set(0, 1e-3);
  grad.set(1, -50);
  cpu->adamw({0.1, 0.9, 0.95, 1e-10, 0.5, 1}, grad, param, m, v);
  EXPECT_NEAR(param.get(0), 0.95 - 0.1, 1e-6);
  EXPECT_NEAR(param.get(1), 0.95 + 0.1, 1e-6);
  EXPECT_NEAR(param.get(2), 0.95, 1e-6);
}

class Optim : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(Optim);

TEST_P(Optim, Nesterov) {
  for (const int64_t n : sizes()) {
    for (const double momentum : {0.0, 0.95}) {
      check_kernel(fmt::format("{} elements, momentum {}", n, momentum),
                   {in(random_tensor(rng, {1, n}, DType::f32)),
                    update(random_tensor(rng, {1, n}, DType::f32)), out({1, n}, dtype())},
                   [=](Backend& b, const Tensors& t) { b.nesterov(momentum, t[0], t[1], t[2]); });
    }
  }
}

TEST_P(Optim, AxisSumSquares) {
  for (const auto& [m, n] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 129}, {70, 1}, {3, 7}, {65, 33}, {40, 200}}) {
    for (const int axis : {0, 1}) {
      check_kernel(
          fmt::format("({}, {}) axis {}", m, n, axis),
          {in(random_tensor(rng, {m, n}, dtype())), out(axis == 1 ? Shape{m, 1} : Shape{1, n}, DType::f32)},
          [=](Backend& b, const Tensors& t) { b.axis_sum_squares(t[0], axis, t[1]); });
    }
  }
}

TEST_P(Optim, AxisScale) {
  for (const auto& [m, n] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 129}, {70, 1}, {3, 7}, {65, 33}, {40, 200}}) {
    for (const int axis : {0, 1}) {
      check_kernel(fmt::format("({}, {}) axis {}", m, n, axis),
                   {update(random_tensor(rng, {m, n}, dtype())),
                    in(random_tensor(rng, {axis == 1 ? m : n}, DType::f32))},
                   [=](Backend& b, const Tensors& t) { b.axis_scale(t[0], axis, t[1]); });
    }
  }
}

TEST_P(Optim, Axpby) {
  for (const int64_t n : sizes()) {
    for (const DType to : {DType::f32, DType::bf16, DType::f16}) {
      for (const double beta : {0.0, 1.0, -0.5}) {
        check_kernel(fmt::format("{} elements to {}, beta {}", n, dtype_name(to), beta),
                     {in(random_tensor(rng, {n}, dtype())),
                      beta == 0 ? out({n}, to) : update(random_tensor(rng, {n}, to))},
                     [=](Backend& b, const Tensors& t) { b.axpby(0.3, t[0], beta, t[1]); });
      }
    }
    check_kernel(fmt::format("{} elements in place", n), {update(random_tensor(rng, {n}, dtype()))},
                 [](Backend& b, const Tensors& t) { b.axpby(-2.5, t[0], 0, t[0]); });
  }
}

// Decay acts only where update and weight agree in sign; 0 counts as agreement.
TEST(CautiousUpdate, MatchesTheReference) {
  Rng rng(6);
  for (const int64_t n : sizes()) {
    const Tensor g = random_tensor(rng, {n}, DType::f32), p = random_tensor(rng, {n}, DType::f32);
    if (n > 2) {
      g.set(0, 0);
      p.set(2, 0);
    }
    check_kernel(fmt::format("{}", n), {in(g), update(p)},
                 [](Backend& b, const Tensors& t) { b.cautious_update(0.1, 0.7, t[0], t[1]); });
  }
}

TEST(CautiousUpdate, DecaysOnlyWhatTheUpdateShrinks) {
  const auto cpu = make_cpu_backend();
  const Tensor g = filled_tensor({3}, DType::f32, 1), p = filled_tensor({3}, DType::f32, 2);
  g.set(1, -1);
  g.set(2, 0);
  cpu->cautious_update(0.1, 0.5, g, p);
  EXPECT_NEAR(p.get(0), 2 - 0.1 - 0.1 * 0.5 * 2, 1e-6);
  EXPECT_NEAR(p.get(1), 2 + 0.1, 1e-6);
  EXPECT_NEAR(p.get(2), 2 - 0.1 * 0.5 * 2, 1e-6);
}

TEST_P(Optim, SumSquares) {
  const auto cpu = make_cpu_backend(), reference = make_reference_backend();
  std::vector<int64_t> lengths = sizes();
  for (const int64_t n : {4095, 4096, 4097, 8 * 4096 + 1}) lengths.push_back(n);
  for (const int64_t n : lengths) {
    const Fenced x(random_tensor(rng, {n}, dtype()));
    const double expected = reference->sum_squares(converted(x.tensor(), DType::f64));
    double first = 0;
    for (const int threads : {1, 2, 3, 2}) {
      const Threads scope(threads);
      const double got = cpu->sum_squares(x.tensor());
      if (threads == 1) first = got;
      EXPECT_EQ(got, first) << n << " elements, " << threads << " threads";
      EXPECT_NEAR(got, expected, 2e-6 * expected) << n;
    }
  }
}

TEST_P(Optim, FirstNonfiniteFindsEveryPosition) {
  const auto cpu = make_cpu_backend();
  const double bad[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
  for (const int64_t n : {1, 7, 17, 130}) {
    const Fenced x(random_tensor(rng, {n}, dtype()));
    EXPECT_EQ(cpu->first_nonfinite(x.tensor()), -1) << n;
    for (int64_t at = 0; at < n; ++at) {
      const double before = x.tensor().get(at);
      x.tensor().set(at, bad[at % 3]);
      EXPECT_EQ(cpu->first_nonfinite(x.tensor()), at) << n;
      x.tensor().set(at, before);
    }
  }
  for (const int64_t n : {4096, 4097, 9001}) {  // around the chunks it looks at
    const Tensor x = random_tensor(rng, {n}, dtype());
    for (const int64_t at :
         {n - 1, int64_t{4096}, int64_t{4095}, int64_t{4080}, int64_t{0}}) {  // the first counts
      if (at >= n) continue;
      x.set(at, bad[at % 3]);
      EXPECT_EQ(cpu->first_nonfinite(x), at) << n;
    }
  }
  // Finite numbers whose sum is not.
  const Tensor large = filled_tensor({100}, dtype(), dtype() == DType::f16 ? 6e4 : 3e38);
  EXPECT_EQ(cpu->first_nonfinite(large), -1);
}

}  // namespace
}  // namespace flexchat
