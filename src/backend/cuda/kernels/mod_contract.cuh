// What an emitted Mod section must define, shown by a hand-written example. Attention kernels are this text:
//
//   #define ATTENTION_DTYPE 1        0 f32, 1 bf16, 2 f16
//   #define ATTENTION_HEAD_DIM 128
//   #define ATTENTION_PAGED 0        1: keys and values live in pages (forward and decode)
//   #define ATTENTION_DROPOUT 0      1: weights are dropped
//   #include "attention_params.cuh"  AttentionParams
//   #include "mod_math.cuh"          ModContext, capture reads, the language's functions
//   ... the Mod section ...
//   #include "attention_forward.cuh" or another pass
//
// Everything in a section is in namespace flexchat::cuda and __device__ __forceinline__. A value is computed
// where it changes: in `mod_head` when it depends on b, h, n_q, n_kv only; in `mod_q` when on q too; in
// `mod_kv` when on kv too; otherwise per element. Kernels call mod_head once, mod_q once a row, mod_kv once a
// column of a tile, so loads and logarithms of captured vectors cost nothing per element. Hoist at least
// every capture read and every operation dearer than an addition.
//
// q and kv are logical positions (q counts from the row's offset). Kernels only pass positions inside the
// row: offset <= q < offset + n_q, 0 <= kv < n_kv; spec.check() has made sure that no index leaves its tensor
// there. Comparisons and boolean results are C++ bool; integers are int; numbers are float. Capture i is the
// i-th of the section's own numbering; the host fills p.captures in that order. So it does p.numbers and
// p.integers, the constants of the mod, which a section reads from there; the example spells them out, to be
// read.
//
// Integers become floats on the unit that also does exp and log, at a quarter of the rate: where an integer
// expression is linear in q and kv and is used as a number, hoist static_cast<float>(q) and
// static_cast<float>(kv) and combine those (exact below 2^24).
//
// A section defines all of these, whatever the mod (an empty struct and an unused function cost nothing):
//   MOD_HAS_MASK, MOD_HAS_SCORE    0 or 1
//   MOD_IS_DEAR                    0 or 1: does a score take three or more functions (exp, log, a division;
//                                  sigmoid and tanh are two; softplus, pow, // and % four)? Tiles are then
//                                  others (tiles.cuh)
//   MOD_N_CAPTURE_GRADS            number of accesses of differentiable captured tensors
//   MOD_CAPTURE_GRAD_KINDS         one character for each access, as a string: what its index depends on
//       'k'  kv and not q   'q'  q and not kv, or neither   'a'  both
//     The backward sums an access of kind k over queries, of kind q over keys, in a fixed order, and then
//     adds what falls on one element (mod_capture_index) in fixed point, where order does not matter.
//   struct ModHead, ModQ, ModKv
//   ModHead mod_head(const ModContext& c)
//   ModQ  mod_q (const ModContext& c, const ModHead& mh, int q)
//   ModKv mod_kv(const ModContext& c, const ModHead& mh, int kv)
//   bool  mod_mask (c, mh, const ModQ& mq, const ModKv& mk, int q, int kv)
//   float mod_score(c, mh, mq, mk, float score, int q, int kv)
//   float mod_score_base2(c, mh, mq, mk, score, score2, q, kv)     mod_score * log2(e), score2 being score *
//       log2(e): for bf16 and f16 only, where exp and log are the hardware's, which has them in base 2
//   float mod_score_grad(c, mh, mq, mk, float score, int q, int kv)             d mod_score / d score
//   float mod_capture_grad(int i, c, mh, mq, mk, float score, int q, int kv)    d mod_score / d access i
//   long long mod_capture_index(int i, const ModContext& c, int q, int kv)     flat element of access i;
//       an access of kind 'k' ignores q, one of kind 'q' ignores kv
// `i` is a compile-time constant after unrolling: write mod_capture_grad as `if (i == 0) return ...;`.
// `score` is scale * q.k in natural units; kernels work in base 2 themselves.
//
// The example: score + log(kf[b,h,kv] * sigmoid(score) * amp[b,h,kv] / c + eps) - s*abs(q - kv)/n_kv with
// c = 0.5, eps = 1e-6, s = 0.1, kf and amp differentiable; mask kv <= q || kv < prefix[b].
#pragma once
#include "attention_params.cuh"
#include "mod_math.cuh"

namespace flexchat::cuda {

#define MOD_HAS_MASK 1
#define MOD_HAS_SCORE 1
#define MOD_IS_DEAR 1
#define MOD_N_CAPTURE_GRADS 2
#define MOD_CAPTURE_GRAD_KINDS "kk"

struct ModHead {
  int v0;    // prefix[b]
  float v1;  // s / n_kv
  float b1;  // the same times log2(e)
};
struct ModQ {
  float v6;  // q
};
struct ModKv {
  float v2, v3;  // kf[b,h,kv], amp[b,h,kv]
  float v4;      // kf*amp/c, the reassociated product
  float v5;      // kv
};

MOD_DEVICE ModHead mod_head(const ModContext& c) {
  const float v1 = 0.1f / static_cast<float>(c.n_kv);
  return {capture_integer(c.p.captures[2], c.b), v1, v1 * kModLog2e};
}
MOD_DEVICE ModQ mod_q(const ModContext&, const ModHead&, int q) { return {static_cast<float>(q)}; }
MOD_DEVICE ModKv mod_kv(const ModContext& c, const ModHead&, int kv) {
  const float kf = capture_number(c.p.captures[0], c.b, c.h, kv);
  const float amp = capture_number(c.p.captures[1], c.b, c.h, kv);
  return {kf, amp, kf * amp * 2.0f, static_cast<float>(kv)};
}
MOD_DEVICE bool mod_mask(const ModContext&, const ModHead& mh, const ModQ&, const ModKv&, int q, int kv) {
  return kv <= q || kv < mh.v0;
}
MOD_DEVICE float mod_score(const ModContext&, const ModHead& mh, const ModQ& mq, const ModKv& mk, float score,
                           int, int) {
  return score + mod_log(mk.v4 * mod_sigmoid(score) + 1e-6f) - mod_abs(mq.v6 - mk.v5) * mh.v1;
}
MOD_DEVICE float mod_score_base2(const ModContext&, const ModHead& mh, const ModQ& mq, const ModKv& mk, float,
                                 float score2, int, int) {
  return score2 + mod_log2(mk.v4 * mod_sigmoid_base2(score2) + 1e-6f) - mod_abs(mq.v6 - mk.v5) * mh.b1;
}
MOD_DEVICE float mod_score_grad(const ModContext&, const ModHead&, const ModQ&, const ModKv& mk, float score,
                                int, int) {
  const float s = mod_sigmoid(score);
  return 1.0f + mod_div(mk.v4 * s * (1.0f - s), mk.v4 * s + 1e-6f);
}
MOD_DEVICE float mod_capture_grad(int i, const ModContext&, const ModHead&, const ModQ&, const ModKv& mk,
                                  float score, int, int) {
  const float s = mod_sigmoid(score), d = mk.v4 * s + 1e-6f;
  if (i == 0) return mod_div(mk.v3 * s * 2.0f, d);
  return mod_div(mk.v2 * s * 2.0f, d);
}
MOD_DEVICE long long mod_capture_index(int i, const ModContext& c, int, int kv) {
  return capture_index(c.p.captures[i], c.b, c.h, kv);
}

}  // namespace flexchat::cuda
