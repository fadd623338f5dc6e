// Everything `flexchat train base` can be told, declared once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backend/device_options.h"
#include "base/options.h"
#include "models/config.h"
#include "models/run_options.h"
#include "optim/budget.h"
#include "optim/optimizer.h"
#include "optim/schedule.h"

namespace flexchat {

struct TrainOptions {
  // data
  std::vector<std::string> data, val_data;
  std::string tokenizer;
  std::string packing = "auto";
  // model
  std::string arch = "classic";
  std::optional<int64_t> depth;  // 4 when no shape is given
  std::optional<int64_t> n_layer, n_head, n_kv_head, n_embd;
  std::string window_pattern = "SSSL";
  int64_t aspect_ratio = 64, head_dim = 128;
  int64_t sequence_len = 1024;
  // budget
  int64_t device_batch_size = 8;
  std::optional<int64_t> total_batch_size, num_iterations;
  std::optional<double> target_flops, target_param_data_ratio;
  // optimizer
  std::optional<double> embedding_lr, unembedding_lr, matrix_lr, scalar_lr, weight_decay;
  std::string schedule = "base";
  std::optional<int64_t> warmup;
  std::optional<double> warmdown_ratio, final_lr_frac, grad_clip;
  std::string muon_dtype = "auto";
  OrdinalOptions ordinal;
  // execution
  DeviceOptions compute;
  AttentionOptions attention;
  HeadLossOptions loss;
  int64_t seed = 42;
  bool checkpoint_activations = false;
  bool cuda_graph = true;
  // evaluation and checkpoints
  int64_t eval_every = 250, sample_every = 500, save_every = 250, keep = 2;
  std::optional<int64_t> eval_tokens;
  // run
  std::string run_id, runs = "runs";
  bool resume = false;
  std::optional<int64_t> stop_after;

  void declare(Options& o);

  // What the options mean together; each throws Error with one line when they don't fit.
  GptConfig model_config(int64_t vocab_size) const;
  BudgetOptions budget_options() const;
  OptimizerConfig optimizer_config(const GptConfig& config) const;
  BaseSchedule base_schedule(const GptConfig& config, int64_t iterations) const;
  double clip_norm() const;  // 0: none

  // Options that a resumed run may change without becoming another run.
  static const std::vector<std::string>& resumable_keys();
};

}  // namespace flexchat
