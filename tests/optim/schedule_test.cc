// Schedules against values worked out by hand from their formulas; the ordinal scheduler's whole course;
// resume.
#include "optim/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "checkpoint/state_json.h"

namespace flexchat {
namespace {

using Event = OrdinalScheduler::Event;

Json through_text(const Json& state) { return parse_state_json(dump_state_json(state, "state"), "state"); }

TEST(BaseSchedule, HalvesRoundToEven) {
  const std::vector<std::pair<int64_t, int64_t>> warmdowns = {
      {10, 6}, {30, 20}, {50, 32}, {70, 46}, {90, 58}};
  for (const auto& [n, d] : warmdowns) {
    EXPECT_EQ(BaseSchedule::defaults(Arch::modern, n).warmdown, d) << n;
  }
  EXPECT_EQ(BaseSchedule::defaults(Arch::classic, 2).warmdown, 0);
  EXPECT_EQ(BaseSchedule::defaults(Arch::classic, 13).warmdown, 3);
  EXPECT_EQ(BaseSchedule::steps_of(0.5, 5), 2);
  EXPECT_EQ(BaseSchedule::steps_of(0.5, 7), 4);
}

TEST(BaseSchedule, LearningRate) {
  const BaseSchedule classic = BaseSchedule::defaults(Arch::classic, 55);
  EXPECT_EQ(classic.lr_multiplier(0), 1);
  EXPECT_EQ(classic.lr_multiplier(44), 1);
  EXPECT_DOUBLE_EQ(classic.lr_multiplier(45), 10.0 / 11);
  EXPECT_DOUBLE_EQ(classic.lr_multiplier(54), 1.0 / 11);
  EXPECT_EQ(classic.lr_multiplier(55), 0);
  EXPECT_EQ(classic.lr_multiplier(56), 0);

  const BaseSchedule modern = BaseSchedule::defaults(Arch::modern, 1001);  // 651 steps of warmdown
  EXPECT_DOUBLE_EQ(modern.lr_multiplier(0), 0.025);
  EXPECT_DOUBLE_EQ(modern.lr_multiplier(38), 0.975);
  EXPECT_EQ(modern.lr_multiplier(39), 1);
  EXPECT_EQ(modern.lr_multiplier(350), 1);
  EXPECT_DOUBLE_EQ(modern.lr_multiplier(351), 0.9985407066052228);
  EXPECT_DOUBLE_EQ(modern.lr_multiplier(676), 0.5242703533026114);
  EXPECT_DOUBLE_EQ(modern.lr_multiplier(1001), 0.05);

  // A run shorter than the warmup still follows the warmup.
  EXPECT_DOUBLE_EQ(BaseSchedule::defaults(Arch::modern, 10).lr_multiplier(9), 0.25);
  // No warmdown: the plateau lasts.
  EXPECT_EQ(BaseSchedule::defaults(Arch::classic, 2).lr_multiplier(2), 1);
  const BaseSchedule custom = {Arch::classic, 10, 2, 4, 0.5};
  EXPECT_DOUBLE_EQ(custom.lr_multiplier(0), 0.5);
  EXPECT_DOUBLE_EQ(custom.lr_multiplier(8), 0.75);
}

TEST(BaseSchedule, MuonMomentum) {
  const BaseSchedule classic = BaseSchedule::defaults(Arch::classic, 55);
  EXPECT_DOUBLE_EQ(classic.muon_momentum(0), 0.85);
  EXPECT_DOUBLE_EQ(classic.muon_momentum(150), 0.90);
  EXPECT_DOUBLE_EQ(classic.muon_momentum(300), 0.95);
  EXPECT_DOUBLE_EQ(classic.muon_momentum(1000), 0.95);

  const BaseSchedule brief = BaseSchedule::defaults(Arch::modern, 1001);  // warmdown from step 350
  EXPECT_DOUBLE_EQ(brief.muon_momentum(0), 0.85);
  EXPECT_DOUBLE_EQ(brief.muon_momentum(100), 0.88);
  EXPECT_DOUBLE_EQ(brief.muon_momentum(399), 0.9697);
  EXPECT_DOUBLE_EQ(brief.muon_momentum(400), 0.9646236559139786);
  EXPECT_DOUBLE_EQ(brief.muon_momentum(1001), 0.90);
  const BaseSchedule longer = BaseSchedule::defaults(Arch::modern, 4000);  // warmdown from step 1400
  EXPECT_DOUBLE_EQ(longer.muon_momentum(400), 0.97);
  EXPECT_DOUBLE_EQ(longer.muon_momentum(1400), 0.97);
  EXPECT_DOUBLE_EQ(longer.muon_momentum(1401), 0.9699730769230769);
  const BaseSchedule flat = {Arch::modern, 1000, 0, 0, 0};
  EXPECT_DOUBLE_EQ(flat.muon_momentum(1000), 0.97);
}

TEST(BaseSchedule, MuonWeightDecay) {
  const BaseSchedule modern = BaseSchedule::defaults(Arch::modern, 90);
  EXPECT_DOUBLE_EQ(modern.muon_weight_decay(0, 0.1), 0.1);
  EXPECT_DOUBLE_EQ(modern.muon_weight_decay(30, 0.1), 0.075);
  EXPECT_DOUBLE_EQ(modern.muon_weight_decay(45, 0.1), 0.05);
  EXPECT_NEAR(modern.muon_weight_decay(89, 0.1), 3.0458649045211895e-05, 1e-17);
  EXPECT_EQ(BaseSchedule::defaults(Arch::classic, 90).muon_weight_decay(0, 0.1), 0);
  EXPECT_THROW(BaseSchedule::defaults(Arch::modern, 0), Error);
}

// Rising losses use up all patience; P = 2, B = 1, A = 1.
TEST(OrdinalScheduler, WalksDownTheOrdinal) {
  OrdinalScheduler s({.restarts = 1, .anneals = 1, .patience = 2, .initial_lr = 0.1, .anneal_factor = 0.5});
  EXPECT_EQ(s.lr(), 0.1);
  struct Row {
    Event event;
    int64_t restarts, anneals, patience;
    double lr;
  };
  const std::vector<Row> rows = {
      {Event::none, 1, 1, 2, 0.1},     // the first loss is an improvement
      {Event::none, 1, 1, 1, 0.1},     //
      {Event::anneal, 1, 0, 2, 0.05},  // fires on the step that empties the patience
      {Event::none, 1, 0, 2, 0.05},    // after it any loss is an improvement
      {Event::none, 1, 0, 1, 0.05},    //
      {Event::restart, 0, 1, 2, 0.1},  //
      {Event::none, 0, 1, 2, 0.1},     //
      {Event::none, 0, 1, 1, 0.1},     //
      {Event::anneal, 0, 0, 2, 0.05},  //
      {Event::none, 0, 0, 2, 0.05},    //
      {Event::none, 0, 0, 1, 0.05},    //
      {Event::none, 0, 0, 0, 0.05},    // nothing left: the patience keeps falling
      {Event::none, 0, 0, -1, 0.05},   //
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(s.step(5 + static_cast<double>(i)), rows[i].event);
    EXPECT_EQ(s.restarts_left(), rows[i].restarts);
    EXPECT_EQ(s.anneals_left(), rows[i].anneals);
    EXPECT_EQ(s.patience_left(), rows[i].patience);
    EXPECT_EQ(s.lr(), rows[i].lr);
  }
}

TEST(OrdinalScheduler, ImprovementIsStrictAndOfTheSmoothedLoss) {
  OrdinalScheduler s({.patience = 10});
  s.step(4);
  s.step(4);  // equal is no improvement
  EXPECT_EQ(s.patience_left(), 9);
  s.step(2);  // 3.8
  EXPECT_EQ(s.patience_left(), 9);
  s.step(5);  // 3.92: worse
  EXPECT_EQ(s.patience_left(), 8);
  s.step(3.9);  // 3.918: below the last, not below the best
  EXPECT_EQ(s.patience_left(), 7);
  s.step(1);  // 3.6262
  EXPECT_EQ(s.patience_left(), 7);
  EXPECT_DOUBLE_EQ(s.state()["ema"].get<double>(), 0.9 * (0.9 * (0.9 * 3.8 + 0.5) + 0.39) + 0.1);
  s.step(std::numeric_limits<double>::quiet_NaN());
  s.step(1);
  EXPECT_EQ(s.patience_left(), 5) << "after a NaN nothing improves";
}

TEST(OrdinalScheduler, RateHasAFloor) {
  OrdinalScheduler s(
      {.restarts = 0, .anneals = 3, .patience = 1, .initial_lr = 1e-3, .anneal_factor = 0.1, .min_lr = 5e-5});
  std::vector<double> rates;
  for (int i = 0; i < 20; ++i) {
    if (s.step(1) == Event::anneal) rates.push_back(s.lr());
  }
  EXPECT_EQ(rates, (std::vector<double>{1e-3 * 0.1, 5e-5, 5e-5}));
}

TEST(OrdinalScheduler, ResumesAnywhere) {
  const OrdinalOptions options = {.restarts = 1, .anneals = 2, .patience = 3};
  const auto loss = [](int i) { return 3 + std::sin(0.7 * i) / (1 + 0.05 * i); };
  for (int at = 0; at < 40; ++at) {
    OrdinalScheduler whole(options), resumed(options);
    for (int i = 0; i < at; ++i) whole.step(loss(i));
    resumed.step(100);  // must leave no trace
    resumed.load_state(through_text(whole.state()), "state.json");
    for (int i = at; i < 45; ++i) {
      ASSERT_EQ(whole.step(loss(i)), resumed.step(loss(i)));
      ASSERT_EQ(whole.lr(), resumed.lr());
    }
    EXPECT_EQ(whole.state(), resumed.state());
  }
}

TEST(OrdinalScheduler, RefusesBadOptionsAndStates) {
  EXPECT_THROW(OrdinalScheduler({.restarts = -1}), Error);
  EXPECT_THROW(OrdinalScheduler({.anneals = -1}), Error);
  EXPECT_THROW(OrdinalScheduler({.patience = 0}), Error);
  EXPECT_THROW(OrdinalScheduler({.initial_lr = 0}), Error);
  EXPECT_THROW(OrdinalScheduler({.anneal_factor = 0}), Error);
  EXPECT_THROW(OrdinalScheduler({.min_lr = -1}), Error);
  EXPECT_THROW(OrdinalScheduler({.ema_weight = 0}), Error);
  OrdinalScheduler s({});
  Json state = s.state();
  state["restarts"] = 3;
  EXPECT_THROW(s.load_state(state, "state.json"), Error);
  state = s.state();
  state.erase("lr");
  EXPECT_THROW(s.load_state(state, "state.json"), Error);
  EXPECT_EQ(s.state()["restarts"], 2);
}

TEST(LossAverage, IsDebiased) {
  LossAverage average;
  EXPECT_DOUBLE_EQ(average.update(4), 4);
  EXPECT_DOUBLE_EQ(average.update(2), (0.09 * 4 + 0.1 * 2) / 0.19);
  LossAverage resumed;
  resumed.update(9);
  resumed.load_state(through_text(average.state()), "state.json");
  EXPECT_EQ(resumed.update(1), average.update(1));
  EXPECT_THROW(LossAverage(1), Error);
  EXPECT_THROW(resumed.load_state({{"average", 1.0}, {"count", -1}}, "state.json"), Error);
}

}  // namespace
}  // namespace flexchat
