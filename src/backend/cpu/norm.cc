// RMSNorm, the embedding that feeds it, and rotary position embedding with the QK norm behind it.
// One pass over the row to sum squares, one to scale; a row stays in L1 between the two. Bytes moved: the row
// in and out once; about 5 FLOPs an element.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/norm.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

constexpr float kEps = 0x1p-23f;

template <class T>
float inverse_rms(const T* x, int64_t n) {
  return 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + kEps);
}

template <class X, class Y>
void scale_row(const X* x, float factor, Y* y, int64_t n) {
  const VF f = set(factor);
  for_each_vector(
      n, [&](int64_t i, auto lanes) HWY_ATTR { store(hn::Mul(load(x + i, lanes), f), y + i, lanes); });
}

template <class T>
void rms_norm_rows(const T* x, T* y, float* rstd, int64_t begin, int64_t end, int64_t c) {
  for (int64_t n = begin; n < end; ++n) {
    rstd[n] = inverse_rms(x + n * c, c);
    scale_row(x + n * c, rstd[n], y + n * c, c);
  }
}

template <class T>
void rms_norm_backward_rows(const T* dy, const T* y, const float* rstd, bool accumulate, T* dx, int64_t begin,
                            int64_t end, int64_t c) {
  for (int64_t n = begin; n < end; ++n) {
    const T *dyn = dy + n * c, *yn = y + n * c;
    T* dxn = dx + n * c;
    const VF mean = set(dot(dyn, yn, c) / static_cast<float>(c)), r = set(rstd[n]);
    for_each_vector(c, [&](int64_t i, auto lanes) HWY_ATTR {
      const VF g = hn::NegMulAdd(load(yn + i, lanes), mean, load(dyn + i, lanes));
      const VF before = accumulate ? load(dxn + i, lanes) : set(0);
      store(hn::MulAdd(g, r, before), dxn + i, lanes);
    });
  }
}

template <class T>
void embed_norm_rows(const float* table, const int32_t* ids, T* y, float* rstd, int64_t begin, int64_t end,
                     int64_t c) {
  for (int64_t n = begin; n < end; ++n) {
    const float* row = table + ids[n] * c;
    rstd[n] = inverse_rms(row, c);
    scale_row(row, rstd[n], y + n * c, c);
  }
}

// mean[n] = mean(dy * y) with y = table * rstd
template <class T>
void embed_norm_means(const T* dy, const float* table, const int32_t* ids, const float* rstd, float* mean,
                      int64_t begin, int64_t end, int64_t c) {
  for (int64_t n = begin; n < end; ++n) {
    mean[n] = dot(dy + n * c, table + ids[n] * c, c) * rstd[n] / static_cast<float>(c);
  }
}

// Columns [begin, end) of every token: no two threads share a column, so the order of sums is fixed.
template <class T>
void embed_norm_scatter(const T* dy, const float* table, const int32_t* ids, const float* rstd,
                        const float* mean, float* dtable, int64_t tokens, int64_t begin, int64_t end,
                        int64_t c) {
  for (int64_t n = 0; n < tokens; ++n) {
    const T* g = dy + n * c + begin;
    const float* row = table + ids[n] * c + begin;
    float* out = dtable + ids[n] * c + begin;
    const VF r = set(rstd[n]), slope = set(rstd[n] * mean[n]);
    for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR {
      const VF dx = hn::Mul(r, hn::NegMulAdd(load(row + i, lanes), slope, load(g + i, lanes)));
      store(hn::Add(load(out + i, lanes), dx), out + i, lanes);
    });
  }
}

struct Rope {
  const float *cos, *sin;  // (max_len, half)
  int64_t half, n_heads, row, t_len, q_offset;
  float scale;
};

template <class T>
void rope_norm_rows(T* x, const Rope& rope, float* rstd, int64_t begin, int64_t end) {
  const int64_t half = rope.half, d = 2 * half;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t position = rope.q_offset + n % rope.t_len;
    const float *c = rope.cos + position * half, *s = rope.sin + position * half;
    for (int64_t h = 0; h < rope.n_heads; ++h) {
      T *a = x + n * rope.row + h * d, *b = a + half;
      VF squares = set(0);
      // Rotation keeps the length of each pair, so the norm can be taken before rotating; it is taken after,
      // as the reference systems do, because their rounded tables do not rotate exactly.
      for_each_vector(half, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF va = load(a + i, lanes), vb = load(b + i, lanes), vc = load(c + i, lanes),
                 vs = load(s + i, lanes);
        const VF ra = hn::MulAdd(va, vc, hn::Mul(vb, vs)), rb = hn::NegMulAdd(va, vs, hn::Mul(vb, vc));
        squares = hn::MulAdd(ra, ra, hn::MulAdd(rb, rb, squares));
      });
      const float r = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(d) + kEps);
      rstd[n * rope.n_heads + h] = r;
      const VF factor = set(r * rope.scale);
      for_each_vector(half, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF va = load(a + i, lanes), vb = load(b + i, lanes), vc = load(c + i, lanes),
                 vs = load(s + i, lanes);
        store(hn::Mul(factor, hn::MulAdd(va, vc, hn::Mul(vb, vs))), a + i, lanes);
        store(hn::Mul(factor, hn::NegMulAdd(va, vs, hn::Mul(vb, vc))), b + i, lanes);
      });
    }
  }
}

template <class T>
void rope_norm_backward_rows(const T* y, const Rope& rope, const float* rstd, T* dx, int64_t begin,
                             int64_t end) {
  const int64_t half = rope.half, d = 2 * half;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t position = rope.q_offset + n % rope.t_len;
    const float *c = rope.cos + position * half, *s = rope.sin + position * half;
    for (int64_t h = 0; h < rope.n_heads; ++h) {
      const T *ya = y + n * rope.row + h * d, *yb = ya + half;
      T *ga = dx + n * rope.row + h * d, *gb = ga + half;
      // With unit rows u = y/scale and du = dy*scale: g = rstd * (du - u * mean(du*u)); du*u = dy*y.
      const float mean = dot(ga, ya, d) / static_cast<float>(d);
      const float r = rstd[n * rope.n_heads + h];
      const VF along = set(r * mean / rope.scale), gain = set(r * rope.scale);
      for_each_vector(half, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF g1 = hn::NegMulAdd(load(ya + i, lanes), along, hn::Mul(load(ga + i, lanes), gain));
        const VF g2 = hn::NegMulAdd(load(yb + i, lanes), along, hn::Mul(load(gb + i, lanes), gain));
        const VF vc = load(c + i, lanes), vs = load(s + i, lanes);
        store(hn::NegMulAdd(g2, vs, hn::Mul(g1, vc)), ga + i, lanes);
        store(hn::MulAdd(g1, vs, hn::Mul(g2, vc)), gb + i, lanes);
      });
    }
  }
}

// ---- entry points for every dtype -----------------------------------------------------------------------

void RmsNorm(const Tensor& x, const Tensor& y, const Tensor& rstd) {
  const int64_t c = x.dim(1);
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(x.dim(0), 16, [&](int64_t begin, int64_t end) {
      rms_norm_rows(x.as<T>(), y.as<T>(), rstd.as<float>(), begin, end, c);
    });
  });
}

void RmsNormBackward(const Tensor& dy, const Tensor& y, const Tensor& rstd, bool accumulate,
                     const Tensor& dx) {
  const int64_t c = y.dim(1);
  with_float_type(y.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(y.dim(0), 16, [&](int64_t begin, int64_t end) {
      rms_norm_backward_rows(dy.as<T>(), y.as<T>(), rstd.as<float>(), accumulate, dx.as<T>(), begin, end, c);
    });
  });
}

void EmbedNorm(const Tensor& table, const Tensor& ids, const Tensor& y, const Tensor& rstd) {
  const int64_t c = table.dim(1);
  with_float_type(y.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(ids.numel(), 16, [&](int64_t begin, int64_t end) {
      embed_norm_rows(table.as<float>(), ids.as<int32_t>(), y.as<T>(), rstd.as<float>(), begin, end, c);
    });
  });
}

void EmbedNormBackward(const Tensor& dy, const Tensor& table, const Tensor& ids, const Tensor& rstd,
                       const Tensor& dtable) {
  const int64_t c = table.dim(1), tokens = ids.numel();
  const Tensor mean(host_arena(), {tokens}, DType::f32);
  with_float_type(dy.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(tokens, 16, [&](int64_t begin, int64_t end) {
      embed_norm_means(dy.as<T>(), table.as<float>(), ids.as<int32_t>(), rstd.as<float>(), mean.as<float>(),
                       begin, end, c);
    });
    parallel_for(c, 16, [&](int64_t begin, int64_t end) {
      embed_norm_scatter(dy.as<T>(), table.as<float>(), ids.as<int32_t>(), rstd.as<float>(), mean.as<float>(),
                         dtable.as<float>(), tokens, begin, end, c);
    });
  });
}

Rope make_rope(const Tensor& x, const Tensor& cos_table, const Tensor& sin_table, int64_t n_heads,
               int64_t q_offset, double scale) {
  return {cos_table.as<float>(),
          sin_table.as<float>(),
          cos_table.dim(1),
          n_heads,
          x.dim(2),
          x.dim(1),
          q_offset,
          static_cast<float>(scale)};
}

void RopeNorm(const Tensor& x, const Tensor& cos_table, const Tensor& sin_table, int64_t n_heads,
              int64_t q_offset, double scale, const Tensor& rstd) {
  const Rope rope = make_rope(x, cos_table, sin_table, n_heads, q_offset, scale);
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(x.dim(0) * x.dim(1), 16, [&](int64_t begin, int64_t end) {
      rope_norm_rows(x.as<T>(), rope, rstd.as<float>(), begin, end);
    });
  });
}

void RopeNormBackward(const Tensor& y, const Tensor& cos_table, const Tensor& sin_table, int64_t n_heads,
                      int64_t q_offset, double scale, const Tensor& rstd, const Tensor& dx) {
  const Rope rope = make_rope(y, cos_table, sin_table, n_heads, q_offset, scale);
  with_float_type(y.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(y.dim(0) * y.dim(1), 16, [&](int64_t begin, int64_t end) {
      rope_norm_backward_rows(y.as<T>(), rope, rstd.as<float>(), dx.as<T>(), begin, end);
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(RmsNorm);
HWY_EXPORT(RmsNormBackward);
HWY_EXPORT(EmbedNorm);
HWY_EXPORT(EmbedNormBackward);
HWY_EXPORT(RopeNorm);
HWY_EXPORT(RopeNormBackward);

void CpuBackend::rms_norm(const Tensor& x, const Tensor& y, const Tensor& rstd) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, y, rstd);
}
void CpuBackend::rms_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& rstd, bool accumulate,
                                   const Tensor& dx) {
  HWY_DYNAMIC_DISPATCH(RmsNormBackward)(dy, y, rstd, accumulate, dx);
}
void CpuBackend::embed_norm(const Tensor& table, const Tensor& ids, const Tensor& y, const Tensor& rstd) {
  HWY_DYNAMIC_DISPATCH(EmbedNorm)(table, ids, y, rstd);
}
void CpuBackend::embed_norm_backward(const Tensor& dy, const Tensor& table, const Tensor& ids,
                                     const Tensor& rstd, const Tensor& dtable) {
  HWY_DYNAMIC_DISPATCH(EmbedNormBackward)(dy, table, ids, rstd, dtable);
}
void CpuBackend::rope_norm(const Tensor& x, const Tensor& cos_table, const Tensor& sin_table, int64_t n_heads,
                           int64_t q_offset, double scale, const Tensor& rstd) {
  HWY_DYNAMIC_DISPATCH(RopeNorm)(x, cos_table, sin_table, n_heads, q_offset, scale, rstd);
}
void CpuBackend::rope_norm_backward(const Tensor& y, const Tensor& cos_table, const Tensor& sin_table,
                                    int64_t n_heads, int64_t q_offset, double scale, const Tensor& rstd,
                                    const Tensor& dx) {
  HWY_DYNAMIC_DISPATCH(RopeNormBackward)(y, cos_table, sin_table, n_heads, q_offset, scale, rstd, dx);
}

}  // namespace flexchat
#endif  // HWY_ONCE
