// One dial and one budget. `--depth` gives the shape of a model; the shape and a budget (steps, FLOPs, or
// tokens per parameter) give the batch size, the rates' factors and the number of steps.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "models/config.h"

namespace flexchat {

// modern alone: n_embd = aspect_ratio * depth rounded up to whole heads of head_dim. classic: n_embd = 64 *
// depth and one head per 128 channels, rounded up; depths whose heads do not divide n_embd are errors.
struct DepthDial {
  int64_t aspect_ratio = 64;
  int64_t head_dim = 128;
};
GptConfig config_for_depth(Arch arch, int64_t depth, int64_t sequence_len, int64_t vocab_size,
                           const DepthDial& dial = {});

struct BudgetOptions {
  // The horizon is the first of these that is given.
  std::optional<int64_t> num_iterations = {};
  std::optional<double> target_flops = {};
  // Tokens per parameter: per all parameters (classic, default 20), per block matrix and head parameter
  // (modern, default 12). modern derives the batch size and Muon's weight decay from it in any case.
  std::optional<double> target_param_data_ratio = {};
  // Tokens per step; default 2^19 (classic), or a power of two that grows with the budget (modern).
  std::optional<int64_t> total_batch_size = {};
};

struct Budget {
  int64_t total_batch_size = 0;  // tokens per step
  int64_t num_iterations = 0;
  std::string_view horizon;  // what set num_iterations: "num_iterations", "target_flops", ...
  // modern, 1 for classic: on the embedding, unembedding, scalar and matrix rates; on Muon's weight decay.
  double lr_factor = 1;
  double weight_decay_factor = 1;

  double tokens() const {
    return static_cast<double>(total_batch_size) * static_cast<double>(num_iterations);
  }
};
// `dial` as used for `config`: modern compares it with the same dial at depth 12. Errors: values that are not
// positive, a budget of less than one step.
Budget make_budget(const GptConfig& config, const BudgetOptions& options, const DepthDial& dial = {});

// Micro batches of device_batch_size rows per step; Error unless they fill total_batch_size exactly.
int64_t grad_accum_steps(int64_t total_batch_size, int64_t device_batch_size, int64_t sequence_len,
                         int64_t world_size = 1);

}  // namespace flexchat
