#include <algorithm>

#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

void check_product(const Tensor& x, const Weight& weight) {
  if (x.rank() == 2 && weight.value.rank() == 2 && x.dim(1) == weight.value.dim(1)) return;
  fail("linear: input {} does not fit weight {} (out, in)", shape_string(x.shape()),
       shape_string(weight.value.shape()));
}

// The residual stream x that a product of h's rows with `weight` is added to.
void check_residual(const Tensor& x, const Tensor& h, const Weight& weight) {
  if (x.dim(0) == h.dim(0) && x.dim(1) == weight.value.dim(0)) return;
  fail("linear: ({}, {}) cannot be added to {}", h.dim(0), weight.value.dim(0), shape_string(x.shape()));
}

// Given dy (N, out): dW += dy^T h, or = in a fresh pass, and dh [+]= dy W.
void linear_backward(Backend& backend, const Tensor& dy, const Tensor& h, const Weight& weight, bool fresh,
                     bool accumulate, const Tensor& dh) {
  backend.matmul(dy, Trans::yes, h, Trans::no, fresh ? 0 : 1, weight.grad);
  backend.matmul(dy, Trans::no, weight.compute, Trans::no, accumulate ? 1 : 0, dh);
}

}  // namespace

Var linear(Tape& tape, const Var& x, const Weight& weight) {
  check_product(x->value, weight);
  Backend& backend = tape.backend();
  const Var y = Tape::leaf(backend.empty({x->value.dim(0), weight.value.dim(0)}, x->value.dtype()));
  backend.matmul(x->value, Trans::no, weight.compute, Trans::yes, 0, y->value);
  if (!tape.recording()) return y;
  tape.record([&backend, x, y, &weight, fresh = tape.fresh()] {
    bool accumulate = false;
    const Tensor& dx = grad_of(backend, x, &accumulate);
    linear_backward(backend, y->grad, x->value, weight, fresh, accumulate, dx);
  });
  return y;
}

void linear_add(Tape& tape, const Var& x, const Var& h, const Weight& weight) {
  check_product(h->value, weight);
  check_residual(x->value, h->value, weight);
  Backend& backend = tape.backend();
  backend.matmul(h->value, Trans::no, weight.compute, Trans::yes, 1, x->value);
  if (!tape.recording()) return;
  tape.record([&backend, x, h, &weight, fresh = tape.fresh()] {
    bool accumulate = false;
    const Tensor& dh = grad_of(backend, h, &accumulate);
    linear_backward(backend, x->grad, h->value, weight, fresh, accumulate, dh);
  });
}

void mlp_add(Tape& tape, const Var& x, const Var& h, const Weight& fc, const Weight& proj) {
  check_product(h->value, fc);
  check(proj.value.dim(1) == fc.value.dim(0), "mlp: proj {} does not fit fc {}",
        shape_string(proj.value.shape()), shape_string(fc.value.shape()));
  check_residual(x->value, h->value, proj);
  Backend& backend = tape.backend();
  const int64_t n = h->value.dim(0), hidden = fc.value.dim(0), chunk = backend.chunk_rows();
  const DType dtype = h->value.dtype();
  Tensor u;  // (N, hidden), kept for backward
  if (tape.recording()) u = backend.empty({n, hidden}, dtype);
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t rows = std::min(chunk, n - begin);
    const Tensor a = backend.empty({rows, hidden}, dtype), uc = tape.recording() ? u.rows(begin, rows) : a;
    backend.matmul(h->value.rows(begin, rows), Trans::no, fc.compute, Trans::yes, 0, uc);
    backend.relu_squared(uc, a);
    backend.matmul(a, Trans::no, proj.compute, Trans::yes, 1, x->value.rows(begin, rows));
  }
  if (!tape.recording()) return;
  tape.record([&backend, x, h, u, chunk, &fc, &proj, fresh_pass = tape.fresh()] {
    bool accumulate = false;
    const Tensor& dh = grad_of(backend, h, &accumulate);
    const int64_t n_rows = u.dim(0);
    for (int64_t begin = 0; begin < n_rows; begin += chunk) {
      const int64_t rows = std::min(chunk, n_rows - begin);
      const bool fresh = fresh_pass && begin == 0;
      const Tensor dx = x->grad.rows(begin, rows), uc = u.rows(begin, rows);
      const Tensor du = backend.empty(uc.shape(), uc.dtype());
      backend.matmul(dx, Trans::no, proj.compute, Trans::no, 0, du);
      backend.relu_squared_backward(uc, du);  // uc now holds relu(uc)^2
      backend.matmul(dx, Trans::yes, uc, Trans::no, fresh ? 0 : 1, proj.grad);
      linear_backward(backend, du, h->value.rows(begin, rows), fc, fresh, accumulate, dh.rows(begin, rows));
    }
  });
}

}  // namespace flexchat
