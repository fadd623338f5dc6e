#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

void check_product(const Tensor& x, const Weight& weight) {
  check(x.rank() == 2 && weight.value.rank() == 2 && x.dim(1) == weight.value.dim(1),
        "linear: input {} does not fit weight {} (out, in)", shape_string(x.shape()),
        shape_string(weight.value.shape()));
}

// Given dy (N, out): dW += dy^T h, and dh [+]= dy W.
void linear_backward(Backend& backend, const Tensor& dy, const Tensor& h, const Weight& weight,
                     bool accumulate, const Tensor& dh) {
  backend.matmul(dy, Trans::yes, h, Trans::no, 1, weight.grad);
  backend.matmul(dy, Trans::no, weight.compute, Trans::no, accumulate ? 1 : 0, dh);
}

}  // namespace

Var linear(Tape& tape, const Var& x, const Weight& weight) {
  check_product(x->value, weight);
  Backend& backend = tape.backend();
  const Var y = Tape::leaf(backend.empty({x->value.dim(0), weight.value.dim(0)}, x->value.dtype()));
  backend.matmul(x->value, Trans::no, weight.compute, Trans::yes, 0, y->value);
  tape.record([&backend, x, y, &weight] {
    bool accumulate = false;
    const Tensor& dx = grad_of(backend, x, &accumulate);
    linear_backward(backend, y->grad, x->value, weight, accumulate, dx);
  });
  return y;
}

void linear_add(Tape& tape, const Var& x, const Var& h, const Weight& weight) {
  check_product(h->value, weight);
  Backend& backend = tape.backend();
  backend.matmul(h->value, Trans::no, weight.compute, Trans::yes, 1, x->value);
  tape.record([&backend, x, h, &weight] {
    bool accumulate = false;
    const Tensor& dh = grad_of(backend, h, &accumulate);
    linear_backward(backend, x->grad, h->value, weight, accumulate, dh);
  });
}

void relu_squared_linear_add(Tape& tape, const Var& x, const Var& u, const Weight& weight) {
  check_product(u->value, weight);
  Backend& backend = tape.backend();
  {
    const Tensor a = backend.empty(u->value.shape(), u->value.dtype());
    backend.relu_squared(u->value, a);
    backend.matmul(a, Trans::no, weight.compute, Trans::yes, 1, x->value);
  }
  tape.record([&backend, x, u, &weight] {
    const Tensor du = backend.empty(u->value.shape(), u->value.dtype());
    backend.matmul(x->grad, Trans::no, weight.compute, Trans::no, 0, du);
    backend.relu_squared_backward(u->value, du);  // u now holds relu(u)^2
    backend.matmul(x->grad, Trans::yes, u->value, Trans::no, 1, weight.grad);
    check(!u->grad.defined(), "relu_squared_linear_add must be the only reader of its input");
    u->grad = du;
  });
}

}  // namespace flexchat
