// Attention with any mask and score mod, one weight at a time in double: what every kernel is held to.
//   s = scale * q.k,  s' = mod(s),  p = exp(s' - lse),  out = sum_j p_j m_j v_j
// over the keys j that the built-in mask and the expression allow; m_j is 0 for a dropped weight and
// 1 / (1 - dropout) otherwise. A key whose s' is -inf has weight 0, as if it were masked.
// Backward, with D = dout.out - dlse:
//   ds'_j = p_j (m_j dout.v_j - D),  ds_j = ds'_j mod'(s),  dc = sum ds' dmod/dc over the accesses of entry c
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/attention_support.h"
#include "backend/reference/reference_backend.h"
#include "base/error.h"
#include "base/strings.h"
#include "flex/derivative.h"
#include "flex/eval.h"

namespace flexchat {
namespace {

// Weights below e^-kNegligible do not show in a result.
constexpr double kNegligible = 20;

class ReferencePlan final : public AttentionPlan {
 public:
  using AttentionPlan::AttentionPlan;
  std::string_view kernel() const override { return "reference"; }
  std::string_view reason() const override { return "plain loops over double, the only kernel there is"; }
};

// A number, or its size.
template <bool sizes>
double term(double x) {
  return sizes ? std::abs(x) : x;
}
template <bool sizes = false>
double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += term<sizes>(a[i] * b[i]);
  return sum;
}

// One weight of one query: key j, its score before and after the mod, the factor m of dropout.
struct Weight {
  int64_t j;
  double score, modded, kept;
};

// Where things are, and which keys a query sees.
class Attention {
 public:
  Attention(const AttentionPlan& plan, const AttentionTensors& x)
      : shape(plan.shape()), spec(plan.spec()), extent(shape.extent()), x_(x) {
    if (spec.mask) mask_.emplace_back(std::vector{*spec.mask}, spec.bindings);
    if (spec.score_mod) mod_.emplace_back(std::vector{*spec.score_mod}, spec.bindings);
  }

  double* at(const HeadsView& view, int64_t b, int64_t t, int64_t h) const {
    const int64_t step = view.head_stride == 0 ? shape.head_dim : view.head_stride;
    return static_cast<double*>(view.data) + b * view.batch_stride + t * view.token_stride + h * step;
  }
  // A key or value: of row b, or of the page that holds it.
  double* key(const HeadsView& view, int64_t b, int64_t j, int64_t g) const {
    if (spec.page_size == 0) return at(view, b, j, g);
    const int64_t page = x_.block_table->as<int32_t>()[b * x_.block_table->dim(1) + j / spec.page_size];
    return at(view, page, j % spec.page_size, g);
  }
  int64_t group(int64_t h) const { return h / (shape.n_head / shape.n_kv_head); }
  int64_t row(int64_t b, int64_t h, int64_t r) const { return (b * shape.n_head + h) * shape.q_len + r; }

  flex::Point point(int64_t b, int64_t h, int64_t r, int64_t j, double score) const {
    return {score, b, h, extent.q_offset(b) + r, j, extent.q_len(b), extent.kv_len(b)};
  }

  // The weights of query r; none for one that is not there.
  std::vector<Weight> weights(int64_t b, int64_t h, int64_t r) {
    std::vector<Weight> result;
    if (r >= extent.q_len(b)) return result;
    const int64_t position = extent.q_offset(b) + r;
    for (int64_t j = 0; j < extent.kv_len(b); ++j) {
      if (spec.causal && (j > position || (spec.window >= 0 && position - j > spec.window))) continue;
      if (spec.mask && mask_[0](point(b, h, r, j, 0)) == 0) continue;
      const double score = spec.scale * dot(at(x_.q, b, r, h), key(x_.k, b, j, group(h)), shape.head_dim);
      const double modded = spec.score_mod ? mod_[0](point(b, h, r, j, score)) : score;
      if (modded == -std::numeric_limits<double>::infinity()) continue;
      result.push_back({j, score, modded, kept(b, h, r, j)});
    }
    return result;
  }

  double rounded_sizes_in_mod(int64_t b, int64_t h, int64_t r, const Weight& w) {
    return spec.score_mod ? mod_[0].rounded_sizes(point(b, h, r, w.j, w.score)) : 0;
  }

  const AttentionShape& shape;
  const AttentionSpec& spec;
  const flex::Extent extent;

 private:
  double kept(int64_t b, int64_t h, int64_t r, int64_t j) const {
    if (spec.dropout == 0) return 1;
    return attention_dropout_bits(spec.dropout_seed, b, h, r, j) < spec.dropout * 0x1p32
               ? 0
               : 1 / (1 - spec.dropout);
  }

  const AttentionTensors& x_;
  std::vector<flex::Evaluator> mask_, mod_;  // one each, or none
};

// The derivatives of a score mod at a point: with respect to score, and to each access of a captured tensor.
class Derivatives {
 public:
  Derivatives(const AttentionSpec& spec, const AttentionGradients& grads) {
    if (!spec.score_mod) return;
    std::vector<flex::Expr> roots = {flex::score_derivative(*spec.score_mod)};
    for (const flex::CaptureDerivative& d : flex::capture_derivatives(*spec.score_mod)) {
      const std::string& name = d.access.node().capture->name();
      const auto wanted = std::find_if(grads.captures.begin(), grads.captures.end(),
                                       [&](const auto& c) { return c.first == name; });
      if (wanted == grads.captures.end()) continue;
      accesses_.push_back({wanted->second, roots.size(), d.access.node().args.size()});
      roots.push_back(d.derivative);
      for (const flex::Expr& index : d.access.node().args) roots.push_back(index);
    }
    evaluator_.emplace_back(roots, spec.bindings);
  }

  // ds from ds'; adds to the gradients of captured tensors.
  template <bool sizes>
  double apply(const flex::Point& point, double dmodded) {
    if (evaluator_.empty()) return dmodded;
    const std::vector<double> values = evaluator_[0].all(point);
    for (const Access& a : accesses_) {
      int64_t entry = 0;
      for (size_t i = 0; i < a.rank; ++i) {
        entry = entry * a.grad.dim(static_cast<int>(i)) + static_cast<int64_t>(values[a.root + 1 + i]);
      }
      a.grad.as<double>()[entry] += term<sizes>(dmodded * values[a.root]);
    }
    return term<sizes>(dmodded * values[0]);
  }

 private:
  struct Access {
    Tensor grad;
    size_t root, rank;  // the derivative is root number `root`, its indices follow
  };
  std::vector<Access> accesses_;
  std::vector<flex::Evaluator> evaluator_;  // one, or none without a mod
};

// With `sizes`, every gradient is the sum of the sizes of the terms that it is the sum of.
template <bool sizes>
void backward(const AttentionPlan& plan, const AttentionTensors& x, const AttentionGradients& grads) {
  Attention a(plan, x);
  const AttentionShape& s = a.shape;
  const int64_t d = s.head_dim;
  check(a.spec.page_size == 0, "attention over pages has no backward");
  for (const std::pair<std::string, Tensor>& c : grads.captures)
    std::fill_n(c.second.as<double>(), c.second.numel(), 0.0);
  Derivatives derivatives(a.spec, grads);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t g = 0; g < s.n_kv_head; ++g) {
      for (int64_t j = 0; j < s.kv_len; ++j) {
        std::fill_n(a.at(grads.dk, b, j, g), d, 0.0);
        std::fill_n(a.at(grads.dv, b, j, g), d, 0.0);
      }
    }
    for (int64_t h = 0; h < s.n_head; ++h) {
      for (int64_t r = 0; r < s.q_len; ++r) {
        double* dq = a.at(grads.dq, b, r, h);
        std::fill_n(dq, d, 0.0);
        const std::vector<Weight> weights = a.weights(b, h, r);
        if (weights.empty()) continue;
        const double *q = a.at(x.q, b, r, h), *dout = a.at(grads.dout, b, r, h);
        const double delta = dot<sizes>(dout, a.at(x.out, b, r, h), d) +
                             term<sizes>(grads.dlse ? -grads.dlse->as<double>()[a.row(b, h, r)] : 0.0);
        const double lse = x.lse->as<double>()[a.row(b, h, r)];
        for (const Weight& w : weights) {
          const double *k = a.at(x.k, b, w.j, a.group(h)), *v = a.at(x.v, b, w.j, a.group(h));
          double *dk = a.at(grads.dk, b, w.j, a.group(h)), *dv = a.at(grads.dv, b, w.j, a.group(h));
          const double p = std::exp(w.modded - lse);
          const double dmodded = p * (w.kept * dot<sizes>(dout, v, d) + (sizes ? delta : -delta));
          const double ds = a.spec.scale * derivatives.apply<sizes>(a.point(b, h, r, w.j, w.score), dmodded);
          for (int64_t i = 0; i < d; ++i) {
            dq[i] += term<sizes>(ds * k[i]);
            dk[i] += term<sizes>(ds * q[i]);
            dv[i] += term<sizes>(p * w.kept * dout[i]);
          }
        }
      }
    }
  }
}

}  // namespace

std::vector<std::string> ReferenceBackend::attention_kernels() const { return {"reference"}; }

std::shared_ptr<const AttentionPlan> ReferenceBackend::plan_attention(const AttentionShape& shape,
                                                                      const AttentionSpec& spec,
                                                                      std::string_view kernel) {
  if (kernel != "auto" && kernel != "reference") {
    fail("the reference backend has no attention kernel '{}'; allowed: auto, {}", kernel,
         join(attention_kernels()));
  }
  shape.check();
  spec.check(shape);
  check_attention_support("reference", shape, spec);
  return std::make_shared<ReferencePlan>(shape, spec);
}

void ReferenceBackend::attention(const AttentionPlan& plan, const AttentionTensors& x) {
  Attention a(plan, x);
  const AttentionShape& s = a.shape;
  const int64_t d = s.head_dim;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.n_head; ++h) {
      for (int64_t r = 0; r < s.q_len; ++r) {
        const std::vector<Weight> weights = a.weights(b, h, r);
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (const Weight& w : weights) largest = std::max(largest, w.modded);
        double* o = a.at(x.out, b, r, h);
        std::fill_n(o, d, 0.0);
        for (const Weight& w : weights) {
          const double p = std::exp(w.modded - largest);
          const double* v = a.key(x.v, b, w.j, a.group(h));
          sum += p;
          for (int64_t i = 0; w.kept != 0 && i < d; ++i) o[i] += p * w.kept * v[i];
        }
        for (int64_t i = 0; !weights.empty() && i < d; ++i) o[i] /= sum;
        if (x.lse) x.lse->as<double>()[a.row(b, h, r)] = largest + std::log(sum);
      }
    }
  }
}

void ReferenceBackend::attention_backward(const AttentionPlan& plan, const AttentionTensors& x,
                                          const AttentionGradients& grads) {
  backward<false>(plan, x, grads);
}

void ReferenceBackend::attention_term_sizes(const AttentionPlan& plan, const AttentionTensors& x,
                                            const AttentionGradients& sizes) {
  backward<true>(plan, x, sizes);
}

ScoreSizes ReferenceBackend::score_sizes(const AttentionPlan& plan, const AttentionTensors& x) {
  Attention a(plan, x);
  const AttentionShape& s = a.shape;
  ScoreSizes largest;
  for (int64_t row = 0; row < s.batch * s.n_head * s.q_len; ++row) {
    const int64_t r = row % s.q_len, h = row / s.q_len % s.n_head, b = row / s.q_len / s.n_head;
    const double lse = x.lse->as<double>()[a.row(b, h, r)];
    for (const Weight& w : a.weights(b, h, r)) {
      if (w.modded <= lse - kNegligible) continue;
      const double rounded = std::abs(w.score) + a.rounded_sizes_in_mod(b, h, r, w) + std::abs(lse);
      largest = {std::max(largest.score, std::abs(w.modded)), std::max(largest.rounded, rounded)};
    }
  }
  return largest;
}

}  // namespace flexchat
