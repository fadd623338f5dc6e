// The gradient norm limit and the loss scale, on every backend.
#include "optim/gradients.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/state_json.h"
#include "optim/matrices.h"

namespace flexchat {
namespace {

// Gradients {3, 0, 0}, {0, 4, ...}: norm 5 together.
struct Pair {
  std::unique_ptr<Backend> backend;
  Parameter a, b;
  explicit Pair(std::unique_ptr<Backend> device)
      : backend(std::move(device)),
        a(random_parameter(*backend, "a", {3}, 1)),
        b(random_parameter(*backend, "b", {70, 2}, 2)) {
    backend->fill(a.grad, 0);
    backend->fill(b.grad, 0);
    set_element(*backend, a.grad, 0, 3);
    set_element(*backend, b.grad, 139, -4);
  }
  double first() { return values(*backend, a.grad)[0]; }
  double last() { return values(*backend, b.grad)[139]; }
  std::vector<Parameter*> params() { return {&a, &b}; }
};

class Gradients : public testing::TestWithParam<std::string> {
 protected:
  Pair pair{make_backend(GetParam())};
};
INSTANTIATE_TEST_SUITE_P(Backends, Gradients, testing::ValuesIn(backend_names()),
                         [](const auto& backend) { return backend.param; });

TEST_P(Gradients, LongOnesAreShortened) {
  EXPECT_DOUBLE_EQ(clip_gradient_norm(*pair.backend, pair.params(), 2), 5);
  EXPECT_NEAR(pair.first(), 3 * 0.4, 1e-6);
  EXPECT_NEAR(pair.last(), -4 * 0.4, 1e-6);
  EXPECT_NEAR(clip_gradient_norm(*pair.backend, pair.params(), 100), 2, 1e-6);
}

TEST_P(Gradients, ShortOnesStayAsTheyAre) {
  for (double limit : {5.1, 0.0, -1.0}) {
    EXPECT_DOUBLE_EQ(clip_gradient_norm(*pair.backend, pair.params(), limit), 5);
    EXPECT_EQ(pair.first(), 3);
    EXPECT_EQ(pair.last(), -4);
  }
}

TEST_P(Gradients, NonfiniteNormIsReported) {
  set_element(*pair.backend, pair.b.grad, 5, std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(std::isnan(clip_gradient_norm(*pair.backend, pair.params(), 1)));
  EXPECT_EQ(pair.first(), 3);
}

TEST_P(Gradients, UnscaleDividesOrReportsOverflow) {
  const LossScaler scaler(1024);
  EXPECT_TRUE(scaler.unscale(*pair.backend, pair.params()));
  EXPECT_EQ(pair.first(), 3.0 / 1024);
  EXPECT_EQ(pair.last(), -4.0 / 1024);
  for (double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    set_element(*pair.backend, pair.b.grad, 100, bad);
    EXPECT_FALSE(scaler.unscale(*pair.backend, pair.params()));
  }
}

TEST(LossScaler, GrowsAndBacksOff) {
  LossScaler scaler(65536, 2, 0.5, 3);
  EXPECT_EQ(scaler.scale(), 65536);
  for (bool finite : {true, true, false}) scaler.update(finite);
  EXPECT_EQ(scaler.scale(), 32768);
  for (bool finite : {true, true}) scaler.update(finite);
  EXPECT_EQ(scaler.scale(), 32768) << "an overflow starts the count again";
  LossScaler resumed(1, 2, 0.5, 3);
  resumed.load_state(parse_state_json(dump_state_json(scaler.state(), "state"), "state"), "state.json");
  for (LossScaler* s : {&scaler, &resumed}) {
    s->update(true);
    EXPECT_EQ(s->scale(), 65536);
    s->update(true);
    EXPECT_EQ(s->scale(), 65536);
  }
  LossScaler standard;
  EXPECT_EQ(standard.scale(), 65536);
  for (int i = 0; i < 1999; ++i) standard.update(true);
  EXPECT_EQ(standard.scale(), 65536);
  standard.update(true);
  EXPECT_EQ(standard.scale(), 131072);
}

TEST(LossScaler, StaysAFiniteFloat) {
  LossScaler scaler(0x1p127, 2, 0.5, 1);
  scaler.update(true);
  EXPECT_EQ(scaler.scale(), 0x1p127);
}

TEST(LossScaler, RefusesBadValues) {
  EXPECT_THROW(LossScaler(0), Error);
  EXPECT_THROW(LossScaler(1, 1), Error);
  EXPECT_THROW(LossScaler(1, 2, 1), Error);
  EXPECT_THROW(LossScaler(1, 2, 0.5, 0), Error);
  LossScaler scaler;
  EXPECT_THROW(scaler.load_state({{"scale", 0.0}, {"good_steps", 1}}, "state.json"), Error);
  EXPECT_THROW(scaler.load_state({{"scale", 2.0}, {"good_steps", 2000}}, "state.json"), Error);
  EXPECT_EQ(scaler.scale(), 65536);
}

}  // namespace
}  // namespace flexchat
