#include "train/options.h"

#include <algorithm>

#include "base/error.h"

namespace flexchat {

void TrainOptions::declare(Options& o) {
  const char* group = "Data";
  const auto add = [&](const char* name, Option::Target target, const char* help) -> Option& {
    return o.add(name, target, help).group(group);
  };
  add("--data", &data, "files, globs or folders of .txt, .md, .jsonl, .parquet").required();
  add("--val-data", &val_data, "validation data; default: a split of --data");
  add("--tokenizer", &tokenizer, "folder of a tokenizer (flexchat tokenizer train)").required();
  add("--packing", &packing,
      "rows of tokens: a running buffer, or rows that start with a document; auto: by arch")
      .choices({"auto", "classic", "bestfit"});

  group = "Model";
  add("--arch", &arch, "nanochat of December 2025 (classic) or July 2026 (modern)")
      .choices({"classic", "modern"});
  add("--depth", &depth, "the dial: blocks; width, heads, batch, rates and horizon follow (default 4)")
      .at_least(1);
  add("--n-layer", &n_layer, "blocks, if not --depth").at_least(1);
  add("--n-head", &n_head, "query heads, if not from --depth").at_least(1);
  add("--n-kv-head", &n_kv_head, "key and value heads (default: as many as query heads)").at_least(1);
  add("--n-embd", &n_embd, "width, if not from --depth").at_least(1);
  add("--window-pattern", &window_pattern, "modern: S (short) and L (long) windows, tiled over the blocks");
  add("--aspect-ratio", &aspect_ratio, "modern: width per block").at_least(1);
  add("--head-dim", &head_dim, "modern: channels of a head").at_least(2);
  add("--sequence-len", &sequence_len, "tokens of a row").at_least(2);

  group = "Budget";
  add("--device-batch-size", &device_batch_size, "rows of a micro batch").at_least(1);
  add("--total-batch-size", &total_batch_size,
      "tokens of an optimizer step (default: 524288, or by depth if modern)")
      .at_least(1);
  add("--num-iterations", &num_iterations, "optimizer steps; comes before the two below").at_least(1);
  add("--target-flops", &target_flops, "train for this many FLOPs").at_least(1);
  add("--target-param-data-ratio", &target_param_data_ratio, "tokens per parameter (default 20, modern 12)")
      .at_least(0);

  group = "Optimizer";
  add("--embedding-lr", &embedding_lr, "AdamW rate of the embeddings (default 0.2, modern 0.3)").at_least(0);
  add("--unembedding-lr", &unembedding_lr, "AdamW rate of the head (default 0.004, modern 0.008)")
      .at_least(0);
  add("--matrix-lr", &matrix_lr, "Muon rate of the block matrices (default 0.02)").at_least(0);
  add("--scalar-lr", &scalar_lr, "modern: AdamW rate of the scalars (default 0.5)").at_least(0);
  add("--weight-decay", &weight_decay, "classic: of AdamW (default 0); modern: of Muon (default 0.28)")
      .at_least(0);
  add("--schedule", &schedule, "rates over time").choices({"base", "ordinal"});
  add("--warmup", &warmup, "steps of linear warmup (default 0, modern 40)").at_least(0);
  add("--warmdown-ratio", &warmdown_ratio, "share of the run that lowers the rate (default 0.2, modern 0.65)")
      .at_least(0)
      .at_most(1);
  add("--final-lr-frac", &final_lr_frac, "rate at the end (default 0, modern 0.05)").at_least(0).at_most(1);
  add("--grad-clip", &grad_clip, "limit of the gradient's norm; 0: none (default 1, modern 0)").at_least(0);
  add("--muon-dtype", &muon_dtype, "dtype of Muon's iterations; auto: bf16 when computing in bf16, else f32")
      .choices({"auto", "bf16", "f32"});
  add("--ordinal-lr", &ordinal.initial_lr, "ordinal schedule: rate of every group at the start");
  add("--ordinal-patience", &ordinal.patience, "ordinal schedule: steps without improvement").at_least(1);
  add("--ordinal-anneals", &ordinal.anneals, "ordinal schedule: anneals between restarts").at_least(0);
  add("--ordinal-restarts", &ordinal.restarts, "ordinal schedule: restarts").at_least(0);

  group = "Execution";
  compute.declare(o, group);
  attention.declare(o, group);
  loss.declare(o, group);
  add("--seed", &seed, "of the initial weights").at_least(0);
  add("--checkpoint-activations", &checkpoint_activations,
      "recompute blocks in backward: less memory, same bits");
  add("--cuda-graph", &cuda_graph,
      "on CUDA record a step's kernels once and replay them: same bits, less waiting");

  group = "Run";
  add("--run-id", &run_id, "name of the run folder (default: time and a random word)").not_recorded();
  add("--runs", &runs, "folder that holds run folders").not_recorded();
  add("--resume", &resume, "go on from the newest checkpoint of --run-id; its options are taken over")
      .not_recorded();
  add("--stop-after", &stop_after, "save and stop after this many steps, as if interrupted")
      .at_least(1)
      .not_recorded();
  add("--eval-every", &eval_every, "steps between evaluations; 0: only at the end").at_least(0);
  add("--eval-tokens", &eval_tokens, "tokens of an evaluation (default: 20 steps' worth)").at_least(1);
  add("--sample-every", &sample_every, "steps between samples; 0: only at the end").at_least(0);
  add("--save-every", &save_every, "steps between checkpoints; 0: only at the end").at_least(0);
  add("--keep", &keep, "checkpoints to keep; 0: all").at_least(0);
}

GptConfig TrainOptions::model_config(int64_t vocab_size) const {
  const Arch a = parse_arch(arch);
  GptConfig config;
  if (n_layer || n_embd) {
    check(!depth, "--depth sets the shape; give either it or --n-layer, --n-head and --n-embd");
    check(n_layer && n_embd && n_head, "--n-layer, --n-head and --n-embd must be given together");
    config = {a, sequence_len, vocab_size, *n_layer, *n_head, *n_head, *n_embd, window_pattern};
  } else {
    config = config_for_depth(a, depth.value_or(4), sequence_len, vocab_size, {aspect_ratio, head_dim});
    config.window_pattern = window_pattern;
    if (n_head) config.n_head = config.n_kv_head = *n_head;
  }
  if (n_kv_head) config.n_kv_head = *n_kv_head;
  config.validate();
  return config;
}

BudgetOptions TrainOptions::budget_options() const {
  return {num_iterations, target_flops, target_param_data_ratio, total_batch_size};
}

OptimizerConfig TrainOptions::optimizer_config(const GptConfig& config) const {
  OptimizerConfig c = OptimizerConfig::base_defaults(config.arch, config.n_embd);
  c.embedding_lr = embedding_lr.value_or(c.embedding_lr);
  c.unembedding_lr = unembedding_lr.value_or(c.unembedding_lr);
  c.matrix_lr = matrix_lr.value_or(c.matrix_lr);
  c.scalar_lr = scalar_lr.value_or(c.scalar_lr);
  if (config.arch == Arch::classic) c.adamw_weight_decay = weight_decay.value_or(0);
  if (compute.compute_dtype() == DType::f64) {
    c.muon_dtype = DType::f64;
  } else if (muon_dtype != "auto") {
    c.muon_dtype = parse_dtype(muon_dtype);
  } else {
    c.muon_dtype = compute.compute_dtype() == DType::bf16 ? DType::bf16 : DType::f32;
  }
  return c;
}

BaseSchedule TrainOptions::base_schedule(const GptConfig& config, int64_t iterations) const {
  BaseSchedule s = BaseSchedule::defaults(config.arch, iterations);
  s.warmup = warmup.value_or(s.warmup);
  if (warmdown_ratio) s.warmdown = BaseSchedule::steps_of(*warmdown_ratio, iterations);
  s.final_lr_frac = final_lr_frac.value_or(s.final_lr_frac);
  return s;
}

double TrainOptions::clip_norm() const { return grad_clip.value_or(arch == "classic" ? 1.0 : 0.0); }

const std::vector<std::string>& TrainOptions::resumable_keys() {
  static const std::vector<std::string> keys = {"eval_every", "eval_tokens", "sample_every",
                                                "save_every", "keep",        "cuda_graph"};
  return keys;
}

}  // namespace flexchat
