#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

Coefficient coefficient(const Scalar& s) {
  return {s.weight ? &s.weight->value : nullptr, s.index, s.factor};
}

}  // namespace

Var mix(Tape& tape, Scalar a, const Var& x, Scalar b, const Var& y) {
  if (x->value.shape() != y->value.shape()) {
    fail("mix: {} and {} differ", shape_string(x->value.shape()), shape_string(y->value.shape()));
  }
  Backend& backend = tape.backend();
  const Var out = Tape::leaf(backend.empty(x->value.shape(), x->value.dtype()));
  backend.mix(coefficient(a), x->value, coefficient(b), y->value, out->value);
  if (!tape.recording()) return out;
  tape.record([&backend, a, b, x, y, out] {
    bool accumulate_dx = false, accumulate_dy = false;
    const Tensor& dx = grad_of(backend, x, &accumulate_dx);
    const Tensor& dy = grad_of(backend, y, &accumulate_dy);  // x and y may be the same: then it adds
    backend.mix_backward(out->grad, coefficient(a), x->value, coefficient(b), y->value, accumulate_dx, dx,
                         accumulate_dy, dy, a.weight ? &a.weight->grad : nullptr,
                         b.weight ? &b.weight->grad : nullptr);
  });
  return out;
}

Var smear(Tape& tape, const Var& e, int64_t batch, const Tensor* previous, const Weight& gate,
          const Weight& lambda) {
  Backend& backend = tape.backend();
  const int64_t n = e->value.dim(0), c = e->value.dim(1);
  check(c >= gate.value.dim(1), "smear reads {} channels of {}", gate.value.dim(1), c);
  const Shape shape = {batch, n / batch, c};
  const Var out = Tape::leaf(backend.empty(e->value.shape(), e->value.dtype()));
  const Tensor sigmoid = backend.empty({batch, n / batch}, backend.master_dtype());
  backend.smear(e->value.reshape(shape), previous, gate.value, lambda.value, out->value.reshape(shape),
                sigmoid);
  if (!tape.recording()) return out;
  tape.record([&backend, e, out, shape, sigmoid, &gate, &lambda] {
    check(!e->grad.defined(), "smear must be the only reader of its input");
    e->grad = backend.empty(e->value.shape(), e->value.dtype());
    backend.smear_backward(out->grad.reshape(shape), e->value.reshape(shape), gate.value, lambda.value,
                           sigmoid, e->grad.reshape(shape), gate.grad, lambda.grad);
  });
  return out;
}

void value_gate(Tape& tape, const Var& qkv, const Var& h, const Weight& table, const Weight& gate,
                const Tensor& ids) {
  check(h->value.dim(1) >= gate.value.dim(1), "value_gate reads {} channels of {}", gate.value.dim(1),
        h->value.dim(1));
  Backend& backend = tape.backend();
  const Tensor g = backend.empty({ids.numel(), gate.value.dim(0)}, backend.master_dtype());
  backend.value_gate(table.value, ids, h->value, gate.value, qkv->value, g);
  if (!tape.recording()) return;
  tape.record([&backend, qkv, h, &table, &gate, ids, g] {
    bool accumulate = false;
    const Tensor& dh = grad_of(backend, h, &accumulate);
    if (!accumulate) backend.fill(dh, 0);
    backend.value_gate_backward(qkv->grad, table.value, ids, h->value, gate.value, g, table.grad, gate.grad,
                                dh);
  });
}

}  // namespace flexchat
