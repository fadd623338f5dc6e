// GPT, classic and modern nanochat: one forward that reads like the paper, for training, evaluation, prefill,
// chunk decode and single-token decode. Parameters carry the reference systems' state-dict names.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "grad/parameter.h"
#include "grad/tape.h"
#include "models/config.h"
#include "ops/loss.h"
#include "ops/ops.h"

namespace flexchat {

// Keys and values of every layer, contiguous, filled from position 0.
struct KvCache {
  struct Layer {
    Tensor k, v;  // (B, max_len, G*D) compute dtype
  };
  std::vector<Layer> layers;
  int64_t batch = 0, max_len = 0;
  int64_t length = 0;  // positions held
  Tensor
      previous_embedding;  // modern: (B, C), the last token's embedding before smear; undefined at the start
};

// The two ways to the same causal (windowed) attention: with the mask that every kernel has built in, or with
// the mask as an expression.
enum class AttentionPath : uint8_t { sdpa, flex };

class Gpt {
 public:
  // Weights are uninitialised until init_weights or load. `compute` is the dtype of activations; on the
  // reference backend it must be f64.
  Gpt(const GptConfig& config, Backend& backend, DType compute);
  Gpt(const Gpt&) = delete;
  Gpt& operator=(const Gpt&) = delete;

  const GptConfig& config() const { return config_; }
  Backend& backend() const { return backend_; }
  DType compute_dtype() const { return compute_; }

  // In state-dict order. After changing a value call weights_changed(), unless its compute copy changed too
  // (an Optimizer does that).
  std::vector<Parameter>& parameters() { return parameters_; }
  const Parameter& parameter(const std::string& name) const;
  void weights_changed();
  void zero_grad();

  // The reference systems' initial distributions from a Philox stream for each parameter.
  void init_weights(uint64_t seed);
  // Takes every parameter from `lookup(name, shape)`, a tensor of that shape in host memory.
  void load(const std::function<Tensor(const std::string&, const Shape&)>& lookup);

  // Negative log-likelihood of each token, (B*T) master, for ids and targets (B, T) i32, in host memory
  // (where they are checked) or on the device. A recording tape also forms the gradients of weight *
  // sum(nll); run tape.backward() to finish them. Targets below 0 are ignored.
  Tensor nll(Tape& tape, const Tensor& ids, const Tensor& targets, double weight);

  // Error: an id or target in host memory outside the vocabulary; targets below 0 are fine.
  void check_ids(const Tensor& ids, const Tensor& targets) const;

  // Logits after the softcap, (B, T, V) master, or (B, 1, V) of the last position only. With a cache the ids
  // continue what it holds, and it grows by T.
  Tensor logits(const Tensor& ids, KvCache* cache = nullptr, bool last_only = false);

  KvCache make_cache(int64_t batch, int64_t max_len) const;

  // How attention runs from now on, in training, prefill, chunks and decode alike. `kernel` is "auto" or one
  // of the backend's attention_kernels(). Both paths give the same result up to rounding.
  void set_attention(AttentionPath path, const std::string& kernel = "auto");
  // The plans in use. As long as somebody holds one, calls of its sizes keep using it.
  std::vector<AttentionPlanPtr> attention_plans() const;
  AttentionPath attention_path() const { return attention_path_; }
  // Makes the plans for (batch, t_len) from the first position on ahead of their first use, so that
  // attention_plans() tells what will run. Errors: as Backend::plan_attention.
  void plan_attention(int64_t batch, int64_t t_len);

  // How nll() computes the head from now on.
  void set_loss(const LossOptions& options) { loss_options_ = options; }
  // What that comes to for `rows` tokens, with gradients or without. Errors: as plan_loss.
  LossPlan loss_plan(int64_t rows, bool gradients) const;

  // Activation checkpointing of every block: less memory, the same bits (see Tape::checkpoint).
  void set_checkpoint_activations(bool on) { checkpoint_activations_ = on; }

 private:
  struct Block {
    Weight qkv;         // ((H + 2G) * D, C): c_q, c_k, c_v behind one another, so one product makes all three
    Weight c_proj;      // (C, C)
    Weight c_fc;        // (4C, C)
    Weight mlp_c_proj;  // (C, 4C)
    Weight value_embeds;  // modern, some layers: (Vp, G*D)
    Weight ve_gate;       // modern, some layers: (G, 12)
  };

  void build_parameters();
  Weight make_weight(const std::string& name, Shape shape);
  // Rows [row, row + rows) of a weight.
  void add_parameter(const std::string& name, const Weight& weight, int64_t row, int64_t rows);
  void for_each_weight(const std::function<void(Weight&)>& fn);
  void build_rope_tables();

  // The ids where the device reads them. Those in host memory are checked to be in [0, vocab_size);
  // whoever passes device memory has checked them.
  Tensor checked_ids(const Tensor& ids) const;
  // ids -> the trunk's normed output (N, C), or of the last position only.
  Var trunk(Tape& tape, const Tensor& ids, KvCache* cache, bool last_only);
  Var block(Tape& tape, int64_t layer, const Var& x, const Var& x0, const Tensor& ids, KvCache* cache);
  Var attend(Tape& tape, int64_t layer, const Var& qkv, int64_t batch, KvCache* cache);
  Var last_position(const Var& x, int64_t batch) const;
  // The plan of a layer for `t_len` tokens behind `offset` others. Layers with the same window share one, and
  // so do steps for as long as sizes stay the same.
  const AttentionPlanPtr& attention_plan(int64_t layer, int64_t batch, int64_t t_len, int64_t offset);

  GptConfig config_;
  Backend& backend_;
  DType compute_;
  bool checkpoint_activations_ = false;
  AttentionPath attention_path_ = AttentionPath::sdpa;
  std::string attention_kernel_ = "auto";
  LossOptions loss_options_;
  std::map<std::array<int64_t, 4>, AttentionPlanPtr> plans_;  // by batch, tokens, offset and window
  std::map<int64_t, flex::Expr> window_masks_;                // the flex path's, by window
  std::vector<Parameter> parameters_;
  Weight wte_, lm_head_;
  Weight resid_lambdas_, x0_lambdas_, smear_lambda_, backout_lambda_, smear_gate_;  // modern
  std::vector<Block> blocks_;
  RopeTables rope_;
};

}  // namespace flexchat
