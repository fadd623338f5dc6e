// Causal (windowed) attention, blocked over query rows so that scores stay in L2: S = QK^T and O = PV are
// oneDNN products on one thread, the softmax between them is Highway, and (batch, head) pairs go to threads.
// FLOPs: 4 * rows * visible keys * D forward, 10 backward. f32 reads its operands in place; bf16 and f16
// heads are first gathered as f32.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "backend/cpu/dnnl_matmul.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

constexpr int64_t kRows = 64;  // query rows of a block

template <class T>
T* head(const HeadsView& view, int64_t b, int64_t t, int64_t h, int64_t d) {
  return static_cast<T*>(view.data) + b * view.batch_stride + t * view.token_stride + h * d;
}

// Rows [begin, begin + n) of one head as f32: in place when they are f32, otherwise gathered into scratch.
struct Rows {
  const float* data = nullptr;
  int64_t stride = 0;
};
template <class T>
Rows rows_of(const HeadsView& view, int64_t b, int64_t begin, int64_t n, int64_t h, int64_t d,
             std::vector<float>& scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return {head<float>(view, b, begin, h, d), view.token_stride};
  } else {
    scratch.resize(static_cast<size_t>(n * d));
    for (int64_t t = 0; t < n; ++t) {
      const T* x = head<T>(view, b, begin + t, h, d);
      float* y = scratch.data() + t * d;
      for_each_vector(d, [&](int64_t i, auto lanes) HWY_ATTR { store(load(x + i, lanes), y + i, lanes); });
    }
    return {scratch.data(), d};
  }
}

// Where products put their result: in place for f32, otherwise in scratch that put_rows() converts.
struct Target {
  float* data = nullptr;
  int64_t stride = 0;
};
template <class T>
Target target_of(const HeadsView& view, int64_t b, int64_t begin, int64_t n, int64_t h, int64_t d,
                 std::vector<float>& scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return {head<float>(view, b, begin, h, d), view.token_stride};
  } else {
    scratch.resize(static_cast<size_t>(n * d));
    return {scratch.data(), d};
  }
}

template <class T>
void put_row(const float* x, float factor, T* y, int64_t d) {
  const VF f = set(factor);
  for_each_vector(
      d, [&](int64_t i, auto lanes) HWY_ATTR { store(hn::Mul(load(x + i, lanes), f), y + i, lanes); });
}

template <class T>
void put_rows(const Target& from, const HeadsView& view, int64_t b, int64_t begin, int64_t n, int64_t h,
              int64_t d) {
  if constexpr (!std::is_same_v<T, float>) {
    for (int64_t t = 0; t < n; ++t)
      put_row(from.data + t * from.stride, 1, head<T>(view, b, begin + t, h, d), d);
  }
}

// Visible keys [begin, end) of query row r, and of all rows of a block.
struct Range {
  int64_t begin, end;
};
Range visible(const AttentionShape& s, int64_t r) {
  const int64_t i = s.q_offset + r;
  const int64_t end = std::min(s.kv_len, i + 1);
  return {s.window < 0 ? 0 : std::min(end, std::max<int64_t>(0, i - s.window)), end};
}
Range visible_block(const AttentionShape& s, int64_t r0, int64_t rows) {
  return {visible(s, r0).begin, visible(s, r0 + rows - 1).end};
}

// p[0..n) = exp(scale * s - shift) inside [from, to), 0 outside; returns the sum.
float exp_row(float* s, int64_t n, int64_t from, int64_t to, float scale, float shift) {
  std::fill(s, s + from, 0.0f);
  std::fill(s + to, s + n, 0.0f);
  const VF a = set(scale), m = set(shift);
  float* x = s + from;
  VF sum = set(0);
  for_each_vector(to - from, [&](int64_t i, auto lanes) HWY_ATTR {
    VF e = hn::Exp(F32(), hn::MulSub(a, load(x + i, lanes), m));
    if constexpr (std::is_same_v<decltype(lanes), Part>)
      e = hn::IfThenElseZero(hn::FirstN(F32(), lanes.n), e);
    store(e, x + i, lanes);
    sum = hn::Add(sum, e);
  });
  return sum_lanes(sum);
}

float max_row(const float* x, int64_t n) {
  const VF low = set(-std::numeric_limits<float>::infinity());
  VF m = low;
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    VF v = load(x + i, lanes);
    if constexpr (std::is_same_v<decltype(lanes), Part>)
      v = hn::IfThenElse(hn::FirstN(F32(), lanes.n), v, low);
    m = hn::Max(m, v);
  });
  return max_lanes(m);
}

struct Scratch {
  std::vector<float> q, k, v, o, d_o, s, ds, dq, dk, dv;
};

// ---- forward --------------------------------------------------------------------------------------------

template <class T>
void forward_block(const AttentionShape& s, int64_t b, int64_t h, int64_t r0, int64_t rows,
                   const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                   float* lse, Scratch& x) {
  const int64_t d = s.head_dim, g = h / (s.n_head / s.n_kv_head);
  const Range keys = visible_block(s, r0, rows);
  const int64_t n = keys.end - keys.begin;
  x.s.resize(static_cast<size_t>(rows * n));
  const Target o = target_of<T>(out, b, r0, rows, h, d, x.o);
  const Rows qr = rows_of<T>(q, b, r0, rows, h, d, x.q), kr = rows_of<T>(k, b, keys.begin, n, g, d, x.k),
             vr = rows_of<T>(v, b, keys.begin, n, g, d, x.v);
  sgemm(Trans::no, Trans::yes, rows, n, d, 1, qr.data, qr.stride, kr.data, kr.stride, 0, x.s.data(), n);
  std::vector<float> sums(static_cast<size_t>(rows));
  const auto scale = static_cast<float>(s.scale);
  for (int64_t r = 0; r < rows; ++r) {
    const Range row = visible(s, r0 + r);
    float* p = x.s.data() + r * n;
    const int64_t from = row.begin - keys.begin, to = row.end - keys.begin;
    const float shift = to > from ? scale * max_row(p + from, to - from) : 0.0f;
    sums[static_cast<size_t>(r)] = exp_row(p, n, from, to, scale, shift);
    if (lse) lse[r0 + r] = shift + std::log(sums[static_cast<size_t>(r)]);  // log 0 = -inf: sees nothing
  }
  sgemm(Trans::no, Trans::no, rows, d, n, 1, x.s.data(), n, vr.data, vr.stride, 0, o.data, o.stride);
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = sums[static_cast<size_t>(r)];
    put_row(o.data + r * o.stride, sum > 0 ? 1 / sum : 0.0f, head<T>(out, b, r0 + r, h, d), d);
  }
}

// out = sum_j p[j] * v[j] over n rows `stride` apart: a block of columns stays in registers while rows stream
// by.
template <class T>
void weighted_sum(const float* p, const T* v, int64_t stride, int64_t n, float* out, int64_t d) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t i = 0;
  for (; i + 8 * lanes <= d; i += 8 * lanes) {
    VF s[8];
    for (VF& x : s) x = set(0);
    for (int64_t j = 0; j < n; ++j) {
      const VF w = set(p[j]);
      for (int64_t r = 0; r < 8; ++r)
        s[r] = hn::MulAdd(w, load(v + j * stride + i + r * lanes, Whole()), s[r]);
    }
    for (int64_t r = 0; r < 8; ++r) store(s[r], out + i + r * lanes, Whole());
  }
  for_each_vector(d - i, [&](int64_t c, auto part) HWY_ATTR {
    VF s = set(0);
    for (int64_t j = 0; j < n; ++j) s = hn::MulAdd(set(p[j]), load(v + j * stride + i + c, part), s);
    store(s, out + i + c, part);
  });
}

// One query row needs no products: keys and values are each streamed once.
template <class T>
void forward_row(const AttentionShape& s, int64_t b, int64_t h, int64_t r, const HeadsView& q,
                 const HeadsView& k, const HeadsView& v, const HeadsView& out, float* lse, Scratch& x) {
  const int64_t d = s.head_dim, g = h / (s.n_head / s.n_kv_head);
  const Range keys = visible(s, r);
  const int64_t n = keys.end - keys.begin;
  x.s.resize(static_cast<size_t>(n));
  x.o.resize(static_cast<size_t>(d));
  const T *qr = head<T>(q, b, r, h, d), *kr = head<T>(k, b, keys.begin, g, d);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) four_dots(qr, kr + j * k.token_stride, k.token_stride, d, x.s.data() + j);
  for (; j < n; ++j) x.s[static_cast<size_t>(j)] = dot(qr, kr + j * k.token_stride, d);
  const auto scale = static_cast<float>(s.scale);
  const float shift = n > 0 ? scale * max_row(x.s.data(), n) : 0.0f;
  const float sum = exp_row(x.s.data(), n, 0, n, scale, shift);
  weighted_sum(x.s.data(), head<T>(v, b, keys.begin, g, d), v.token_stride, n, x.o.data(), d);
  put_row(x.o.data(), sum > 0 ? 1 / sum : 0.0f, head<T>(out, b, r, h, d), d);
  if (lse) lse[r] = shift + std::log(sum);
}

void Attention(const AttentionShape& s, const HeadsView& q, const HeadsView& k, const HeadsView& v,
               const HeadsView& out, const Tensor* lse) {
  with_float_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A single short row is cheaper than waking a thread.
    const int64_t work = s.q_len * s.kv_len * s.head_dim;
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(work, 1));
    parallel_for(s.batch * s.n_head, grain, [&](int64_t begin, int64_t end) {
      Scratch x;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.n_head, h = i % s.n_head;
        float* row_lse = lse ? lse->as<float>() + i * s.q_len : nullptr;
        if (s.q_len == 1) {
          forward_row<T>(s, b, h, 0, q, k, v, out, row_lse, x);
          continue;
        }
        for (int64_t r0 = 0; r0 < s.q_len; r0 += kRows) {
          forward_block<T>(s, b, h, r0, std::min(kRows, s.q_len - r0), q, k, v, out, row_lse, x);
        }
      }
    });
  });
}

// ---- backward -------------------------------------------------------------------------------------------

// Adds a block of query rows to dk and dv (n_kv, d) of its key head and writes its dq.
template <class T>
void backward_block(const AttentionShape& s, int64_t b, int64_t h, int64_t r0, int64_t rows,
                    const HeadsView& q, const Rows& k, const Rows& v, const HeadsView& out,
                    const HeadsView& dout, const float* lse, const HeadsView& dq, const Target& dk,
                    const Target& dv, Scratch& x) {
  const int64_t d = s.head_dim;
  const Range keys = visible_block(s, r0, rows);
  const int64_t n = keys.end - keys.begin;
  x.s.resize(static_cast<size_t>(rows * n));
  x.ds.resize(static_cast<size_t>(rows * n));
  const Target dqr = target_of<T>(dq, b, r0, rows, h, d, x.dq);
  const Rows qr = rows_of<T>(q, b, r0, rows, h, d, x.q), dor = rows_of<T>(dout, b, r0, rows, h, d, x.d_o);
  const float *kr = k.data + keys.begin * k.stride, *vr = v.data + keys.begin * v.stride;
  const auto scale = static_cast<float>(s.scale);
  sgemm(Trans::no, Trans::yes, rows, n, d, 1, qr.data, qr.stride, kr, k.stride, 0, x.s.data(), n);
  sgemm(Trans::no, Trans::yes, rows, n, d, 1, dor.data, dor.stride, vr, v.stride, 0, x.ds.data(), n);
  for (int64_t r = 0; r < rows; ++r) {
    const Range row = visible(s, r0 + r);
    float *p = x.s.data() + r * n, *dp = x.ds.data() + r * n;
    const bool blind = row.begin >= row.end;  // sees nothing: lse is -inf
    exp_row(p, n, row.begin - keys.begin, row.end - keys.begin, scale, blind ? 0.0f : lse[r0 + r]);
    const VF delta = set(dot(head<T>(dout, b, r0 + r, h, d), head<T>(out, b, r0 + r, h, d), d)),
             vs = set(scale);
    for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
      const VF ds = hn::Mul(load(p + i, lanes), hn::Sub(load(dp + i, lanes), delta));
      store(hn::Mul(vs, ds), dp + i, lanes);
    });
  }
  sgemm(Trans::no, Trans::no, rows, d, n, 1, x.ds.data(), n, kr, k.stride, 0, dqr.data, dqr.stride);
  sgemm(Trans::yes, Trans::no, n, d, rows, 1, x.ds.data(), n, qr.data, qr.stride, 1,
        dk.data + keys.begin * dk.stride, dk.stride);
  sgemm(Trans::yes, Trans::no, n, d, rows, 1, x.s.data(), n, dor.data, dor.stride, 1,
        dv.data + keys.begin * dv.stride, dv.stride);
  put_rows<T>(dqr, dq, b, r0, rows, h, d);
}

void AttentionBackward(const AttentionShape& s, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const HeadsView& out, const HeadsView& dout, const Tensor& lse, const HeadsView& dq,
                       const HeadsView& dk, const HeadsView& dv) {
  const int64_t d = s.head_dim, group = s.n_head / s.n_kv_head;
  with_float_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A thread owns a key head: its dk and dv are summed over the group's heads and blocks in order.
    parallel_for(s.batch * s.n_kv_head, 1, [&](int64_t begin, int64_t end) {
      Scratch x;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.n_kv_head, g = i % s.n_kv_head;
        const Rows kr = rows_of<T>(k, b, 0, s.kv_len, g, d, x.k),
                   vr = rows_of<T>(v, b, 0, s.kv_len, g, d, x.v);
        const Target dkr = target_of<T>(dk, b, 0, s.kv_len, g, d, x.dk);
        const Target dvr = target_of<T>(dv, b, 0, s.kv_len, g, d, x.dv);
        for (int64_t t = 0; t < s.kv_len; ++t) {
          std::fill_n(dkr.data + t * dkr.stride, d, 0.0f);
          std::fill_n(dvr.data + t * dvr.stride, d, 0.0f);
        }
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          const float* row_lse = lse.as<float>() + (b * s.n_head + h) * s.q_len;
          for (int64_t r0 = 0; r0 < s.q_len; r0 += kRows) {
            backward_block<T>(s, b, h, r0, std::min(kRows, s.q_len - r0), q, kr, vr, out, dout, row_lse, dq,
                              dkr, dvr, x);
          }
        }
        put_rows<T>(dkr, dk, b, 0, s.kv_len, g, d);
        put_rows<T>(dvr, dv, b, 0, s.kv_len, g, d);
      }
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(Attention);
HWY_EXPORT(AttentionBackward);

void CpuBackend::attention(const AttentionShape& shape, const HeadsView& q, const HeadsView& k,
                           const HeadsView& v, const HeadsView& out, const Tensor* lse) {
  HWY_DYNAMIC_DISPATCH(Attention)(shape, q, k, v, out, lse);
}
void CpuBackend::attention_backward(const AttentionShape& shape, const HeadsView& q, const HeadsView& k,
                                    const HeadsView& v, const HeadsView& out, const HeadsView& dout,
                                    const Tensor& lse, const HeadsView& dq, const HeadsView& dk,
                                    const HeadsView& dv) {
  HWY_DYNAMIC_DISPATCH(AttentionBackward)(shape, q, k, v, out, dout, lse, dq, dk, dv);
}

}  // namespace flexchat
#endif  // HWY_ONCE
