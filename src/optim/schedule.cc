#include "optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "base/error.h"
#include "checkpoint/state_json.h"

namespace flexchat {
namespace {

constexpr double lerp(double from, double to, double t) { return from * (1 - t) + to * t; }
double part(int64_t steps, int64_t of) { return static_cast<double>(steps) / static_cast<double>(of); }

}  // namespace

BaseSchedule BaseSchedule::defaults(Arch arch, int64_t num_iterations) {
  check(num_iterations >= 1, "a schedule needs at least one step, not {}", num_iterations);
  if (arch == Arch::classic) return {arch, num_iterations, 0, steps_of(0.2, num_iterations), 0};
  return {arch, num_iterations, 40, steps_of(0.65, num_iterations), 0.05};
}

int64_t BaseSchedule::steps_of(double ratio, int64_t num_iterations) {
  return static_cast<int64_t>(std::nearbyint(ratio * static_cast<double>(num_iterations)));
}

double BaseSchedule::lr_multiplier(int64_t step) const {
  if (step < warmup) return part(step + 1, warmup);
  if (step <= num_iterations - warmdown) return 1;
  const double left = part(std::max<int64_t>(num_iterations - step, 0), std::max<int64_t>(warmdown, 1));
  return left + (1 - left) * final_lr_frac;
}

double BaseSchedule::muon_momentum(int64_t step) const {
  if (arch == Arch::classic) return lerp(0.85, 0.95, std::min(part(step, 300), 1.0));
  if (step < 400) return lerp(0.85, 0.97, part(step, 400));
  const int64_t start = num_iterations - warmdown;
  if (warmdown == 0 || step < start) return 0.97;
  return lerp(0.97, 0.90, std::min(part(step - start, warmdown), 1.0));
}

double BaseSchedule::muon_weight_decay(int64_t step, double initial) const {
  if (arch == Arch::classic) return 0;
  return initial * 0.5 * (1 + std::cos(std::numbers::pi * part(step, num_iterations)));
}

OrdinalScheduler::OrdinalScheduler(const OrdinalOptions& options)
    : options_(options),
      restarts_(options.restarts),
      anneals_(options.anneals),
      patience_(options.patience),
      lr_(options.initial_lr) {
  check(options.restarts >= 0 && options.anneals >= 0,
        "the ordinal scheduler cannot restart {} and anneal {} times; allowed: 0 or more", options.restarts,
        options.anneals);
  check(options.patience >= 1, "the ordinal scheduler's patience is {}; at least 1", options.patience);
  check(options.initial_lr > 0 && options.anneal_factor > 0 && options.min_lr > 0,
        "the ordinal scheduler's initial rate {}, anneal factor {} and least rate {} must be above 0",
        options.initial_lr, options.anneal_factor, options.min_lr);
  check(options.ema_weight > 0 && options.ema_weight <= 1,
        "the ordinal scheduler's loss weight is {}; allowed: above 0, at most 1", options.ema_weight);
}

OrdinalScheduler::Event OrdinalScheduler::step(double loss) {
  ema_ = ema_ ? (1 - options_.ema_weight) * *ema_ + options_.ema_weight * loss : loss;
  const bool improved = best_ ? *ema_ < *best_ : *ema_ < HUGE_VAL;
  if (improved) {
    best_ = ema_;
  } else {
    --patience_;
  }
  if (patience_ > 0) return Event::none;
  if (anneals_ > 0) {
    --anneals_;
    patience_ = options_.patience;
    lr_ = std::max(options_.min_lr, lr_ * options_.anneal_factor);
    best_.reset();
    return Event::anneal;
  }
  if (restarts_ > 0) {
    --restarts_;
    anneals_ = options_.anneals;
    patience_ = options_.patience;
    lr_ = options_.initial_lr;
    best_.reset();
    return Event::restart;
  }
  return Event::none;
}

Json OrdinalScheduler::state() const {
  Json state = {{"restarts", restarts_}, {"anneals", anneals_}, {"patience", patience_}, {"lr", lr_}};
  if (best_) state["best"] = *best_;
  if (ema_) state["ema"] = *ema_;
  return state;
}

void OrdinalScheduler::load_state(const Json& state, const std::string& source) {
  const StateReader reader(state, source);
  OrdinalScheduler loaded(options_);
  loaded.restarts_ = reader.integer("restarts");
  loaded.anneals_ = reader.integer("anneals");
  loaded.patience_ = reader.integer("patience");
  loaded.lr_ = reader.number("lr");
  check(loaded.restarts_ >= 0 && loaded.restarts_ <= options_.restarts && loaded.anneals_ >= 0 &&
            loaded.anneals_ <= options_.anneals && loaded.patience_ <= options_.patience && loaded.lr_ > 0,
        "{}: the ordinal scheduler cannot have {} restarts, {} anneals, patience {} and rate {}", source,
        loaded.restarts_, loaded.anneals_, loaded.patience_, loaded.lr_);
  if (reader.contains("best")) loaded.best_ = reader.number("best");
  if (reader.contains("ema")) loaded.ema_ = reader.number("ema");
  *this = loaded;
}

LossAverage::LossAverage(double decay) : decay_(decay) {
  check(decay >= 0 && decay < 1, "the decay of a loss average is {}; allowed: at least 0, below 1", decay);
}

double LossAverage::update(double loss) {
  average_ = decay_ * average_ + (1 - decay_) * loss;
  ++count_;
  return average_ / (1 - std::pow(decay_, static_cast<double>(count_)));
}

Json LossAverage::state() const { return Json{{"average", average_}, {"count", count_}}; }

void LossAverage::load_state(const Json& state, const std::string& source) {
  const StateReader reader(state, source);
  const double average = reader.number("average");
  const int64_t count = reader.integer("count");
  check(count >= 0, "{}: a loss average cannot have {} losses", source, count);
  average_ = average;
  count_ = count;
}

}  // namespace flexchat
