// Scaled dot-product attention with a causal (windowed) mask, one query row at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/reference/reference_backend.h"

namespace flexchat {
namespace {

double* head(const HeadsView& view, int64_t b, int64_t t, int64_t h, int64_t d) {
  return static_cast<double*>(view.data) + b * view.batch_stride + t * view.token_stride + h * d;
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Visible keys [begin, end) of query row r.
struct Range {
  int64_t begin, end;
};
Range visible(const AttentionShape& s, int64_t r) {
  const int64_t i = s.q_offset + r;
  return {s.window < 0 ? 0 : std::max<int64_t>(0, i - s.window), std::min(s.kv_len, i + 1)};
}

}  // namespace

void ReferenceBackend::attention(const AttentionShape& s, const HeadsView& q, const HeadsView& k,
                                 const HeadsView& v, const HeadsView& out, const Tensor* lse) {
  const int64_t d = s.head_dim;
  std::vector<double> p(static_cast<size_t>(s.kv_len));
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.n_head; ++h) {
      const int64_t g = h / (s.n_head / s.n_kv_head);
      for (int64_t r = 0; r < s.q_len; ++r) {
        const Range keys = visible(s, r);
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int64_t j = keys.begin; j < keys.end; ++j) {
          p[static_cast<size_t>(j)] = s.scale * dot(head(q, b, r, h, d), head(k, b, j, g, d), d);
          largest = std::max(largest, p[static_cast<size_t>(j)]);
        }
        double* o = head(out, b, r, h, d);
        std::fill(o, o + d, 0.0);
        for (int64_t j = keys.begin; j < keys.end; ++j) {
          const double e = std::exp(p[static_cast<size_t>(j)] - largest);
          sum += e;
          for (int64_t x = 0; x < d; ++x) o[x] += e * head(v, b, j, g, d)[x];
        }
        if (sum > 0) {
          for (int64_t x = 0; x < d; ++x) o[x] /= sum;
        }
        if (lse) lse->as<double>()[(b * s.n_head + h) * s.q_len + r] = largest + std::log(sum);
      }
    }
  }
}

void ReferenceBackend::attention_backward(const AttentionShape& s, const HeadsView& q, const HeadsView& k,
                                          const HeadsView& v, const HeadsView& out, const HeadsView& dout,
                                          const Tensor& lse, const HeadsView& dq, const HeadsView& dk,
                                          const HeadsView& dv) {
  const int64_t d = s.head_dim;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t g = 0; g < s.n_kv_head; ++g) {
      for (int64_t j = 0; j < s.kv_len; ++j) {
        std::fill_n(head(dk, b, j, g, d), d, 0.0);
        std::fill_n(head(dv, b, j, g, d), d, 0.0);
      }
    }
    for (int64_t h = 0; h < s.n_head; ++h) {
      const int64_t g = h / (s.n_head / s.n_kv_head);
      for (int64_t r = 0; r < s.q_len; ++r) {
        const Range keys = visible(s, r);
        const double *qr = head(q, b, r, h, d), *dor = head(dout, b, r, h, d);
        double* dqr = head(dq, b, r, h, d);
        std::fill_n(dqr, d, 0.0);
        const double delta = dot(dor, head(out, b, r, h, d), d);
        const double row_lse = lse.as<double>()[(b * s.n_head + h) * s.q_len + r];
        for (int64_t j = keys.begin; j < keys.end; ++j) {
          const double* kj = head(k, b, j, g, d);
          const double p = std::exp(s.scale * dot(qr, kj, d) - row_lse);
          const double ds = s.scale * p * (dot(dor, head(v, b, j, g, d), d) - delta);
          for (int64_t x = 0; x < d; ++x) {
            dqr[x] += ds * kj[x];
            head(dk, b, j, g, d)[x] += ds * qr[x];
            head(dv, b, j, g, d)[x] += p * dor[x];
          }
        }
      }
    }
  }
}

}  // namespace flexchat
