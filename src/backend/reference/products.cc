#include "backend/host_memory.h"
#include "backend/reference/reference_backend.h"

namespace flexchat {

void ReferenceBackend::copy(const Tensor& source, const Tensor& out) {
  for (int64_t i = 0; i < out.numel(); ++i) out.set(i, source.get(i));
}

void ReferenceBackend::fill(const Tensor& out, double value) {
  for (int64_t i = 0; i < out.numel(); ++i) out.set(i, value);
}

void ReferenceBackend::draw(const Distribution& distribution, uint64_t seed, uint64_t stream,
                            const Tensor& out) {
  draw_on_host(distribution, seed, stream, out);
}

void ReferenceBackend::add_sum(const Tensor& x, const Tensor& out) { add_sum_on_host(x, out); }

void ReferenceBackend::copy_rows(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                                 const HeadsView& to) {
  copy_rows_on_host(batch, tokens, width, from, to);
}

void ReferenceBackend::matmul(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                              const Tensor& out) {
  const int64_t m = out.dim(0), n = out.dim(1), k = trans_a == Trans::no ? a.dim(1) : a.dim(0);
  const int64_t row_a = trans_a == Trans::no ? k : 1, col_a = trans_a == Trans::no ? 1 : m;
  const int64_t row_b = trans_b == Trans::no ? n : 1, col_b = trans_b == Trans::no ? 1 : k;
  const auto as_f64 = [](const Tensor& t) {
    if (t.dtype() == DType::f64) return t;
    const Tensor wide(host_arena(), t.shape(), DType::f64);
    for (int64_t i = 0; i < t.numel(); ++i) wide.set(i, t.get(i));
    return wide;
  };
  const Tensor wide_a = as_f64(a), wide_b = as_f64(b);
  const double *pa = wide_a.as<double>(), *pb = wide_b.as<double>();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += pa[i * row_a + l * col_a] * pb[l * row_b + j * col_b];
      out.set(i * n + j, sum + (beta == 0 ? 0 : beta * out.get(i * n + j)));
    }
  }
}

void ReferenceBackend::matmul_batched(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b,
                                      double beta, const Tensor& out) {
  const auto matrix = [](const Tensor& t, int64_t i) { return t.rows(i, 1).reshape({t.dim(1), t.dim(2)}); };
  for (int64_t i = 0; i < out.dim(0); ++i) {
    matmul(matrix(a, i), trans_a, matrix(b, i), trans_b, beta, matrix(out, i));
  }
}

}  // namespace flexchat
