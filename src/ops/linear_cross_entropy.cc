// The output head and its loss. Rows are processed in chunks whose logits fit kLogitBytes, so a vocabulary of
// 65,536 costs no more memory than one of 4,096.
#include <algorithm>

#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

constexpr int64_t kLogitBytes = int64_t{8} << 20;  // 4 to 16 MiB measured alike on two cores
constexpr int64_t kLeastRows = 128;                // below this the weight gradient's product is starved

}  // namespace

Tensor head_logits(Tape& tape, const Var& h, const Weight& head, int64_t vocab, double cap) {
  check(!tape.recording(), "head_logits has no backward");
  Backend& backend = tape.backend();
  const Tensor logits = backend.empty({h->value.dim(0), vocab}, backend.master_dtype());
  backend.matmul(h->value, Trans::no, head.compute.rows(0, vocab), Trans::yes, 0, logits);
  backend.softcap(logits, cap);
  return logits;
}

Tensor linear_cross_entropy(Tape& tape, const Var& h, const Weight& head, const Tensor& targets,
                            int64_t vocab, double cap, double weight) {
  Backend& backend = tape.backend();
  const Tensor &x = h->value, flat_targets = targets.reshape({targets.numel()});
  const int64_t n = x.dim(0), c = x.dim(1);
  check(flat_targets.numel() == n, "linear_cross_entropy: {} targets for {} rows", flat_targets.numel(), n);
  const Tensor w = head.compute.rows(0, vocab), nll = backend.empty({n}, backend.master_dtype());
  Tensor dw, dh;
  if (tape.recording()) {
    dw = head.grad.rows(0, vocab);
    dh = backend.empty({n, c}, x.dtype());
  }
  const int64_t chunk = std::max(kLeastRows, kLogitBytes / (vocab * dtype_size(backend.master_dtype())));
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t rows = std::min(chunk, n - begin);
    const Tensor xc = x.rows(begin, rows), logits = backend.empty({rows, vocab}, backend.master_dtype());
    backend.matmul(xc, Trans::no, w, Trans::yes, 0, logits);
    const Tensor grad = x.dtype() == logits.dtype() ? logits : backend.empty({rows, vocab}, x.dtype());
    backend.cross_entropy(logits, flat_targets.rows(begin, rows), cap, weight, nll.rows(begin, rows),
                          tape.recording() ? &grad : nullptr);
    if (!tape.recording()) continue;
    backend.matmul(grad, Trans::no, w, Trans::no, 0, dh.rows(begin, rows));
    backend.matmul(grad, Trans::yes, xc, Trans::no, 1, dw);
  }
  if (!tape.recording()) return nll;
  tape.record([h, dh] {
    check(!h->grad.defined(), "linear_cross_entropy must be the only reader of its input");
    h->grad = dh;
  });
  return nll;
}

}  // namespace flexchat
