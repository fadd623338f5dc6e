// How rates change during a run: the fixed schedules of base training, the ordinal scheduler that follows the
// loss, and the smoothed loss itself. Steps count from 0.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "base/options.h"
#include "models/config.h"

namespace flexchat {

// Base training over num_iterations steps: a linear warmup, a plateau, a linear warmdown to final_lr_frac.
struct BaseSchedule {
  Arch arch = Arch::classic;
  int64_t num_iterations = 0;
  int64_t warmup = 0;    // steps
  int64_t warmdown = 0;  // steps
  double final_lr_frac = 0;

  // classic: no warmup, warmdown over 0.2 of the run to 0. modern: 40 steps, 0.65, 0.05.
  static BaseSchedule defaults(Arch arch, int64_t num_iterations);
  // A part of the run in whole steps, halves to even.
  static int64_t steps_of(double ratio, int64_t num_iterations);

  // Factor on every group's rate: step < warmup: (step+1)/warmup; step <= num_iterations - warmdown: 1; else
  // linear from 1 to final_lr_frac, which it reaches at step num_iterations.
  double lr_multiplier(int64_t step) const;
  // classic: 0.85 to 0.95 over 300 steps. modern: 0.85 to 0.97 over 400 steps, then 0.97, and down to 0.90
  // during the warmdown.
  double muon_momentum(int64_t step) const;
  // modern: initial * (1 + cos(pi * step / num_iterations)) / 2; classic Muon has none: 0.
  double muon_weight_decay(int64_t step, double initial) const;
};

// Lowers the rate when the loss stops falling, and at times starts over: a descent along the ordinal
// w^2*restarts + w*anneals + patience. Every step either lowers the smoothed loss or the ordinal.
struct OrdinalOptions {
  int64_t restarts = 2;      // A
  int64_t anneals = 3;       // B, again after every restart
  int64_t patience = 100;    // C: steps without improvement before something happens
  double initial_lr = 1e-3;  // of every group
  double anneal_factor = 0.3;
  double min_lr = 1e-6;
  double ema_weight = 0.1;  // of the newest loss
};

class OrdinalScheduler {
 public:
  explicit OrdinalScheduler(const OrdinalOptions& options);  // Error on counts or rates out of range

  enum class Event {
    none,
    anneal,   // lr() fell
    restart,  // lr() is initial_lr again; the caller clears the optimizer's state
  };
  // One step's loss. A NaN loss counts as no improvement, and so does every one after it.
  Event step(double loss);
  double lr() const { return lr_; }  // for every group
  int64_t restarts_left() const { return restarts_; }
  int64_t anneals_left() const { return anneals_; }
  int64_t patience_left() const { return patience_; }  // falls below 0 when nothing is left to do

  Json state() const;
  void load_state(const Json& state, const std::string& source);

 private:
  OrdinalOptions options_;
  int64_t restarts_, anneals_, patience_;
  double lr_;
  std::optional<double> best_, ema_;  // empty: infinite, unset
};

// Exponential moving average that does not lean towards its zero start.
class LossAverage {
 public:
  explicit LossAverage(double decay = 0.9);
  // Takes one loss, returns average / (1 - decay^count).
  double update(double loss);

  Json state() const;
  void load_state(const Json& state, const std::string& source);

 private:
  double decay_, average_ = 0;
  int64_t count_ = 0;
};

}  // namespace flexchat
