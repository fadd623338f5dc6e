// Softcap, cross entropy, and softmax over panels of columns.
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

// Rows that a GPU cuts into slices for several blocks, with and without a rest that vectors do not fit.
TEST_P(CrossEntropy, LargeVocabularies) {
  for (const int64_t v : {4096, 16388, 40961, 65536, 150000}) {
    for (const double cap : {0.0, 15.0}) {
      check_kernel(
          fmt::format("{} logits, cap {}", v, cap),
          {scratch(random_tensor(rng, {3, v}, DType::f32, 5)), in(random_targets(rng, 3, v)),
           out({3}, DType::f32, {.least_scale = 20}), out({3, v}, dtype(), gradient_tolerance(v))},
          [=](Backend& b, const Tensors& t) { b.cross_entropy(t[0], t[1], cap, 0.75, t[2], &t[3]); });
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
  for (Backend* backend : tested_backends()) {
    for (const double cap : {0.0, 15.0}) {
      const Tensor logits = random_tensor(rng, {3, 65}, DType::f32);
      for (int64_t i = 0; i < 65; ++i) logits.set(65 + i, std::nan(""));
      const Tensor targets = filled_tensor({3}, DType::i32, 4);
      targets.set(1, -1);
      const Tensor device_nll = backend->to_device(filled_tensor({3}, DType::f32, std::nan(""))),
                   device_grad = backend->to_device(filled_tensor({3, 65}, dtype(), std::nan("")));
      backend->cross_entropy(backend->to_device(logits), backend->to_device(targets), cap, 1, device_nll,
                             &device_grad);
      EXPECT_EQ(backend->first_nonfinite(device_grad), -1) << backend->name();
      const Tensor nll = backend->to_host(device_nll), grad = backend->to_host(device_grad);
      EXPECT_EQ(nll.get(1), 0) << backend->name();
      EXPECT_EQ(max_abs(grad.rows(1, 1)), 0) << backend->name();
      EXPECT_GT(nll.get(0), 0) << backend->name();
      EXPECT_GT(max_abs(grad.rows(2, 1)), 0) << backend->name();
    }
  }
}

TEST(Softcap, NanStaysNan) {
  for (Backend* backend : tested_backends()) {
    const Tensor x = filled_tensor({1, 21}, DType::f32, 0.5);
    x.set(3, std::nan(""));
    x.set(20, std::nan(""));
    const Tensor on_device = backend->to_device(x);
    backend->softcap(on_device, 15);
    const Tensor z = backend->to_host(on_device);
    EXPECT_TRUE(std::isnan(z.get(3))) << backend->name();
    EXPECT_TRUE(std::isnan(z.get(20))) << backend->name();
    EXPECT_NEAR(z.get(4), 15 * std::tanh(0.5 / 15), 1e-6) << backend->name();
  }
}

TEST(Argmax, FirstOfTheLargest) {
  Rng rng(3);
  for (const int64_t v : {1, 2, 7, 16, 33, 250, 4097, 20000}) {
    const Tensor x = random_tensor(rng, {5, v}, DType::f32);
    for (int64_t n = 1; n < 5; ++n) {  // equals: the first counts
      x.set(n * v + v / 2, 9);
      x.set(n * v + v - 1, 9);
    }
    const Kernel argmax = [](Backend& b, const Tensors& t) { b.argmax(t[0], t[1]); };
    const Tolerance exact = {1, 0, 0};
    check_kernel(fmt::format("{}", v), {in(x), update(filled_tensor({5}, DType::i32, -7), exact)}, argmax);
    const Tensor nothing = filled_tensor({1, v}, DType::f32, std::nan(""));
    check_kernel(fmt::format("{} NaN", v), {in(nothing), update(filled_tensor({1}, DType::i32, -7), exact)},
                 argmax);
    for (Backend* backend : tested_backends()) {
      const Tensor out = backend->empty({5}, DType::i32);
      backend->argmax(backend->to_device(x), out);
      const Tensor host = backend->to_host(out);
      for (int64_t n = 1; n < 5; ++n) EXPECT_EQ(host.get(n), v / 2) << backend->name() << ", " << v;
    }
  }
}

// The panels of a vocabulary one after the other.
struct Panel {
  int64_t first, columns;
};
std::vector<Panel> panels_of(int64_t vocab, int64_t width) {
  std::vector<Panel> panels;
  for (int64_t first = 0; first < vocab; first += width) {
    panels.push_back({first, std::min(width, vocab - first)});
  }
  return panels;
}
// Columns of x (N, V) as a matrix of their own.
Tensor columns_of(Backend& backend, const Tensor& x, const Panel& panel) {
  const int64_t n = x.dim(0);
  const Tensor t = backend.empty({n, panel.columns}, x.dtype());
  backend.copy_rows(1, n, panel.columns, heads_view(x.reshape({1, n, x.dim(1)}), panel.first),
                    heads_view(t.reshape({1, n, panel.columns})));
  return t;
}

// lse, nll, argmax and the gradient from its unscaled form, panel by panel.
TEST(SoftmaxPanels, StatisticsAndUnscaledGradient) {
  Rng rng(6);
  for (const int64_t v : kVocabularies) {
    for (const int64_t width : {17, 64, 5000}) {
      for (const double cap : {0.0, 15.0, 40.0, 50.0}) {
        const Tensor logits = random_tensor(rng, {5, v}, DType::f32, 5), targets = random_targets(rng, 5, v);
        const bool unscaled = cap > 0 && cap <= kShiftCap;
        const Tolerance tolerance = {.least_scale = 20};
        check_kernel(
            fmt::format("{} logits in panels of {}, cap {}", v, width, cap),
            {in(logits), in(targets), out({5}, DType::f32, tolerance), out({5}, DType::f32, {1, 1e-5}),
             out({5}, DType::f32, tolerance), out({5}, DType::f32, tolerance),
             update(random_ids(rng, {5}, 9)), out({5}, DType::f32, tolerance),
             out({5}, DType::f32, tolerance), out({5}, DType::f32, {1, 1e-5}),
             unscaled ? out({5, v}, DType::f32, {1, 2e-5, 5e-6, 0.75}) : scratch(logits)},
            [=](Backend& b, const Tensors& t) {
              const SoftmaxRows rows = {t[2], t[3], t[4], t[5], t[6]};
              for (const Panel& panel : panels_of(v, width)) {
                b.softmax_panel(columns_of(b, t[0], panel), t[1], panel.first, cap, rows,
                                unscaled ? &t[10] : nullptr);
              }
              b.softmax_nll(rows, t[1], t[7], t[8]);
              if (!unscaled) return b.fill(t[9], 0);
              b.softmax_factor(rows, t[7], t[1], cap, 0.75, t[10], t[9]);
              b.row_scale(t[10], t[9], t[10]);  // now the gradient
            });
      }
    }
  }
}

class SoftmaxGradient : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(SoftmaxGradient);

TEST_P(SoftmaxGradient, OfPanels) {
  for (const int64_t v : kVocabularies) {
    for (const double cap : {0.0, 15.0, 50.0}) {
      const Tensor logits = random_tensor(rng, {5, v}, DType::f32, 5),
                   targets = random_targets(rng, 5, v + 30);
      for (const int64_t first : {0, 30}) {  // targets below, in and above the panel
        check_kernel(fmt::format("{} logits from {}, cap {}", v, first, cap),
                     {in(logits), in(targets), in(filled_tensor({5}, DType::f32, 11.25)),
                      out({5, v}, dtype(), {1, 2e-5, 2e-6, 0.75})},
                     [=](Backend& b, const Tensors& t) {
                       EXPECT_TRUE(b.softmax_gradient(t[0], t[1], first, cap, 0.75, t[2], 0, t[3]));
                     });
      }
    }
  }
}

TEST(SoftmaxGradientInPlace, GradientMayBeTheLogits) {
  Rng rng(7);
  for (const int64_t v : kVocabularies) {
    check_kernel(
        fmt::format("{} logits", v),
        {update(random_tensor(rng, {7, v}, DType::f32, 5), {1, 2e-5, 2e-6, 1}), in(random_targets(rng, 7, v)),
         in(filled_tensor({7}, DType::f32, 12))},
        [](Backend& b, const Tensors& t) { b.softmax_gradient(t[0], t[1], 0, 15, 1, t[2], 0, t[0]); });
  }
}

// One logit that is not a number makes the loss of its row none.
TEST(SoftmaxPanels, NanReachesTheLoss) {
  const auto cpu = make_cpu_backend();
  for (const double cap : {0.0, 15.0}) {
    const auto vector = [] { return filled_tensor({2}, DType::f32, 0); };
    const Tensor logits = filled_tensor({2, 33}, DType::f32, 1), targets = filled_tensor({2}, DType::i32, 3),
                 nll = vector(), lse = vector();
    logits.set(20, std::nan(""));
    const SoftmaxRows rows = {vector(), vector(), vector(), {}, {}};
    cpu->softmax_panel(logits, targets, 0, cap, rows, nullptr);
    cpu->softmax_nll(rows, targets, lse, nll);
    EXPECT_TRUE(std::isnan(nll.get(0)));
    EXPECT_NEAR(nll.get(1), std::log(33), 1e-5);
    cpu->cross_entropy(logits, targets, cap, 1, nll, nullptr);
    EXPECT_TRUE(std::isnan(nll.get(0)));
    EXPECT_NEAR(nll.get(1), std::log(33), 1e-5);
  }
}

// A panel whose gradients are all below the filter is reported and not written; one that reaches it, at the
// last column of the last row, or one with a target, or with a NaN, is written.
TEST(SoftmaxGradientFilter, KeepsWhatReachesIt) {
  for (const auto& backend : {make_cpu_backend(), make_reference_backend()}) {
    const DType dtype = backend->master_dtype();
    for (const int64_t v : {1, 16, 37}) {
      const auto written = [&](double last, int32_t target) {
        const Tensor logits = filled_tensor({3, v}, dtype, -9), lse = filled_tensor({3}, dtype, 0),
                     targets = filled_tensor({3}, DType::i32, 1000), grad = filled_tensor({3, v}, dtype, 7);
        logits.set(3 * v - 1, last);
        targets.set(2, target);
        const bool reached = backend->softmax_gradient(logits, targets, 100, 0, 1, lse, 1e-3, grad);
        EXPECT_EQ(grad.get(0) != 7, reached);
        return reached;
      };
      EXPECT_FALSE(written(-9, 1000));
      EXPECT_FALSE(written(-7, 1000));  // e^-7 = 9.1e-4
      EXPECT_TRUE(written(-6.9, 1000));
      EXPECT_FALSE(written(5, -1)) << "ignored rows have no gradient";
      EXPECT_TRUE(written(-9, static_cast<int32_t>(100 + v - 1)));
      EXPECT_TRUE(written(std::nan(""), 1000));
      EXPECT_FALSE(written(-1e-5, static_cast<int32_t>(100 + v - 1))) << "p - 1 counts at the target, not p";
    }
  }
}

class RowScale : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(RowScale);

TEST_P(RowScale, OneFactorARow) {
  for (const int64_t c : kAwkward) {
    for (const DType to : {DType::f32, dtype()}) {
      check_kernel(
          fmt::format("(5, {}) to {}", c, dtype_name(to)),
          {in(random_tensor(rng, {5, c}, dtype())), in(random_tensor(rng, {5}, DType::f32)), out({5, c}, to)},
          [](Backend& b, const Tensors& t) { b.row_scale(t[0], t[1], t[2]); });
    }
  }
}

}  // namespace
}  // namespace flexchat
