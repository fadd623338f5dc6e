#include "grad/tape.h"

#include "base/error.h"

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
  if (!recording_) return out;
  record([this, x, out, segment] {
    const Var again = leaf(backend_.clone(x->value));
    Tape tape(backend_, true);
    tape.set_fresh(fresh_);
    const Var end = segment(tape, again);
    check(end != again || !x->grad.defined(),
          "a checkpointed segment cannot work in place on what others read");
    again->grad = x->grad;  // what others added so far: sums must round as they do without checkpointing
    end->grad = out->grad;
    out->grad = {};
    tape.backward();
    x->grad = again->grad;
  });
  return out;
}

const Tensor& grad_of(Backend& backend, const Var& v, bool* accumulate) {
  *accumulate = v->grad.defined();
  if (!*accumulate) v->grad = backend.empty(v->value.shape(), v->value.dtype());
  return v->grad;
}

}  // namespace flexchat
