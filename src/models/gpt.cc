#include "models/gpt.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "base/error.h"
#include "base/strings.h"
#include "flex/mods.h"

namespace flexchat {
namespace {

constexpr double kSoftcap = 15;

// Ids index tables, so one from another tokenizer must not get through.
void check_range(const Tensor& ids, int64_t least, int64_t vocab_size, const char* what) {
  const auto* id = ids.as<int32_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (id[i] < least || id[i] >= vocab_size) {
      fail("{} {} at position {} is outside the vocabulary of {}", what, id[i], i, vocab_size);
    }
  }
}

// Negative targets are ignored; a batch of them alone has nothing to learn from.
void check_target_range(const Tensor& targets, int64_t vocab_size) {
  check_range(targets, std::numeric_limits<int32_t>::min(), vocab_size, "target");
  const std::span<const int32_t> all(targets.as<int32_t>(), static_cast<size_t>(targets.numel()));
  if (!all.empty() && std::all_of(all.begin(), all.end(), [](int32_t t) { return t < 0; }))
    warn_without_targets();
}

}  // namespace

void Gpt::check_ids(const Tensor& ids, const Tensor& targets) const {
  check_range(ids, 0, config_.vocab_size, "token id");
  check_target_range(targets, config_.vocab_size);
}

Tensor Gpt::checked_ids(const Tensor& ids) const {
  if (ids.arena().host()) check_range(ids, 0, config_.vocab_size, "token id");
  return backend_.to_device(ids);
}

Gpt::Gpt(const GptConfig& config, Backend& backend, DType compute)
    : config_(config), backend_(backend), compute_(compute) {
  config_.validate();
  check((backend.master_dtype() == DType::f64) == (compute == DType::f64),
        "the {} backend does not compute in {}", backend.name(), dtype_name(compute));
  build_parameters();
  build_rope_tables();
}

// ---- forward --------------------------------------------------------------------------------------------

Var Gpt::trunk(Tape& tape, const Tensor& ids, KvCache* cache, bool last_only) {
  const bool modern = config_.arch == Arch::modern;
  const int64_t batch = ids.dim(0);
  const Tensor flat_ids = ids.reshape({ids.numel()});

  Var x = embed_norm(tape, wte_, flat_ids, compute_);
  if (modern) {
    const Var e = x;
    const bool has_previous = cache && cache->previous_embedding.defined();
    x = smear(tape, e, batch, has_previous ? &cache->previous_embedding : nullptr, smear_gate_,
              smear_lambda_);
    if (cache) cache->previous_embedding = last_position(e, batch)->value;
  }
  const Var x0 = x;
  Var middle;
  for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
    if (checkpoint_activations_ && tape.recording()) {
      x = tape.checkpoint(x, [this, layer, x0, ids](Tape& t, const Var& in) {
        return block(t, layer, in, layer == 0 ? in : x0, ids, nullptr);  // the first block's input is x0
      });
    } else {
      x = block(tape, layer, x, x0, ids, cache);
    }
    if (layer == config_.n_layer / 2) middle = x;
  }
  if (cache) cache->length += ids.dim(1);
  if (last_only) {
    x = last_position(x, batch);
    middle = last_position(middle, batch);
  }
  if (modern) x = mix(tape, {}, x, {&backout_lambda_, 0, -1.0}, middle);
  return rms_norm(tape, x);
}

// x = a x + b x0 (modern); x += attention(norm(x)); x += mlp(norm(x)). Works in place on x except for the
// mix.
Var Gpt::block(Tape& tape, int64_t layer, const Var& in, const Var& x0, const Tensor& ids, KvCache* cache) {
  const bool modern = config_.arch == Arch::modern;
  const Block& w = blocks_[static_cast<size_t>(layer)];
  const int64_t batch = ids.dim(0);
  const Var x = modern ? mix(tape, {&resid_lambdas_, layer}, in, {&x0_lambdas_, layer}, x0) : in;

  const Var h = rms_norm(tape, x);
  const Var qkv = linear(tape, h, w.qkv);
  if (w.value_embeds.value.defined()) {
    value_gate(tape, qkv, h, w.value_embeds, w.ve_gate, ids.reshape({ids.numel()}));
  }
  rope_norm(tape, qkv, rope_, batch, config_.n_head + config_.n_kv_head, cache ? cache->length : 0,
            modern ? 1.2 : 1.0);
  linear_add(tape, x, attend(tape, layer, qkv, batch, cache), w.c_proj);

  mlp_add(tape, x, rms_norm(tape, x), w.c_fc, w.mlp_c_proj);
  return x;
}

void Gpt::set_attention(AttentionPath path, const std::string& kernel) {
  const std::vector<std::string> known = backend_.attention_kernels();
  if (kernel != "auto" && std::find(known.begin(), known.end(), kernel) == known.end()) {
    fail("the {} backend has no attention kernel '{}'{}; allowed: auto, {}", backend_.name(), kernel,
         did_you_mean(kernel, known), join(known));
  }
  attention_path_ = path;
  attention_kernel_ = kernel;
  plans_.clear();
}

const AttentionPlanPtr& Gpt::attention_plan(int64_t layer, int64_t batch, int64_t t_len, int64_t offset) {
  const int64_t window = config_.window(layer);
  const std::array<int64_t, 4> key = {batch, t_len, offset, window};
  const auto found = plans_.find(key);
  if (found != plans_.end()) return found->second;
  // Decoding asks for new ones all the time. Those that somebody else holds stay: a recorded step may use
  // them.
  constexpr size_t kPlans = 16;
  if (plans_.size() >= kPlans)
    std::erase_if(plans_, [](const auto& entry) { return entry.second.use_count() == 1; });

  AttentionShape shape{.batch = batch,
                       .q_len = t_len,
                       .kv_len = offset + t_len,
                       .n_head = config_.n_head,
                       .n_kv_head = config_.n_kv_head,
                       .head_dim = config_.head_dim()};
  if (offset > 0) shape.q_offsets.assign(static_cast<size_t>(batch), offset);
  AttentionSpec spec;
  spec.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  if (attention_path_ == AttentionPath::sdpa) {
    spec.causal = true;
    spec.window = window;
  } else {
    // A window of w shows i - j <= w: the token itself and w before it.
    const auto [mask, is_new] = window_masks_.try_emplace(window, flex::causal());
    if (is_new && window >= 0) mask->second = flex::causal() && flex::window(window + 1);
    spec.mask = mask->second;
  }
  return plans_[key] = backend_.plan_attention(shape, spec, attention_kernel_);
}

void Gpt::plan_attention(int64_t batch, int64_t t_len) {
  for (int64_t layer = 0; layer < config_.n_layer; ++layer) attention_plan(layer, batch, t_len, 0);
}

std::vector<AttentionPlanPtr> Gpt::attention_plans() const {
  std::vector<AttentionPlanPtr> plans;
  for (const auto& [key, plan] : plans_) plans.push_back(plan);
  return plans;
}

Var Gpt::attend(Tape& tape, int64_t layer, const Var& qkv, int64_t batch, KvCache* cache) {
  const int64_t t_len = qkv->value.dim(0) / batch;
  const AttentionPlanPtr& plan = attention_plan(layer, batch, t_len, cache ? cache->length : 0);
  if (!cache) return attention(tape, qkv, plan);

  const auto& [k, v] = cache->layers[static_cast<size_t>(layer)];
  const int64_t q_width = config_.n_head * config_.head_dim(),
                kv_width = config_.n_kv_head * config_.head_dim();
  const Tensor rows = qkv->value.reshape({batch, t_len, qkv->value.dim(1)});
  const int64_t at = cache->length * kv_width;
  backend_.copy_rows(batch, t_len, kv_width, heads_view(rows, q_width), heads_view(k, at));
  backend_.copy_rows(batch, t_len, kv_width, heads_view(rows, q_width + kv_width), heads_view(v, at));
  return cached_attention(tape, qkv, k, v, plan);
}

Var Gpt::last_position(const Var& x, int64_t batch) const {
  const int64_t t_len = x->value.dim(0) / batch, c = x->value.dim(1);
  const Tensor out = backend_.empty({batch, c}, x->value.dtype());
  backend_.copy_rows(batch, 1, c, heads_view(x->value.reshape({batch, t_len, c}), (t_len - 1) * c),
                     heads_view(out.reshape({batch, 1, c})));
  return Tape::leaf(out);
}

Tensor Gpt::nll(Tape& tape, const Tensor& ids, const Tensor& targets, double weight) {
  check(ids.shape() == targets.shape() && ids.rank() == 2, "ids {} and targets {} must both be (B, T)",
        shape_string(ids.shape()), shape_string(targets.shape()));
  if (targets.arena().host()) check_target_range(targets, config_.vocab_size);
  const Var h = trunk(tape, checked_ids(ids), nullptr, false);
  return linear_cross_entropy(tape, h, lm_head_, backend_.to_device(targets), config_.vocab_size, kSoftcap,
                              weight, loss_options_)
      .nll;
}

LossPlan Gpt::loss_plan(int64_t rows, bool gradients) const {
  return plan_loss(backend_, rows, config_.n_embd, config_.vocab_size, compute_, gradients, kSoftcap,
                   loss_options_);
}

Tensor Gpt::logits(const Tensor& ids, KvCache* cache, bool last_only) {
  if (cache) {
    check(ids.dim(0) == cache->batch, "{} rows of ids for a cache of {} rows", ids.dim(0), cache->batch);
    check(cache->length + ids.dim(1) <= cache->max_len,
          "{} more tokens do not fit a cache of {} that holds {}", ids.dim(1), cache->max_len, cache->length);
  }
  Tape tape(backend_, false);
  const Var h = trunk(tape, checked_ids(ids), cache, last_only);
  const Tensor z = head_logits(tape, h, lm_head_, config_.vocab_size, kSoftcap);
  return z.reshape({ids.dim(0), last_only ? 1 : ids.dim(1), config_.vocab_size});
}

KvCache Gpt::make_cache(int64_t batch, int64_t max_len) const {
  KvCache cache;
  cache.batch = batch;
  cache.max_len = max_len;
  const Shape shape = {batch, max_len, config_.n_kv_head * config_.head_dim()};
  for (int64_t i = 0; i < config_.n_layer; ++i) {
    cache.layers.push_back({backend_.zeros(shape, compute_), backend_.zeros(shape, compute_)});
  }
  return cache;
}

}  // namespace flexchat
