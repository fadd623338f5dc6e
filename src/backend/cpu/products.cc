// Copies, fills and matrix products: which kernel serves which dtypes.
//   few rows against (N, K) weights   -> gemv (Highway), any dtypes
//   f32 x f32 -> f32                  -> oneDNN sgemm
//   bf16 x bf16 -> bf16 or f32        -> oneDNN matmul where the CPU has it
//   anything else                     -> operands converted to f32, sgemm, converted back
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dnnl_matmul.h"
#include "backend/cpu/gemv.h"
#include "backend/host_memory.h"
#include "base/error.h"
#include "base/parallel.h"

namespace flexchat {

void CpuBackend::copy(const Tensor& source, const Tensor& out) {
  if (source.dtype() == out.dtype()) {
    const int64_t bytes = out.bytes();
    parallel_for(bytes, 1 << 20, [&](int64_t begin, int64_t end) {
      std::memcpy(out.as<char>() + begin, source.as<char>() + begin, static_cast<size_t>(end - begin));
    });
  } else if (source.dtype() <= DType::f16 && out.dtype() <= DType::f16 && source.dtype() != DType::f64 &&
             out.dtype() != DType::f64) {
    axpby(1, source, 0, out);
  } else {
    for (int64_t i = 0; i < out.numel(); ++i) out.set(i, source.get(i));
  }
}

void CpuBackend::fill(const Tensor& out, double value) {
  if (value == 0) {
    std::memset(out.data(), 0, static_cast<size_t>(out.bytes()));
  } else {
    for (int64_t i = 0; i < out.numel(); ++i) out.set(i, value);
  }
}

void CpuBackend::draw(const Distribution& distribution, uint64_t seed, uint64_t stream, const Tensor& out) {
  draw_on_host(distribution, seed, stream, out);
}

void CpuBackend::add_sum(const Tensor& x, const Tensor& out) { add_sum_on_host(x, out); }

void CpuBackend::copy_rows(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                           const HeadsView& to) {
  copy_rows_on_host(batch, tokens, width, from, to);
}

void CpuBackend::matmul(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                        const Tensor& out) {
  const int64_t m = out.dim(0), n = out.dim(1), k = trans_a == Trans::no ? a.dim(1) : a.dim(0);
  if (m <= kGemvMaxRows && trans_a == Trans::no && trans_b == Trans::yes && (beta == 0 || beta == 1)) {
    return gemv(a, b, beta == 1, out);
  }
  if (a.dtype() == DType::bf16 && b.dtype() == DType::bf16 && out.dtype() != DType::f16 &&
      (beta == 0 || beta == 1) &&
      bf16_matmul(trans_a, trans_b, m, n, k, a.data(), b.data(), beta == 1, out.data(), out.dtype())) {
    return;
  }
  const auto as_f32 = [&](const Tensor& t, bool load) {
    if (t.dtype() == DType::f32) return t;
    Tensor f = empty(t.shape(), DType::f32);
    if (load) copy(t, f);
    return f;
  };
  const Tensor fa = as_f32(a, true), fb = as_f32(b, true), fo = as_f32(out, beta != 0);
  sgemm(trans_a, trans_b, m, n, k, 1.0f, fa.as<float>(), a.dim(1), fb.as<float>(), b.dim(1),
        static_cast<float>(beta), fo.as<float>(), n);
  if (out.dtype() != DType::f32) copy(fo, out);
}

void CpuBackend::matmul_batched(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                                const Tensor& out) {
  const auto matrix = [](const Tensor& t, int64_t i) { return t.rows(i, 1).reshape({t.dim(1), t.dim(2)}); };
  for (int64_t i = 0; i < out.dim(0); ++i) {
    matmul(matrix(a, i), trans_a, matrix(b, i), trans_b, beta, matrix(out, i));
  }
}

}  // namespace flexchat
