#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {

Var embed_norm(Tape& tape, const Weight& table, const Tensor& ids, DType compute) {
  Backend& backend = tape.backend();
  const int64_t n = ids.numel();
  const Var y = Tape::leaf(backend.empty({n, table.value.dim(1)}, compute));
  const Tensor rstd = backend.empty({n}, backend.master_dtype());
  backend.embed_norm(table.value, ids, y->value, rstd);
  // y itself is not kept: the residual stream works on it in place.
  if (!tape.recording()) return y;
  tape.record([&backend, y, &table, ids, rstd] {
    backend.embed_norm_backward(y->grad, table.value, ids, rstd, table.grad);
  });
  return y;
}

Var rms_norm(Tape& tape, const Var& x) {
  Backend& backend = tape.backend();
  const Var y = Tape::leaf(backend.empty(x->value.shape(), x->value.dtype()));
  const Tensor rstd = backend.empty({x->value.dim(0)}, backend.master_dtype());
  backend.rms_norm(x->value, y->value, rstd);
  if (!tape.recording()) return y;
  tape.record([&backend, x, y, rstd] {
    bool accumulate = false;
    const Tensor& dx = grad_of(backend, x, &accumulate);
    backend.rms_norm_backward(y->grad, y->value, rstd, accumulate, dx);
  });
  return y;
}

void rope_norm(Tape& tape, const Var& qkv, const RopeTables& tables, int64_t batch, int64_t n_heads,
               int64_t q_offset, double scale) {
  Backend& backend = tape.backend();
  const int64_t n = qkv->value.dim(0), row = qkv->value.dim(1), t_len = n / batch;
  check(q_offset + t_len <= tables.cos.dim(0), "position {} is beyond the rotary table of {} positions",
        q_offset + t_len - 1, tables.cos.dim(0));
  const Tensor rstd = backend.empty({n, n_heads}, backend.master_dtype());
  const Shape shape = {batch, t_len, row};
  backend.rope_norm(qkv->value.reshape(shape), tables.cos, tables.sin, n_heads, q_offset, scale, rstd);
  if (!tape.recording()) return;
  tape.record([&backend, qkv, &tables, shape, n_heads, q_offset, scale, rstd] {
    backend.rope_norm_backward(qkv->value.reshape(shape), tables.cos, tables.sin, n_heads, q_offset, scale,
                               rstd, qkv->grad.reshape(shape));
  });
}

}  // namespace flexchat
