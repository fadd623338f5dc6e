#include "grad/tape.h"

namespace flexchat {

void Tape::backward() {
  while (!steps_.empty()) {
    const auto step = std::move(steps_.back());
    steps_.pop_back();
    step();
  }
}

Var Tape::checkpoint(const Var& x, const Segment& segment) {
  Tape forward(backend_, false);
  const Var out = leaf(segment(forward, leaf(backend_.clone(x->value)))->value);
  record([this, x, out, segment] {
    const Var again = leaf(backend_.clone(x->value));
    Tape tape(backend_, true);
    segment(tape, again)->grad = out->grad;
    out->grad = {};
    tape.backward();
    if (x->grad.defined()) {
      backend_.axpby(1, again->grad, 1, x->grad);
    } else {
      x->grad = again->grad;
    }
  });
  return out;
}

const Tensor& grad_of(Backend& backend, const Var& v, bool* accumulate) {
  *accumulate = v->grad.defined();
  if (!*accumulate) v->grad = backend.empty(v->value.shape(), v->value.dtype());
  return v->grad;
}

}  // namespace flexchat
