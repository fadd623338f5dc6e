// The differentiable operations a GPT is made of: each checks shapes, runs the backend's kernel and records
// its backward. N = B*T tokens; activations are (N, C) in the compute dtype.
#pragma once

#include "backend/backend.h"
#include "grad/tape.h"

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
// Self-attention over qkv (N, (H + 2G) * D); shape.kv_len == shape.q_len. Returns (N, H*D).
Var attention(Tape& tape, const Var& qkv, const AttentionShape& shape);
// Attention of q, the first H heads of qkv (N, row), over a cache k, v (B, max_len, G*D); inference only.
Var cached_attention(Tape& tape, const Var& qkv, const Tensor& k, const Tensor& v,
                     const AttentionShape& shape);

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
// Negative log-likelihood of each token, (N) master; targets < 0 count as 0. When recording, the gradient of
// weight * sum(nll) is formed in the same pass, chunk of rows by chunk of rows, so that logits never exist
// whole; backward only hands it on.
Tensor linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                            int64_t vocab, double cap, double weight);

}  // namespace flexchat
