// The output head and its loss. Temporary memory is allocated before the first product, but for what comes
// and goes with every chunk, in the same order every time, so that a step that repeats repeats its addresses.
#include <algorithm>
#include <atomic>

#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

// The first rows * columns elements of a flat buffer as a matrix.
Tensor matrix(const Tensor& buffer, int64_t rows, int64_t columns) {
  return buffer.rows(0, rows * columns).reshape({rows, columns});
}

// One loss: what all ways to compute it share, and the ways, each for rows [begin, begin + count).
class Head {
 public:
  Head(Backend& backend, const Tensor& x, const Weight& head, const Tensor& targets, int64_t vocab,
       double cap, double weight, bool gradients, bool fresh, LossResult& result)
      : backend_(backend),
        x_(x),
        w_(head.compute.rows(0, vocab)),
        targets_(targets),
        vocab_(vocab),
        cap_(cap),
        weight_(weight),
        gradients_(gradients),
        fresh_(fresh),
        result_(result) {
    if (!gradients) return;
    dw_ = head.grad.rows(0, vocab);
    dh_ = backend.empty(x.shape(), x.dtype());
  }
  const Tensor& dh() const { return dh_; }

  void run(const LossOptions& options) {
    const LossPlan& plan = result_.plan;
    const DType master = backend_.master_dtype(), act = x_.dtype();
    const int64_t c = x_.dim(1), panel = plan.rows * plan.columns;
    if (!plan.fused) logits_ = backend_.empty({panel}, master);
    if (plan.one_pass) {
      grad_ = backend_.empty({plan.rows * vocab_}, act);
      factor_ = backend_.empty({plan.rows}, master);
    } else if (gradients_) {
      grad_ = act == master && !plan.fused ? logits_ : backend_.empty({panel}, act);
    }
    const bool in_panels = plan.one_pass || plan.backend == LossBackend::cce;
    if (gradients_ && plan.backend == LossBackend::cce && act != master) {
      dh_master_ = backend_.empty({plan.rows * c}, master);
    }
    if (in_panels || options.lse || options.argmax) make_rows(options);
    for (int64_t begin = 0; begin < x_.dim(0); begin += plan.rows) {
      const int64_t count = std::min(plan.rows, x_.dim(0) - begin);
      if (plan.one_pass) {
        one_pass(begin, count);
      } else if (plan.backend == LossBackend::cce) {
        panels(begin, count, options.filter);
      } else {
        whole_rows(begin, count);
      }
    }
  }

 private:
  void make_rows(const LossOptions& options) {
    const int64_t rows = result_.plan.rows;
    const DType master = backend_.master_dtype();
    state_.shift = backend_.empty({rows}, master);
    state_.sum = backend_.empty({rows}, master);
    state_.target = backend_.empty({rows}, master);
    if (!options.lse) lse_ = backend_.empty({rows}, master);
    if (options.argmax) state_.best = backend_.empty({rows}, master);
  }
  SoftmaxRows rows_of(int64_t begin, int64_t count) const {
    SoftmaxRows rows{state_.shift.rows(0, count), state_.sum.rows(0, count), state_.target.rows(0, count),
                     Tensor(), Tensor()};
    if (!result_.argmax.defined()) return rows;
    rows.best = state_.best.rows(0, count);
    rows.argmax = result_.argmax.rows(begin, count);
    return rows;
  }
  Tensor lse_of(int64_t begin, int64_t count) const {
    return result_.lse.defined() ? result_.lse.rows(begin, count) : lse_.rows(0, count);
  }
  // The share of the head's gradient so far that rows from `begin` on add theirs to: 1, or 0 for the first of
  // a fresh pass.
  double adds(int64_t begin) const { return fresh_ && begin == 0 ? 0 : 1; }
  // The logits of `count` rows and columns [first, first + columns).
  Tensor logits_of(int64_t begin, int64_t count, int64_t first, int64_t columns) const {
    const Tensor z = matrix(logits_, count, columns);
    backend_.matmul(x_.rows(begin, count), Trans::no, w_.rows(first, columns), Trans::yes, 0, z);
    return z;
  }

  void whole_rows(int64_t begin, int64_t count) {
    const Tensor z = logits_of(begin, count, 0, vocab_), t = targets_.rows(begin, count),
                 nll = result_.nll.rows(begin, count);
    const Tensor grad = gradients_ ? matrix(grad_, count, vocab_) : Tensor();
    if (state_.sum.defined()) {
      const SoftmaxRows rows = rows_of(begin, count);
      const Tensor lse = lse_of(begin, count);
      backend_.softmax_panel(z, t, 0, cap_, rows, nullptr);
      backend_.softmax_nll(rows, t, lse, nll);
      if (gradients_) backend_.softmax_gradient(z, t, 0, cap_, weight_, lse, 0, grad);
    } else {
      backend_.cross_entropy(z, t, cap_, weight_, nll, gradients_ ? &grad : nullptr);
    }
    if (!gradients_) return;
    backend_.matmul(grad, Trans::no, w_, Trans::no, 0, dh_.rows(begin, count));
    backend_.matmul(grad, Trans::yes, x_.rows(begin, count), Trans::no, adds(begin), dw_);
  }

  // With g the unscaled gradient and f the factor of a row, diag(f) g is the gradient of the logits: the
  // factor goes to the result of one product, diag(f) (g W), and to an operand of the other, g^T (diag(f) x).
  void one_pass(int64_t begin, int64_t count) {
    const Tensor x = x_.rows(begin, count), t = targets_.rows(begin, count), g = matrix(grad_, count, vocab_),
                 lse = lse_of(begin, count), factor = factor_.rows(0, count);
    const SoftmaxRows rows = rows_of(begin, count);
    if (result_.plan.fused) {
      backend_.linear_softmax(x, w_, t, cap_, rows, &g);
    } else {
      for (int64_t first = 0; first < vocab_; first += result_.plan.columns) {
        const int64_t columns = std::min(result_.plan.columns, vocab_ - first);
        backend_.softmax_panel(logits_of(begin, count, first, columns), t, first, cap_, rows, &g);
      }
    }
    backend_.softmax_nll(rows, t, lse, result_.nll.rows(begin, count));
    backend_.softmax_factor(rows, lse, t, cap_, weight_, g, factor);
    // The rows scaled wait in the result, which comes last.
    const Tensor dh = backend_.empty({count, x_.dim(1)}, backend_.master_dtype()),
                 out = dh_.rows(begin, count);
    backend_.row_scale(x, factor, out);
    backend_.matmul(g, Trans::yes, out, Trans::no, adds(begin), dw_);
    backend_.matmul(g, Trans::no, w_, Trans::no, 0, dh);
    backend_.row_scale(dh, factor, out);
  }

  // Two passes over the panels; the second goes backwards, so that its first logits are still there.
  void panels(int64_t begin, int64_t count, double filter) {
    const int64_t width = result_.plan.columns, last = (vocab_ - 1) / width * width;
    const Tensor t = targets_.rows(begin, count), lse = lse_of(begin, count);
    const SoftmaxRows rows = rows_of(begin, count);
    const bool fused = result_.plan.fused;
    const Tensor x = x_.rows(begin, count);
    Tensor z;
    if (fused) {
      backend_.linear_softmax(x, w_, t, cap_, rows, nullptr);
    } else {
      for (int64_t first = 0; first <= last; first += width) {
        z = logits_of(begin, count, first, std::min(width, vocab_ - first));
        backend_.softmax_panel(z, t, first, cap_, rows, nullptr);
      }
    }
    backend_.softmax_nll(rows, t, lse, result_.nll.rows(begin, count));
    if (!gradients_) return;
    const Tensor out = dh_.rows(begin, count),
                 dh = dh_master_.defined() ? matrix(dh_master_, count, x_.dim(1)) : out;
    bool any = false;
    for (int64_t first = last; first >= 0; first -= width) {
      const int64_t columns = std::min(width, vocab_ - first);
      const Tensor grad = matrix(grad_, count, columns), w = w_.rows(first, columns);
      ++result_.panels;
      if (fused) {
        backend_.linear_softmax_gradient(x, w, t, first, cap_, weight_, lse, grad);
      } else if (first != last) {
        z = logits_of(begin, count, first, columns);
      }
      if (!fused && !backend_.softmax_gradient(z, t, first, cap_, weight_, lse, filter, grad)) {
        ++result_.skipped;
        if (adds(begin) == 0) backend_.fill(dw_.rows(first, columns), 0);
        continue;
      }
      backend_.matmul(grad, Trans::no, w, Trans::no, any ? 1 : 0, dh);
      backend_.matmul(grad, Trans::yes, x, Trans::no, adds(begin), dw_.rows(first, columns));
      any = true;
    }
    if (!any) backend_.fill(out, 0);
    if (any && dh_master_.defined()) backend_.copy(dh, out);
  }

  Backend& backend_;
  Tensor x_, w_, targets_;
  int64_t vocab_;
  double cap_, weight_;
  bool gradients_, fresh_;
  LossResult& result_;
  Tensor dw_, dh_;
  // Temporary: a panel of logits and its gradient (the whole gradient of a chunk in one pass); the gradient
  // of the hidden state; what softmax keeps of rows.
  Tensor logits_, grad_, dh_master_, factor_, lse_;
  SoftmaxRows state_;
};

void check_targets(const Tensor& targets, int64_t rows, int64_t vocab) {
  check(targets.numel() == rows, "linear_cross_entropy: {} targets for {} rows", targets.numel(), rows);
  if (!targets.arena().host()) return;  // whoever brought them to the device has looked
  bool any = rows == 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t target = targets.as<int32_t>()[i];
    check(target < vocab, "target {} of row {} is outside the vocabulary of {}", target, i, vocab);
    any = any || target >= 0;
  }
  if (!any) warn_without_targets();
}

}  // namespace

void warn_without_targets() {
  static std::atomic<bool> said = false;
  if (said.exchange(true)) return;
  fmt::print(stderr,
             "flexchat: warning: a batch has no valid target (all are below 0): its loss and its "
             "gradient are zero; further ones are not reported\n");
}

Tensor head_logits(Tape& tape, const Var& h, const Weight& head, int64_t vocab, double cap) {
  check(!tape.recording(), "head_logits has no backward");
  Backend& backend = tape.backend();
  const Tensor logits = backend.empty({h->value.dim(0), vocab}, backend.master_dtype());
  backend.matmul(h->value, Trans::no, head.compute.rows(0, vocab), Trans::yes, 0, logits);
  backend.softcap(logits, cap);
  return logits;
}

LossResult linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                                int64_t vocab, double cap, double weight, const LossOptions& options) {
  const Tensor& x = h->value;
  return linear_cross_entropy(
      tape, h, head, targets, vocab, cap, weight, options,
      plan_loss(tape.backend(), x.dim(0), x.dim(1), vocab, x.dtype(), tape.recording(), cap, options));
}

LossResult linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                                int64_t vocab, double cap, double weight, const LossOptions& options,
                                LossPlan plan) {
  Backend& backend = tape.backend();
  const int64_t n = h->value.dim(0);
  check_targets(targets, n, vocab);
  LossResult result;
  result.plan = std::move(plan);
  result.nll = backend.empty({n}, backend.master_dtype());
  if (options.lse) result.lse = backend.empty({n}, backend.master_dtype());
  if (options.argmax) result.argmax = backend.empty({n}, DType::i32);
  Tensor dh;
  {
    Head loss(backend, h->value, head, targets.reshape({n}), vocab, cap, weight, tape.recording(),
              tape.fresh(), result);
    loss.run(options);
    dh = loss.dh();
  }
  if (!tape.recording()) return result;
  tape.record([h, dh] {
    check(!h->grad.defined(), "linear_cross_entropy must be the only reader of its input");
    h->grad = dh;
  });
  return result;
}

Tensor linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                            int64_t vocab, double cap, double weight) {
  return linear_cross_entropy(tape, h, head, targets, vocab, cap, weight, LossOptions()).nll;
}

}  // namespace flexchat
