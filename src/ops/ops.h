// The differentiable operations a GPT is made of: each checks shapes, runs the backend's kernel and records
// its backward. N = B*T tokens; activations are (N, C) in the compute dtype.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "grad/tape.h"
#include "ops/loss.h"

namespace flexchat {

// A weight as the ops see it. `compute` is `value` in the compute dtype: the same tensor when the dtypes
// agree, otherwise a copy that the model refreshes after every update.
struct Weight {
  Tensor value;    // master
  Tensor grad;     // master, same shape; ops add to it
  Tensor compute;  // compute dtype
};

// rms_norm(table[ids]): (N, C) from a table (Vp, C).
Var embed_norm(Tape& tape, const Weight& table, const Tensor& ids, DType compute);
Var rms_norm(Tape& tape, const Var& x);
// x (N, in) * W^T (in, out)
Var linear(Tape& tape, const Var& x, const Weight& weight);
// x += h W^T, in place on the residual stream x (N, C).
void linear_add(Tape& tape, const Var& x, const Var& h, const Weight& weight);
// x += relu(h fc^T)^2 proj^T, in place on x (N, C), with fc (hidden, C) and proj (C, hidden). Works through
// chunks of rows whose hidden values stay in cache; backward recomputes relu^2 from what is kept, h fc^T.
void mlp_add(Tape& tape, const Var& x, const Var& h, const Weight& fc, const Weight& proj);

// Rotary embedding, then RMSNorm over D, then `scale`, in place on the first n_heads heads of qkv (N, row).
struct RopeTables {
  Tensor cos, sin;  // (max_len, D/2) master
};
void rope_norm(Tape& tape, const Var& qkv, const RopeTables& tables, int64_t batch, int64_t n_heads,
               int64_t q_offset, double scale);
// v += 3 sigmoid(gate h[:channels]) * table[ids], in place on the last G*D columns of qkv.
void value_gate(Tape& tape, const Var& qkv, const Var& h, const Weight& table, const Weight& gate,
                const Tensor& ids);

// ---- attention: what it computes is the plan's (Backend::plan_attention, flex/attention.h) ----------------

using AttentionPlanPtr = std::shared_ptr<const AttentionPlan>;

// Self-attention over qkv (N, (H + 2G) * D), whose rows are the tokens of the batch; the plan's kv_len is its
// q_len. Returns (N, H*D). Its backward writes the gradient of qkv, so nothing else may read qkv.
Var attention(Tape& tape, const Var& qkv, const AttentionPlanPtr& plan);

// Attention of q, the first H heads of qkv (B*Tq, row), over a cache k, v (B, max_len, G*D), or over pools of
// pages (pages, page_size, G*D) with a block table (B, pages of a row) i32 when the plan has pages; inference
// only. Returns (B*Tq, H*D). Errors: keys beyond the cache, a page that is not in the pool.
Var cached_attention(Tape& tape, const Var& qkv, const Tensor& k, const Tensor& v,
                     const AttentionPlanPtr& plan, const Tensor* block_table = nullptr);

// Attention of q (B*Tq, H*D) over k and v (B*Tkv, G*D), differentiable in each, and in captured tensors of
// the score mod: `captures` names differentiable ones, as variables that hold the very tensor the plan is
// bound to (master). out (B*Tq, H*D); lse (B, H, Tq) master when `with_lse`, -inf for queries that see
// nothing.
struct AttentionOutput {
  Var out, lse;
};
using AttentionCaptures = std::vector<std::pair<std::string, Var>>;
AttentionOutput attention(Tape& tape, const Var& q, const Var& k, const Var& v, const AttentionPlanPtr& plan,
                          const AttentionCaptures& captures = {}, bool with_lse = false);

// A learned scalar: element `index` of a weight times `factor`, or the constant `factor` without a weight.
struct Scalar {
  const Weight* weight = nullptr;
  int64_t index = 0;
  double factor = 1.0;
};
// a*x + b*y
Var mix(Tape& tape, Scalar a, const Var& x, Scalar b, const Var& y);
// e_t + lambda sigmoid(gate e_t[:channels]) e_{t-1}; see Backend::smear for `previous`.
Var smear(Tape& tape, const Var& e, int64_t batch, const Tensor* previous, const Weight& gate,
          const Weight& lambda);

// softcap(h W[:vocab]^T), f32 (N, vocab). Inference only.
Tensor head_logits(Tape& tape, const Var& h, const Weight& head, int64_t vocab, double cap);
// Negative log-likelihood of each token and what else the options ask for; targets < 0 are ignored: they
// count as 0, and a batch of them alone gets zero gradients and one warning (where the host can read them).
// When recording, the gradient of weight * sum(nll) is formed in the same pass and that of the head added to
// head.grad; backward only hands dh on. In bf16 and f16 logits and their sums are f32, the gradient of each
// logit is rounded to the compute dtype. The last form follows a given plan.
LossResult linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                                int64_t vocab, double cap, double weight, const LossOptions& options);
Tensor linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                            int64_t vocab, double cap, double weight);
LossResult linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                                int64_t vocab, double cap, double weight, const LossOptions& options,
                                LossPlan plan);
// For those who know the targets before they go to a device: says once that there is nothing to learn.
void warn_without_targets();

}  // namespace flexchat
