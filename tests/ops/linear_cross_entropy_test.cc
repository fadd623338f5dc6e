// The fused losses: every way to compute them, on every backend there is, against plain loops over double;
// and that they take the memory they say.
#include <gtest/gtest.h>

#include <cmath>

#include "ops/loss_bench.h"
#include "ops/ops.h"
#include "support/temp_folder.h"
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

struct Problem {
  int64_t n, c, vocab;
  double cap, weight = 0.75;
  Tensor h, head, targets;  // f64, with values exact in bf16

  // Padded rows of the head are no part of the vocabulary; every third target is ignored.
  Problem(int64_t n_rows, int64_t width, int64_t vocabulary, double softcap, double scale = 1)
      : n(n_rows), c(width), vocab(vocabulary), cap(softcap) {
    Rng rng(static_cast<uint64_t>(n * 1000003 + c * 1009 + vocab));
    const double deviation = scale * 3 / std::sqrt(static_cast<double>(c));
    h = converted(random_tensor(rng, {n, c}, DType::bf16), DType::f64);
    head = converted(random_tensor(rng, {vocab + 3, c}, DType::bf16, deviation), DType::f64);
    targets = random_ids(rng, {n}, vocab);
    for (int64_t i = 2; i < n; i += 3) targets.set(i, -1 - static_cast<double>(i % 2) * 99);
    targets.set(0, static_cast<double>(vocab - 1));
  }
};

struct Loss {
  Tensor nll, lse, argmax, dh, dhead;  // on the host
  LossResult result;
};

constexpr double kBefore = 0.25;  // what the gradient of the head holds before

// The formulas, one row at a time.
Loss by_hand(const Problem& p) {
  Loss out{filled_tensor({p.n}, DType::f64, 0),
           filled_tensor({p.n}, DType::f64, 0),
           filled_tensor({p.n}, DType::i32, 0),
           filled_tensor({p.n, p.c}, DType::f64, 0),
           filled_tensor(p.head.shape(), DType::f64, kBefore),
           {}};
  std::vector<double> z(static_cast<size_t>(p.vocab)), slope(z.size());
  const double *h = p.h.as<double>(), *w = p.head.as<double>();
  double *dh = out.dh.as<double>(), *dw = out.dhead.as<double>();
  for (int64_t i = 0; i < p.n; ++i) {
    double largest = -HUGE_VAL, sum = 0;
    int64_t argmax = 0;
    for (int64_t j = 0; j < p.vocab; ++j) {
      double x = 0;
      for (int64_t k = 0; k < p.c; ++k) x += h[i * p.c + k] * w[j * p.c + k];
      const auto at = static_cast<size_t>(j);
      const double t = p.cap > 0 ? std::tanh(x / p.cap) : 0;
      z[at] = p.cap > 0 ? p.cap * t : x;
      slope[at] = 1 - t * t;
      if (z[at] > largest) largest = z[at], argmax = j;
    }
    for (const double v : z) sum += std::exp(v - largest);
    const double lse = largest + std::log(sum);
    const auto target = static_cast<int64_t>(p.targets.get(i));
    out.lse.set(i, lse);
    out.argmax.set(i, static_cast<double>(argmax));
    if (target < 0) continue;
    out.nll.set(i, lse - z[static_cast<size_t>(target)]);
    for (int64_t j = 0; j < p.vocab; ++j) {
      const auto at = static_cast<size_t>(j);
      const double g = p.weight * (std::exp(z[at] - lse) - (j == target ? 1 : 0)) * slope[at];
      for (int64_t k = 0; k < p.c; ++k) {
        dh[i * p.c + k] += g * w[j * p.c + k];
        dw[j * p.c + k] += g * h[i * p.c + k];
      }
    }
  }
  return out;
}

Loss run(Backend& backend, DType dtype, const Problem& p, const LossOptions& options,
         const LossPlan* plan = nullptr, bool recording = true) {
  const DType master = backend.master_dtype();
  const auto on = [&](const Tensor& x, DType d) { return backend.to_device(converted(x, d)); };
  const Weight head{on(p.head, master), backend.empty(p.head.shape(), master), on(p.head, dtype)};
  backend.fill(head.grad, kBefore);
  Tape tape(backend, recording);
  const Var x = Tape::leaf(on(p.h, dtype));
  const Tensor targets = backend.to_device(p.targets);
  Loss out;
  out.result = plan ? linear_cross_entropy(tape, x, head, targets, p.vocab, p.cap, p.weight, options, *plan)
                    : linear_cross_entropy(tape, x, head, targets, p.vocab, p.cap, p.weight, options);
  tape.backward();
  out.nll = backend.to_host(out.result.nll);
  if (options.lse) out.lse = backend.to_host(out.result.lse);
  if (options.argmax) out.argmax = backend.to_host(out.result.argmax);
  if (!recording) return out;
  out.dh = backend.to_host(x->grad);
  out.dhead = backend.to_host(head.grad);
  return out;
}

// What a tensor may be off by, of its largest element. In f32 sums of some 1e3 products and exponentials, of
// logits whose absolute error grows with the cap. In bf16 and f16 the gradient of each logit, and the result,
// are rounded to 8 and 11 bits.
double allowed(DType dtype, const Problem& p) {
  switch (dtype) {
    case DType::f64:
      return 1e-12;
    case DType::f32:
      return 5e-6 * std::max(1.0, p.cap / 15);
    case DType::f16:
      return 0x1p-9;
    default:
      return 0x1p-7;
  }
}

// Loss and LSE are f32 in every compute dtype.
void expect_loss(const Loss& got, const Loss& expected, DType dtype, const Problem& p,
                 const std::string& where) {
  const double loss = allowed(dtype == DType::f64 ? DType::f64 : DType::f32, p);
  EXPECT_LE(max_difference(got.nll, expected.nll), loss * std::max(1.0, max_abs(expected.lse))) << where;
  for (int64_t i = 0; i < p.n; ++i) {
    if (p.targets.get(i) < 0) {
      EXPECT_EQ(got.nll.get(i), 0) << where;
    }
  }
  if (got.lse.defined()) {
    EXPECT_LE(max_difference(got.lse, expected.lse), loss * std::max(1.0, max_abs(expected.lse))) << where;
  }
  if (got.argmax.defined()) {
    EXPECT_EQ(max_difference(got.argmax, expected.argmax), 0) << where;
  }
}

// The gradient of a logit is at most `weight`, and so much times an operand is the scale of a row's gradient:
// in a tiny vocabulary the target has nearly all the probability, and p - 1 keeps its absolute error alone.
void expect_gradients(const Loss& got, const Loss& expected, DType dtype, const Problem& p,
                      const std::string& where) {
  const double most = allowed(dtype, p);
  EXPECT_LE(max_difference(got.dh, expected.dh), most * p.weight * max_abs(p.head)) << where;
  const double before = dtype == DType::f64 ? 1e-15 : 1e-7;  // dhead holds kBefore too, in the master dtype
  EXPECT_LE(max_difference(got.dhead, expected.dhead),
            most * std::max(p.weight * max_abs(p.h), max_abs(expected.dhead)) + before)
      << where;
  for (int64_t i = expected.dhead.numel() - 3 * expected.dh.dim(1); i < expected.dhead.numel(); ++i) {
    EXPECT_EQ(got.dhead.get(i), kBefore) << where << ": padded rows have no gradient";
  }
}

std::vector<Backend*> backends() {
  static const std::unique_ptr<Backend> reference = make_reference_backend();
  std::vector<Backend*> all = tested_backends();
  all.push_back(reference.get());
  return all;
}
std::vector<DType> dtypes_of(Backend& backend) {
  if (backend.name() == "reference") return {DType::f64};
  return {DType::f32, DType::bf16, DType::f16};
}

// Panels that divide neither rows nor columns, and ones with room to spare.
std::vector<LossPlan> plans(const Problem& p, DType dtype) {
  using enum LossBackend;
  std::vector<LossPlan> all = {
      {full, "", p.n, p.vocab, false, false, 0},
      {chunked, "", std::min<int64_t>(p.n, 13), p.vocab, false, false, 0},
      {cce, "", std::min<int64_t>(p.n, 11), std::min<int64_t>(p.vocab, 37), false, false, 0},
      {cce, "", p.n, std::min<int64_t>(p.vocab, 256), false, false, 0}};
  if (p.cap > 0 && p.cap <= kShiftCap && dtype != DType::f16) {  // exp(-2 cap) leaves the range of f16
    all.push_back({chunked, "", std::min<int64_t>(p.n, 13), std::min<int64_t>(p.vocab, 41), true, false, 0});
    all.push_back({chunked, "", p.n, std::min<int64_t>(p.vocab, 256), true, false, 0});
  }
  return all;
}

std::string name_of(const Backend& backend, DType dtype, const Problem& p, const LossPlan& plan) {
  return fmt::format("{} {}, {} x {} x {}, cap {}, {} in {} x {}{}", backend.name(), dtype_name(dtype), p.n,
                     p.c, p.vocab, p.cap, loss_backend_name(plan.backend), plan.rows, plan.columns,
                     plan.one_pass ? ", one pass" : "");
}

TEST(LinearCrossEntropy, EveryWayOnEveryBackend) {
  const auto all = backends();
  for (const auto& [n, c, vocab] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {5, 3, 7}, {33, 17, 250}, {40, 32, 768}}) {
    for (const double cap : {0.0, 4.0, 15.0, 50.0}) {
      const Problem p(n, c, vocab, cap);
      const Loss expected = by_hand(p);
      for (Backend* backend : all) {
        for (const DType dtype : dtypes_of(*backend)) {
          for (const LossPlan& plan : plans(p, dtype)) {
            const std::string where = name_of(*backend, dtype, p, plan);
            const LossOptions with_all{.lse = true, .argmax = true};
            const Loss got = run(*backend, dtype, p, with_all, &plan);
            expect_loss(got, expected, dtype, p, where);
            expect_gradients(got, expected, dtype, p, where);
            const Loss plain = run(*backend, dtype, p, {}, &plan);
            expect_loss(plain, expected, dtype, p, where + ", nll only");
            expect_gradients(plain, expected, dtype, p, where + ", nll only");
            if (plan.one_pass) continue;
            expect_loss(run(*backend, dtype, p, with_all, &plan, false), expected, dtype, p,
                        where + ", no tape");
          }
        }
      }
    }
  }
}

// Plans in which logits stay in registers, where the device can; panels of gradients that are no whole tiles.
std::vector<LossPlan> fused_plans(Backend& backend, const Problem& p) {
  using enum LossBackend;
  if (backend.linear_softmax_bytes(DType::bf16, p.c, p.vocab, p.cap) < 0) return {};
  return {{full, "", p.n, p.vocab, true, true, 0},
          {chunked, "", std::min<int64_t>(p.n, 77), p.vocab, true, true, 0},
          {cce, "", p.n, p.vocab, false, true, 0},
          {cce, "", std::min<int64_t>(p.n, 130), std::min<int64_t>(p.vocab, 264), false, true, 0}};
}

// Tiles of rows and columns that are whole or not, one or several, an even number or an odd one.
TEST(LinearCrossEntropy, FusedOnDevicesThatCan) {
  for (const auto& [n, c, vocab] : {std::tuple<int64_t, int64_t, int64_t>{1, 8, 8},
                                    {40, 32, 768},
                                    {129, 64, 520},
                                    {257, 72, 256},
                                    {300, 200, 1032}}) {
    for (const double cap : {4.0, 15.0, 40.0}) {
      const Problem p(n, c, vocab, cap);
      for (Backend* backend : backends()) {
        const std::vector<LossPlan> all = fused_plans(*backend, p);
        if (all.empty()) continue;
        const Loss expected = by_hand(p);
        for (const LossPlan& plan : all) {
          const std::string where = name_of(*backend, DType::bf16, p, plan) + ", fused";
          const Loss got = run(*backend, DType::bf16, p, {.lse = true}, &plan),
                     again = run(*backend, DType::bf16, p, {}, &plan);
          expect_loss(got, expected, DType::bf16, p, where);
          expect_gradients(got, expected, DType::bf16, p, where);
          EXPECT_TRUE(same_bits(got.nll, again.nll)) << where;
          EXPECT_TRUE(same_bits(got.dh, again.dh)) << where;
          EXPECT_TRUE(same_bits(got.dhead, again.dhead)) << where;
          if (plan.one_pass) continue;
          expect_loss(run(*backend, DType::bf16, p, {.lse = true}, &plan, false), expected, DType::bf16, p,
                      where + ", no tape");
        }
      }
    }
  }
}

TEST(LinearCrossEntropy, SameBitsAgain) {
  const Problem p(150, 24, 1000, 15);
  for (Backend* backend : backends()) {
    const DType dtype = dtypes_of(*backend).size() > 1 ? DType::bf16 : DType::f64;
    for (const LossPlan& plan : plans(p, dtype)) {
      const Loss one = run(*backend, dtype, p, {}, &plan), two = run(*backend, dtype, p, {}, &plan);
      EXPECT_TRUE(same_bits(one.nll, two.nll)) << name_of(*backend, dtype, p, plan);
      EXPECT_TRUE(same_bits(one.dh, two.dh)) << name_of(*backend, dtype, p, plan);
      EXPECT_TRUE(same_bits(one.dhead, two.dhead)) << name_of(*backend, dtype, p, plan);
    }
  }
}

// Logits of +-1e4 saturate the cap and would overflow an exponential without a shift.
TEST(LinearCrossEntropy, LargeLogits) {
  for (const double cap : {0.0, 15.0}) {
    const Problem p(9, 4, 70, cap, 4000);
    const Loss expected = by_hand(p);
    for (Backend* backend : backends()) {
      const DType dtype = dtypes_of(*backend).front();
      for (const LossPlan& plan : plans(p, dtype)) {
        const std::string where = name_of(*backend, dtype, p, plan);
        const Loss got = run(*backend, dtype, p, {.lse = true}, &plan);
        expect_loss(got, expected, dtype, p, where);
        EXPECT_EQ(backend->first_nonfinite(backend->to_device(got.dh)), -1) << where;
        EXPECT_EQ(backend->first_nonfinite(backend->to_device(got.dhead)), -1) << where;
      }
    }
  }
}

TEST(LinearCrossEntropy, WithoutValidTargetsThereIsNoGradientAndOneWarning) {
  Problem p(30, 5, 66, 15);
  for (int64_t i = 0; i < p.n; ++i) p.targets.set(i, -100);
  p.weight = HUGE_VAL;  // 1 / the number of valid targets
  testing::internal::CaptureStderr();
  for (Backend* backend : backends()) {
    for (const DType dtype : dtypes_of(*backend)) {
      for (const LossPlan& plan : plans(p, dtype)) {
        const std::string where = name_of(*backend, dtype, p, plan);
        const Loss got = run(*backend, dtype, p, {.lse = true}, &plan);
        EXPECT_EQ(max_abs(got.nll), 0) << where;
        EXPECT_EQ(max_abs(got.dh), 0) << where;
        EXPECT_EQ(max_difference(got.dhead, filled_tensor(p.head.shape(), DType::f64, kBefore)), 0) << where;
      }
    }
  }
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("has no valid target"), std::string::npos) << said;
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
}

TEST(LinearCrossEntropy, TargetsOutsideTheVocabulary) {
  Problem p(4, 3, 10, 0);
  p.targets.set(3, 10);
  const auto cpu = make_cpu_backend();
  EXPECT_EQ(message_of<Error>([&] { run(*cpu, DType::f32, p, {}); }),
            "target 10 of row 3 is outside the vocabulary of 10");
}

// A budget bounds what is allocated beside results and gradients.
class LossMemory : public testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(, LossMemory, testing::Values(3000, 3001));  // fused where a device can, and not

TEST_P(LossMemory, IsWhatThePlanSays) {
  const Problem p(700, 16, GetParam(), 15);
  for (Backend* backend : backends()) {
    if (backend->name() == "reference") continue;
    for (const LossBackend way : {LossBackend::chunked, LossBackend::cce}) {
      for (const int64_t budget : {int64_t{100} << 10, int64_t{1} << 20, int64_t{3} << 20}) {
        // A host converts what its products cannot take, so bf16 is for devices.
        const DType dtype = backend->arena().host() ? DType::f32 : DType::bf16;
        run(*backend, dtype, p, {.backend = way});  // workspaces of products
        backend->arena().reset_peak();
        const size_t before = backend->arena().stats().in_use;
        const Loss got = run(*backend, dtype, p, {.backend = way, .memory_budget = budget});
        EXPECT_EQ(got.result.plan.backend, way);
        EXPECT_LE(got.result.plan.bytes, budget);
        EXPECT_GT(got.result.plan.bytes, budget / 2);
        const auto inputs = static_cast<double>(p.head.numel() * (dtype == DType::f32 ? 12 : 10) +
                                                p.h.numel() * (dtype == DType::f32 ? 8 : 4));
        const auto peak = static_cast<double>(backend->arena().stats().peak - before);
        // Blocks are rounded by up to an eighth; (N) vectors.
        const double rounded = (inputs + static_cast<double>(budget)) * 1.125 + 64 * 1024;
        EXPECT_LE(peak, rounded + (backend->arena().host() ? 0 : 4 << 20)) << loss_backend_name(way);
      }
    }
  }
}

// Tokens that nobody expects fill the upper panels: their gradients are below the filter and left out. The
// error against the exact gradient stays below what the plan's comment promises.
TEST(LinearCrossEntropy, FilterLeavesOutWhatItSays) {
  const int64_t n = 256, c = 32, vocab = 4096, frequent = 700;
  Problem p(n, c, vocab, 15, 0.5);
  for (int64_t i = 0; i < n; ++i) {
    p.h.set(i * c, 1);
    p.targets.set(i, i % 3 == 2 ? -1 : static_cast<double>(i * 7 % frequent));
  }
  for (int64_t j = frequent; j < vocab; ++j) p.head.set(j * c, -14);
  const auto cpu = make_cpu_backend();
  const Loss expected = by_hand(p);
  const Loss exact = run(*cpu, DType::f32, p, {.backend = LossBackend::cce});
  EXPECT_EQ(exact.result.skipped, 0);
  expect_gradients(exact, expected, DType::f32, p, "exact");
  double last = 0;
  for (const double filter : {1e-9, 1e-5, 1e-4}) {
    const Loss got = run(*cpu, DType::f32, p, {.backend = LossBackend::cce, .filter = filter});
    expect_loss(got, expected, DType::f32, p, "filtered");
    const double error = max_difference(got.dh, expected.dh);
    double bound = 0;  // of one row: filter * sum of |head| in a column, times the weight
    for (int64_t k = 0; k < c; ++k) {
      double column = 0;
      for (int64_t j = 0; j < vocab; ++j) column += std::abs(p.head.get(j * c + k));
      bound = std::max(bound, p.weight * filter * column);
    }
    EXPECT_LE(error, bound + 5e-6 * max_abs(expected.dh)) << filter;
    EXPECT_GE(error, last * 0.99) << "more is left out, more is missing";
    last = error;
    RecordProperty(fmt::format("filter_{}", filter),
                   fmt::format("{} of {} panels left out; largest error of dh {:.2e}, of the largest {:.2e}",
                               got.result.skipped, got.result.panels, error, error / max_abs(expected.dh)));
    if (filter == 1e-9) {
      EXPECT_EQ(got.result.skipped, 0);
    }
    if (filter == 1e-4) {
      EXPECT_EQ(got.result.skipped, 2 * 6) << "of both blocks of rows all panels above 2 * 512";
    }
  }
  EXPECT_GT(last, 1e-7 * max_abs(expected.dh));
  EXPECT_LT(last, 1e-2 * max_abs(expected.dh));
}

TEST(LossPlan, NamesThatUsersType) {
  for (const auto& [name, backend] : {std::pair{"auto", LossBackend::automatic},
                                      {"full", LossBackend::full},
                                      {"current", LossBackend::full},
                                      {"chunked", LossBackend::chunked},
                                      {"liger", LossBackend::chunked},
                                      {"cce", LossBackend::cce}}) {
    EXPECT_EQ(parse_loss_backend(name), backend);
  }
  for (const LossBackend b :
       {LossBackend::automatic, LossBackend::full, LossBackend::chunked, LossBackend::cce}) {
    EXPECT_EQ(parse_loss_backend(loss_backend_name(b)), b);
  }
  EXPECT_EQ(message_of<Error>([] { parse_loss_backend("chunk"); }),
            "unknown loss 'chunk' (allowed: auto, full or current, chunked or liger, cce) (did you mean "
            "'chunked'?)");
}

TEST(LossPlan, AutoSaysWhatItTookAndWhy) {
  const auto cpu = make_cpu_backend();
  const auto plan = [&](int64_t n, int64_t vocab, const LossOptions& options) {
    return plan_loss(*cpu, n, 64, vocab, DType::f32, true, 15, options);
  };
  LossPlan p = plan(512, 4096, {});
  EXPECT_EQ(p.backend, LossBackend::full);
  EXPECT_EQ(p.reason, "all logits take 8.0 MiB, within the budget of 8.0 MiB");
  p = plan(2048, 65536, {});
  EXPECT_EQ(p.backend, LossBackend::chunked);
  EXPECT_EQ(p.rows, 128) << "fewer would starve the products";
  EXPECT_NE(p.reason.find("all logits would take 512.0 MiB, 128 rows at a time 32.0 MiB"), std::string::npos)
      << p.reason;
  p = plan(2048, 65536, {.memory_budget = 1 << 20});
  EXPECT_EQ(p.backend, LossBackend::cce);
  EXPECT_EQ(p.reason, "the budget of 1.0 MiB holds the logits of only 4 rows");
  EXPECT_LE(p.bytes, 1 << 20);
  EXPECT_EQ(plan(2048, 4096, {.filter = 1e-4}).backend, LossBackend::cce);
  EXPECT_EQ(plan(2048, 4096, {.backend = LossBackend::full}).reason, "asked for");
}

TEST(LossPlan, Misuse) {
  const auto cpu = make_cpu_backend();
  const auto plan = [&](const LossOptions& options) {
    return [&cpu, options] { plan_loss(*cpu, 64, 64, 65536, DType::f32, true, 15, options); };
  };
  EXPECT_EQ(message_of<Error>(plan({.backend = LossBackend::chunked, .memory_budget = 1000})),
            "the chunked loss needs 256.0 KiB for one row of 65536 logits, more than its budget of 1000 B");
  EXPECT_EQ(message_of<Error>(plan({.backend = LossBackend::cce, .memory_budget = 3})),
            "the cce loss needs 4 B for one row, more than its budget of 3 B");
  EXPECT_EQ(message_of<Error>(plan({.memory_budget = -1})),
            "the loss's memory budget is -1; allowed: at least 0");
  EXPECT_EQ(message_of<Error>(plan({.backend = LossBackend::chunked, .filter = 0.1})),
            "the chunked loss has no filter; cce has");
  EXPECT_EQ(message_of<Error>(plan({.filter = 1})), "the loss's filter is 1; allowed: 0 to below 1");
}

TEST(LossBench, MeasuresTimeMemoryAndALossThatIsRight) {
  for (Backend* backend : backends()) {
    if (backend->name() == "reference") continue;
    for (const LossBackend way : {LossBackend::full, LossBackend::chunked, LossBackend::cce}) {
      const LossTiming t = time_loss(*backend, 256, 32, 2048, DType::f32, {.backend = way}, 2);
      EXPECT_EQ(t.plan.backend, way);
      EXPECT_GT(t.ms, 0);
      EXPECT_NEAR(t.tflops * t.ms, 6e-9 * 256 * 32 * 2048, 1e-6);
      EXPECT_GE(t.extra_bytes, t.plan.bytes);
      EXPECT_NEAR(t.mean_nll, std::log(2048) + 0.5, 0.25);  // of unit normal logits
    }
  }
}

}  // namespace
}  // namespace flexchat
