// Base training: data to checkpoints. One object is one run; run() is the loop. Everything that decides the
// next bit of the run (weights, optimizer, data position, schedules) is in the checkpoint, so N steps equal K
// steps, a kill, and N - K more.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/progress.h"
#include "checkpoint/checkpoint.h"
#include "data/loader.h"
#include "models/gpt.h"
#include "optim/gradients.h"
#include "optim/optimizer.h"
#include "report/run_folder.h"
#include "tokenizer/tokenizer.h"
#include "train/evaluate.h"
#include "train/options.h"
#include "train/step.h"

namespace flexchat {

class Trainer {
 public:
  // `options` as parsed; `record` its JSON, kept in config.json and every checkpoint.
  Trainer(const TrainOptions& options, const GptConfig& config, Tokenizer tokenizer, const Json& record,
          RunFolder run);

  // Trains to the end, to --stop-after or to a signal. Returns the exit code: 0 finished or stopped as asked,
  // 128 + the signal's number otherwise.
  int run();

 private:
  struct StepResult {
    double loss = 0;       // mean over the step's micro batches, nats per token
    double grad_norm = 0;  // before clipping
    bool skipped = false;  // f16 overflow: no update
    double seconds = 0;
    double data_seconds = 0;  // of them, waiting for the next batch
  };

  void print_plan() const;
  void resume_from_checkpoint();
  std::vector<TensorGroup> checkpoint_groups() const;
  Json checkpoint_state() const;
  void save();

  StepResult train_step();
  void apply_schedule(double loss);
  // Throws RunError that names the first tensor holding a NaN or an infinity.
  [[noreturn]] void stop_on_bad_numbers(double loss, double grad_norm);

  void evaluate();
  void sample();
  void log_step(const StepResult& result);
  void show_progress();
  void finish(const std::string& status);
  double lr_multiplier() const;

  TrainOptions options_;
  GptConfig config_;
  Tokenizer tokenizer_;
  Json record_;
  RunFolder run_;
  std::unique_ptr<Backend> backend_;
  Gpt model_;
  std::vector<Parameter*> parameters_;
  Budget budget_;
  BaseSchedule schedule_;
  std::optional<OrdinalScheduler> ordinal_;
  Optimizer optimizer_;
  int64_t accumulation_;  // micro batches of a step
  TrainStep step_work_;
  std::optional<LossScaler> scaler_;  // f16
  LossAverage average_;
  LossPlan loss_plan_;
  Json attention_;  // what runs in training: attention_record
  std::vector<int32_t> token_bytes_;
  std::optional<LoaderState> resume_position_;
  std::unique_ptr<BatchLoader> loader_;
  std::unique_ptr<ValLoader> val_loader_;
  std::unique_ptr<Progress> progress_;
  SourceStats source_stats_;

  int64_t step_ = 0;        // steps done
  int64_t first_step_ = 0;  // of this process
  double smooth_loss_ = 0, last_loss_ = 0, train_seconds_ = 0, process_seconds_ = 0;
  double rate_ = 0;  // tokens per second of the last step
  std::optional<double> best_bpb_, last_bpb_;
};

}  // namespace flexchat
