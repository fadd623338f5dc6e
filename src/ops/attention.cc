// Attention as an operation: fused self-attention, inference over a cache, and the general differentiable
// form.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "ops/ops.h"

namespace flexchat {
namespace {

// The view of x (B*T, row) as heads that start `offset` elements into every row.
HeadsView token_heads(const Tensor& x, int64_t batch, int64_t offset = 0) {
  const int64_t row = x.dim(1);
  return heads_view(x.reshape({batch, x.dim(0) / batch, row}), offset);
}

// q, k and v of a fused buffer.
std::array<HeadsView, 3> fused_heads(const Tensor& qkv, const AttentionShape& s) {
  const int64_t q_width = s.n_head * s.head_dim, kv_width = s.n_kv_head * s.head_dim;
  return {token_heads(qkv, s.batch), token_heads(qkv, s.batch, q_width),
          token_heads(qkv, s.batch, q_width + kv_width)};
}

void check_fused(const Tensor& qkv, const AttentionShape& s) {
  const int64_t rows = s.batch * s.q_len, width = (s.n_head + 2 * s.n_kv_head) * s.head_dim;
  if (qkv.dim(0) != rows || qkv.dim(1) != width) {
    fail("attention: qkv {} is not (B*T, (H+2G)*D) = ({}, {})", shape_string(qkv.shape()), rows, width);
  }
}

void check_rows(const char* name, const Tensor& x, int64_t rows, int64_t width) {
  if (x.rank() != 2 || x.dim(0) != rows || x.dim(1) != width) {
    fail("attention: {} {} does not fit the plan, which needs ({}, {})", name, shape_string(x.shape()), rows,
         width);
  }
}

// Every page that a row's keys lie in must be one of the pool.
void check_pages(Backend& backend, const Tensor& table, int64_t n_pages, const AttentionPlan& plan) {
  const flex::Extent extent = plan.shape().extent();
  const int64_t page_size = plan.spec().page_size;
  const Tensor host = backend.to_host(table);
  check(host.dtype() == DType::i32 && host.rank() == 2 && host.dim(0) == extent.n_batch,
        "attention: a block table {} {} for a batch of {}; it must be (B, pages) i32",
        shape_string(host.shape()), dtype_name(host.dtype()), extent.n_batch);
  for (int64_t b = 0; b < extent.n_batch; ++b) {
    const int64_t needed = (extent.kv_len(b) + page_size - 1) / page_size;
    check(needed <= host.dim(1), "attention: row {} of the batch has {} keys, but its {} pages hold {}", b,
          extent.kv_len(b), host.dim(1), host.dim(1) * page_size);
    for (int64_t i = 0; i < needed; ++i) {
      const int32_t page = host.as<int32_t>()[b * host.dim(1) + i];
      check(page >= 0 && page < n_pages,
            "attention: the block table sends page {} of row {} to {}; allowed are 0 to {}", i, b, page,
            n_pages - 1);
    }
  }
}

Tensor make_lse(Backend& backend, const AttentionShape& s) {
  return backend.empty({s.batch, s.n_head, s.q_len}, backend.master_dtype());
}

// Where a kernel that overwrites may put the gradient of a variable which others have perhaps written before.
class GradientTarget {
 public:
  GradientTarget(Backend& backend, const Var& v) : backend_(backend) {
    bool accumulate = false;
    grad_ = grad_of(backend, v, &accumulate);
    tensor_ = accumulate ? backend.empty(grad_.shape(), grad_.dtype()) : grad_;
    accumulate_ = accumulate;
  }
  const Tensor& tensor() const { return tensor_; }
  void finish() const {
    if (accumulate_) backend_.mix({}, grad_, {}, tensor_, grad_);
  }

 private:
  Backend& backend_;
  Tensor grad_, tensor_;
  bool accumulate_;
};

}  // namespace

Var attention(Tape& tape, const Var& qkv, const AttentionPlanPtr& plan) {
  const AttentionShape& s = plan->shape();
  check_fused(qkv->value, s);
  check(s.q_len == s.kv_len, "attention: {} queries over {} keys need a cache", s.q_len, s.kv_len);
  check(plan->spec().page_size == 0, "attention: keys beside their queries are not in pages");
  Backend& backend = tape.backend();
  const Var out = Tape::leaf(backend.empty({qkv->value.dim(0), s.n_head * s.head_dim}, qkv->value.dtype()));
  const Tensor lse = tape.recording() ? make_lse(backend, s) : Tensor();
  const auto [q, k, v] = fused_heads(qkv->value, s);
  const AttentionTensors x = {q, k, v, token_heads(out->value, s.batch), tape.recording() ? &lse : nullptr};
  backend.attention(*plan, x);
  if (!tape.recording()) return out;
  tape.record([&backend, plan, qkv, out, lse] {
    check(!qkv->grad.defined(), "attention must be the only reader of qkv");
    qkv->grad = backend.empty(qkv->value.shape(), qkv->value.dtype());
    const AttentionShape& shape = plan->shape();
    const auto [qv, kv, vv] = fused_heads(qkv->value, shape);
    const auto [dq, dk, dv] = fused_heads(qkv->grad, shape);
    backend.attention_backward(*plan, {qv, kv, vv, token_heads(out->value, shape.batch), &lse},
                               {token_heads(out->grad, shape.batch), nullptr, dq, dk, dv, {}});
  });
  return out;
}

Var cached_attention(Tape& tape, const Var& qkv, const Tensor& k, const Tensor& v,
                     const AttentionPlanPtr& plan, const Tensor* block_table) {
  const AttentionShape& s = plan->shape();
  check_fused(qkv->value, s);
  check(!tape.recording(), "attention over a cache has no backward");
  Backend& backend = tape.backend();
  if (const int64_t page_size = plan->spec().page_size; page_size > 0) {
    check(block_table != nullptr, "attention: keys in pages need a block table");
    check(k.dim(1) == page_size, "attention: pages of {} keys for a plan with pages of {}", k.dim(1),
          page_size);
    check_pages(backend, *block_table, k.dim(0), *plan);
  } else {
    check(s.kv_len <= k.dim(1), "attention: {} keys do not fit a cache of {}", s.kv_len, k.dim(1));
  }
  const Var out = Tape::leaf(backend.empty({qkv->value.dim(0), s.n_head * s.head_dim}, qkv->value.dtype()));
  backend.attention(*plan, {token_heads(qkv->value, s.batch), heads_view(k), heads_view(v),
                            token_heads(out->value, s.batch), nullptr, block_table});
  return out;
}

AttentionOutput attention(Tape& tape, const Var& q, const Var& k, const Var& v, const AttentionPlanPtr& plan,
                          const AttentionCaptures& captures, bool with_lse) {
  const AttentionShape& s = plan->shape();
  check_rows("q", q->value, s.batch * s.q_len, s.n_head * s.head_dim);
  check_rows("k", k->value, s.batch * s.kv_len, s.n_kv_head * s.head_dim);
  check_rows("v", v->value, s.batch * s.kv_len, s.n_kv_head * s.head_dim);
  check(q->value.dtype() == k->value.dtype() && q->value.dtype() == v->value.dtype(),
        "attention: q is {}, k {}, v {}; they must be of one dtype", dtype_name(q->value.dtype()),
        dtype_name(k->value.dtype()), dtype_name(v->value.dtype()));
  check(plan->spec().page_size == 0, "attention: keys in pages have no gradient; see cached_attention");
  Backend& backend = tape.backend();
  AttentionOutput result;
  result.out = Tape::leaf(backend.empty(q->value.shape(), q->value.dtype()));
  const bool needs_lse = with_lse || tape.recording();
  const Var lse = Tape::leaf(needs_lse ? make_lse(backend, s) : Tensor());
  if (with_lse) result.lse = lse;
  const auto tensors = [plan, q, k, v, lse, out = result.out] {
    const int64_t batch = plan->shape().batch;
    return AttentionTensors{token_heads(q->value, batch), token_heads(k->value, batch),
                            token_heads(v->value, batch), token_heads(out->value, batch),
                            lse->value.defined() ? &lse->value : nullptr};
  };
  backend.attention(*plan, tensors());
  if (!tape.recording()) return result;
  tape.record([&backend, plan, q, k, v, captures, lse, out = result.out, tensors] {
    const int64_t batch = plan->shape().batch;
    if (!out->grad.defined()) out->grad = backend.zeros(out->value.shape(), out->value.dtype());
    const GradientTarget dq(backend, q), dk(backend, k), dv(backend, v);
    AttentionGradients grads = {token_heads(out->grad, batch),   lse->grad.defined() ? &lse->grad : nullptr,
                                token_heads(dq.tensor(), batch), token_heads(dk.tensor(), batch),
                                token_heads(dv.tensor(), batch), {}};
    std::vector<GradientTarget> sums;
    for (const auto& [name, capture] : captures) {
      grads.captures.emplace_back(name, sums.emplace_back(backend, capture).tensor());
    }
    backend.attention_backward(*plan, tensors(), grads);
    for (const GradientTarget* target : {&dq, &dk, &dv}) target->finish();
    for (const GradientTarget& target : sums) target.finish();
  });
  return result;
}

}  // namespace flexchat
