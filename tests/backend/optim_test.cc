// The optimizers' kernels: gradient norm, AdamW, the parts of Muon around its products, element-wise helpers.
// Plans here have two slots of different sizes, and rates are an operand like any other.
#include "backend/update_rates.h"
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

std::vector<int64_t> sizes() {
  std::vector<int64_t> sizes = kAwkward;
  sizes.push_back(3 * 16384 + 5);  // several threads, the last with a rest
  return sizes;
}

// Row 0 as given, then a row for each group.
template <class Group>
Tensor rates_of(const GradientRates& gradients, const std::vector<Group>& groups) {
  const Tensor rates(host_arena(), {std::ssize(groups) + 1, kRatesPerRow}, DType::f64);
  *rates.as<GradientRates>() = gradients;
  std::copy(groups.begin(), groups.end(), rates.as<Group>() + 1);
  return rates;
}

AdamWRates adamw_group(double lr, double beta1, double beta2, double weight_decay, double step) {
  return {1 - lr * weight_decay,
          lr / (1 - std::pow(beta1, step)),
          1 - beta1,
          1 - beta2,
          1 / std::sqrt(1 - std::pow(beta2, step)),
          1e-8};
}

TEST(GradNorm, OverAllSlotsWithTheirLimits) {
  Rng rng(3);
  const GradientRates limits[] = {
      {}, {.max_norm = 0.25}, {.max_norm = 1e9}, {.unscale = 0.125, .max_norm = 1}};
  for (const int64_t n : {1, 7, 129, 16384, 3 * 16384 + 5}) {
    for (const GradientRates& limit : limits) {
      check_kernel(fmt::format("{} elements, unscale {}, limit {}", n, limit.unscale, limit.max_norm),
                   {in(random_tensor(rng, {n}, DType::f32)), in(random_tensor(rng, {3, 5}, DType::f32)),
                    update(rates_of<AdamWRates>(limit, {}))},
                   [](Backend& b, const Tensors& t) {
                     b.grad_norm(*b.plan_update({{.grad = t[0]}, {.grad = t[1]}}), t[2]);
                   });
    }
  }
}

TEST(GradNorm, SaysWhatToDo) {
  const auto cpu = make_cpu_backend();
  const Tensor grad = filled_tensor({4}, DType::f32, 1);
  const auto plan = cpu->plan_update({{.grad = grad}});
  const auto found = [&](const GradientRates& limits) {
    const Tensor rates = rates_of<AdamWRates>(limits, {});
    cpu->grad_norm(*plan, rates);
    return *rates.as<GradientRates>();
  };
  EXPECT_EQ(found({}).norm, 2);
  EXPECT_EQ(found({}).factor, 1);
  EXPECT_EQ(found({}).skip, 0);
  EXPECT_EQ(found({.unscale = 0.25}).norm, 0.5);
  EXPECT_EQ(found({.unscale = 0.25, .max_norm = 1}).factor, 0.25);
  EXPECT_NEAR(found({.unscale = 0.25, .max_norm = 0.1}).factor, 0.25 * 0.2, 1e-6);
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    grad.set(3, bad);
    EXPECT_EQ(found({.max_norm = 1}).skip, 1) << bad;
  }
}

TEST(ZeroGrads, EverySlot) {
  Rng rng(4);
  for (const int64_t n : sizes()) {
    check_kernel(fmt::format("{}", n),
                 {update(random_tensor(rng, {n}, DType::f32)), update(random_tensor(rng, {33}, DType::f32))},
                 [](Backend& b, const Tensors& t) {
                   b.zero_grads(*b.plan_update({{.grad = t[0]}, {.grad = t[1]}}));
                 });
  }
}

// Two slots of two groups; the second has a compute copy.
void adamw_of_two(Backend& b, const Tensors& t) {
  const UpdateSlot plain = {.grad = t[0], .value = t[1], .first = t[2], .second = t[3], .rates_row = 2};
  const UpdateSlot copied = {
      .grad = t[4], .value = t[5], .first = t[6], .second = t[7], .compute = t[8], .rates_row = 1};
  b.adamw(*b.plan_update({plain, copied}), t[9]);
}

TEST(AdamW, FirstAndLaterSteps) {
  Rng rng(1);
  for (const int64_t n : sizes()) {
    for (const int step : {1, 2, 1000}) {
      const DType compute = n % 2 == 0 ? DType::f16 : DType::bf16;
      check_kernel(
          fmt::format("{} elements, step {}", n, step),
          {in(random_tensor(rng, {n}, DType::f32)), update(random_tensor(rng, {n}, DType::f32)),
           update(random_tensor(rng, {n}, DType::f32)), update(uniform_tensor(rng, {n}, DType::f32, 0.01, 2)),
           in(random_tensor(rng, {4, 35}, DType::f32)), update(random_tensor(rng, {4, 35}, DType::f32)),
           update(random_tensor(rng, {4, 35}, DType::f32)),
           update(uniform_tensor(rng, {4, 35}, DType::f32, 0.01, 2)), out({4, 35}, compute),
           in(rates_of<AdamWRates>({.factor = 0.5}, {adamw_group(0.02, 0.9, 0.95, 0.1, step),
                                                     adamw_group(0.3, 0.8, 0.995, 0, step)}))},
          adamw_of_two);
    }
  }
}

TEST(AdamW, SkipKeepsEveryBit) {
  Rng rng(2);
  const auto random = [&] { return in(random_tensor(rng, {65}, DType::f32)); };
  check_kernel("skipped",
               {random(), random(), random(), random(), random(), random(), random(), random(), random(),
                in(rates_of<AdamWRates>({.skip = 1}, {adamw_group(0.02, 0.9, 0.95, 0.1, 1),
                                                      adamw_group(0.3, 0.8, 0.995, 0, 1)}))},
               adamw_of_two);
}

// The state starts at 0: the first update is lr * sign(g) for any size of g above eps.
TEST(AdamW, FromZeroMoments) {
  const auto cpu = make_cpu_backend();
  const Tensor grad = filled_tensor({3}, DType::f32, 0), param = filled_tensor({3}, DType::f32, 1),
               m = filled_tensor({3}, DType::f32, 0), v = filled_tensor({3}, DType::f32, 0);
  grad.set(0, 1e-3);
  grad.set(1, -50);
  const UpdateSlot slot = {.grad = grad, .value = param, .first = m, .second = v, .rates_row = 1};
  cpu->adamw(*cpu->plan_update({slot}), rates_of<AdamWRates>({}, {adamw_group(0.1, 0.9, 0.95, 0.5, 1)}));
  EXPECT_NEAR(param.get(0), 0.95 - 0.1, 1e-5);
  EXPECT_NEAR(param.get(1), 0.95 + 0.1, 1e-6);
  EXPECT_NEAR(param.get(2), 0.95, 1e-6);
}

class Optim : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(Optim);

// Stacks of two matrices: tall, wide, square, by eights and not.
const std::vector<Shape> kMatrices = {{1, 1},    {1, 129}, {70, 1},   {3, 7},   {65, 33},
                                      {40, 200}, {16, 24}, {264, 40}, {64, 64}, {33, 520}};
std::string stack_name(const Shape& matrix) { return shape_string(matrix); }
Shape stack_of(const Shape& matrix) { return {2, matrix[0], matrix[1]}; }
int64_t long_side(const Shape& matrix) { return std::max(matrix[0], matrix[1]); }
Shape second_of(const Shape& matrix) {
  return matrix[0] >= matrix[1] ? Shape{matrix[0], 1} : Shape{1, matrix[1]};
}
Tensor muon_rates(const GradientRates& gradients) {
  return rates_of<MuonRates>(gradients, {{0.02, 0.95, 0.9, 0.3}, {0.05, 0.5, 0.8, 0}});
}

// Sums of squares of the rows of x (n, rows, cols).
Tensor row_squares(const Tensor& x) {
  const Tensor squares = filled_tensor({x.dim(0), x.dim(1)}, DType::f32, 0);
  for (int64_t i = 0; i < x.numel(); ++i) {
    const int64_t row = i / x.dim(2);
    squares.set(row, squares.get(row) + x.get(i) * x.get(i));
  }
  return squares;
}

TEST_P(Optim, MuonMomentum) {
  for (const Shape& matrix : kMatrices) {
    for (const bool skip : {false, true}) {
      const auto random = [&] { return random_tensor(rng, matrix, DType::f32); };
      // Sums of squares of rounded elements: each is off by two roundings of its dtype.
      const Tolerance rounded = {.relative = 2 * unit_roundoff(dtype()) + 2e-6};
      check_kernel(stack_name(matrix) + (skip ? " skipped" : ""),
                   {in(random()), update(random()), in(random()), update(random()),
                    out(stack_of(matrix), dtype()), out({2, matrix[0]}, DType::f32, rounded),
                    in(muon_rates({.factor = 0.75, .skip = skip ? 1.0 : 0.0}))},
                   [](Backend& b, const Tensors& t) {
                     const UpdateSlot first = {.grad = t[0], .value = t[0], .first = t[1], .rates_row = 1};
                     const UpdateSlot second = {.grad = t[2], .value = t[2], .first = t[3], .rates_row = 2};
                     b.muon_momentum(*b.plan_update({first, second}), t[6], t[4], t[5]);
                   });
    }
  }
}

TEST_P(Optim, MuonEqualizeAndNormalize) {
  const double u = unit_roundoff(dtype());
  for (const Shape& matrix : kMatrices) {
    const Tensor x = random_tensor(rng, stack_of(matrix), dtype());
    // The factor is rounded to x's dtype before the product is.
    check_kernel(stack_name(matrix) + " equalize",
                 {update(x, {.relative = u + 2e-6}), in(row_squares(x)),
                  out({2, matrix[0]}, DType::f32, {.relative = 4 * u + 2e-6})},
                 [](Backend& b, const Tensors& t) { b.muon_equalize(t[0], t[1], t[2]); });
    // The norm, its product with the factor and its sum with eps are.
    check_kernel(stack_name(matrix) + " normalize",
                 {update(x, {.relative = 3 * u + 2e-6}), in(row_squares(x))},
                 [](Backend& b, const Tensors& t) { b.muon_normalize(t[0], t[1], 1.01, 1e-6); });
  }
}

TEST_P(Optim, AddProduct) {
  for (const int64_t n : sizes()) {
    check_kernel(
        fmt::format("{}", n),
        {in(random_tensor(rng, {n}, dtype())), update(random_tensor(rng, {n}, dtype()), {.roundings = 2})},
        [](Backend& b, const Tensors& t) { b.add_product(-2.8, t[0], t[1]); });
  }
}

// In 16 bits the product is rounded before the sum: 130.5078125 to 131, and 387 is a tie that goes to 388; in
// one step the sum would be 386.
TEST(AddProduct, RoundsTheProductFirst) {
  const auto cpu = make_cpu_backend();
  const Tensor x = filled_tensor({1}, DType::bf16, 1), sum = filled_tensor({1}, DType::bf16, 256);
  cpu->add_product(130.5078125, x, sum);
  EXPECT_EQ(sum.get(0), 388);
}

TEST_P(Optim, MuonVariance) {
  for (const Shape& matrix : kMatrices) {
    for (const bool skip : {false, true}) {
      const auto second = [&] {
        Operand o = update(uniform_tensor(rng, second_of(matrix), DType::f32, 0, 0.1));
        if (skip) o.role = Operand::input;
        return o;
      };
      check_kernel(stack_name(matrix) + (skip ? " skipped" : ""),
                   {in(random_tensor(rng, stack_of(matrix), dtype(), 0.1)), second(), second(),
                    out({2, long_side(matrix)}, DType::f32, {.relative = 1e-5}),
                    in(muon_rates({.skip = skip ? 1.0 : 0.0}))},
                   [](Backend& b, const Tensors& t) {
                     const auto plan = b.plan_update({{.grad = t[1], .second = t[1], .rates_row = 2},
                                                      {.grad = t[2], .second = t[2], .rates_row = 1}});
                     b.muon_variance(*plan, t[4], t[0], t[3]);
                   });
    }
  }
}

// Decay acts only where update and weight agree in sign; 0 counts as agreement.
TEST_P(Optim, MuonUpdate) {
  for (const Shape& matrix : kMatrices) {
    for (const bool with_factors : {false, true}) {
      const Tensor x = random_tensor(rng, stack_of(matrix), dtype());
      const Tensor p = random_tensor(rng, matrix, DType::f32);
      x.set(0, 0);
      p.set(p.numel() / 2, 0);
      check_kernel(stack_name(matrix) + (with_factors ? " with factors" : ""),
                   {in(x), update(p), update(random_tensor(rng, matrix, DType::f32)),
                    out(matrix, matrix[0] % 2 == 0 ? DType::f16 : DType::bf16),
                    in(uniform_tensor(rng, {2, long_side(matrix)}, DType::f32, 0.5, 2)), in(muon_rates({}))},
                   [=](Backend& b, const Tensors& t) {
                     const auto plan =
                         b.plan_update({{.grad = t[1], .value = t[1], .compute = t[3], .rates_row = 1},
                                        {.grad = t[2], .value = t[2], .rates_row = 2}});
                     b.muon_update(*plan, t[5], t[0], with_factors ? &t[4] : nullptr);
                   });
    }
  }
}

TEST(MuonUpdate, DecaysOnlyWhatTheUpdateShrinks) {
  const auto cpu = make_cpu_backend();
  const Tensor x = filled_tensor({1, 1, 3}, DType::f32, 1), p = filled_tensor({1, 3}, DType::f32, 2);
  x.set(1, -1);
  x.set(2, 0);
  const UpdateSlot slot = {.grad = p, .value = p, .rates_row = 1};
  cpu->muon_update(*cpu->plan_update({slot}), rates_of<MuonRates>({}, {{0.1, 0.95, 0.9, 0.5}}), x, nullptr);
  EXPECT_NEAR(p.get(0), 2 - 0.1 - 0.1 * 0.5 * 2, 1e-6);
  EXPECT_NEAR(p.get(1), 2 + 0.1, 1e-6);
  EXPECT_NEAR(p.get(2), 2 - 0.1 * 0.5 * 2, 1e-6);
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
