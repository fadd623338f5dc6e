#include <array>

#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

void check_shape(const AttentionShape& s, const Tensor& qkv) {
  check(s.n_head > 0 && s.n_kv_head > 0 && s.n_head % s.n_kv_head == 0,
        "attention: {} key heads do not divide {} query heads", s.n_kv_head, s.n_head);
  if (qkv.dim(0) != s.batch * s.q_len || qkv.dim(1) != (s.n_head + 2 * s.n_kv_head) * s.head_dim) {
    fail("attention: qkv {} is not (B*T, (H+2G)*D) = ({}, {})", shape_string(qkv.shape()), s.batch * s.q_len,
         (s.n_head + 2 * s.n_kv_head) * s.head_dim);
  }
}

}  // namespace

Var attention(Tape& tape, const Var& qkv, const AttentionShape& s) {
  check_shape(s, qkv->value);
  check(s.q_len == s.kv_len, "attention: {} queries over {} keys need a cache", s.q_len, s.kv_len);
  Backend& backend = tape.backend();
  const int64_t row = qkv->value.dim(1), q_width = s.n_head * s.head_dim, kv_width = s.n_kv_head * s.head_dim;
  const auto views = [s, row, q_width, kv_width](const Tensor& x) {
    const Tensor t = x.reshape({s.batch, s.q_len, row});
    return std::array{heads_view(t), heads_view(t, q_width), heads_view(t, q_width + kv_width)};
  };
  const auto out_view = [s, q_width](const Tensor& x) {
    return heads_view(x.reshape({s.batch, s.q_len, q_width}));
  };
  const Var out = Tape::leaf(backend.empty({s.batch * s.q_len, q_width}, qkv->value.dtype()));
  const Tensor lse =
      tape.recording() ? backend.empty({s.batch, s.n_head, s.q_len}, backend.master_dtype()) : Tensor();
  const auto [q, k, v] = views(qkv->value);
  backend.attention(s, q, k, v, out_view(out->value), tape.recording() ? &lse : nullptr);
  if (!tape.recording()) return out;
  tape.record([&backend, s, qkv, out, lse, views, out_view] {
    check(!qkv->grad.defined(), "attention must be the only reader of qkv");
    qkv->grad = backend.empty(qkv->value.shape(), qkv->value.dtype());
    const auto [qv, kv, vv] = views(qkv->value);
    const auto [dq, dk, dv] = views(qkv->grad);
    backend.attention_backward(s, qv, kv, vv, out_view(out->value), out_view(out->grad), lse, dq, dk, dv);
  });
  return out;
}

Var cached_attention(Tape& tape, const Var& qkv, const Tensor& k, const Tensor& v, const AttentionShape& s) {
  check_shape(s, qkv->value);
  check(!tape.recording(), "attention over a cache has no backward");
  check(s.kv_len <= k.dim(1), "attention: {} keys do not fit a cache of {}", s.kv_len, k.dim(1));
  Backend& backend = tape.backend();
  const int64_t q_width = s.n_head * s.head_dim;
  const Var out = Tape::leaf(backend.empty({s.batch * s.q_len, q_width}, qkv->value.dtype()));
  backend.attention(s, heads_view(qkv->value.reshape({s.batch, s.q_len, qkv->value.dim(1)})), heads_view(k),
                    heads_view(v), heads_view(out->value.reshape({s.batch, s.q_len, q_width})), nullptr);
  return out;
}

}  // namespace flexchat
