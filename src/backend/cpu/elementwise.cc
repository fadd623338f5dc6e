// Element-wise kernels of the trunk: relu^2, learned mixes, smear, value-embedding gates. Bytes moved: every
// operand once.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/elementwise.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cmath>
#include <type_traits>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

constexpr int64_t kGrain = 1 << 14;  // elements a thread should at least have

float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// ---- relu^2 ---------------------------------------------------------------------------------------------

void ReluSquared(const Tensor& u, const Tensor& y) {
  with_float_type(u.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* pu = u.as<T>();
    T* py = y.as<T>();
    parallel_for(u.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF r = hn::Max(load(pu + begin + i, lanes), set(0));
        store(hn::Mul(r, r), py + begin + i, lanes);
      });
    });
  });
}

void ReluSquaredBackward(const Tensor& u, const Tensor& dy) {
  with_float_type(u.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *pu = u.as<T>(), *pd = dy.as<T>();
    parallel_for(u.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF r = hn::Max(load(pu + begin + i, lanes), set(0));
        store(hn::Mul(hn::Mul(set(2), r), load(pd + begin + i, lanes)), pd + begin + i, lanes);
        store(hn::Mul(r, r), pu + begin + i, lanes);
      });
    });
  });
}

// ---- learned mixes --------------------------------------------------------------------------------------

float coefficient(const Coefficient& c) {
  return static_cast<float>(c.factor) * (c.value ? c.value->as<float>()[c.index] : 1.0f);
}

void Mix(const Coefficient& a, const Tensor& x, const Coefficient& b, const Tensor& y, const Tensor& out) {
  const VF va = set(coefficient(a)), vb = set(coefficient(b));
  with_float_type(out.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = out.as<T>();
    parallel_for(out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF by = hn::Mul(vb, load(py + begin + i, lanes));
        store(hn::MulAdd(va, load(px + begin + i, lanes), by), po + begin + i, lanes);
      });
    });
  });
}

template <class T>
void mix_backward_row(const T* d, float ca, const T* x, float cb, const T* y, bool accumulate_dx, T* dx,
                      bool accumulate_dy, T* dy, int64_t n, float* sum_a, float* sum_b) {
  const VF va = set(ca), vb = set(cb);
  VF sa = set(0), sb = set(0);
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    const VF g = load(d + i, lanes);
    sa = hn::MulAdd(g, load(x + i, lanes), sa);
    sb = hn::MulAdd(g, load(y + i, lanes), sb);
    store(hn::MulAdd(va, g, accumulate_dx ? load(dx + i, lanes) : set(0)), dx + i, lanes);
    store(hn::MulAdd(vb, g, accumulate_dy ? load(dy + i, lanes) : set(0)), dy + i, lanes);
  });
  *sum_a = sum_lanes(sa);
  *sum_b = sum_lanes(sb);
}

void MixBackward(const Tensor& dout, const Coefficient& a, const Tensor& x, const Coefficient& b,
                 const Tensor& y, bool accumulate_dx, const Tensor& dx, bool accumulate_dy, const Tensor& dy,
                 const Tensor* da, const Tensor* db) {
  const int64_t c = dout.dim(-1), rows = dout.numel() / c;
  const float ca = coefficient(a), cb = coefficient(b);
  std::vector<float> sum_a(static_cast<size_t>(rows)), sum_b(static_cast<size_t>(rows));
  with_float_type(dout.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        mix_backward_row(dout.as<T>() + n * c, ca, x.as<T>() + n * c, cb, y.as<T>() + n * c, accumulate_dx,
                         dx.as<T>() + n * c, accumulate_dy, dy.as<T>() + n * c, c,
                         &sum_a[static_cast<size_t>(n)], &sum_b[static_cast<size_t>(n)]);
      }
    });
  });
  double total_a = 0, total_b = 0;  // in row order: the sum does not depend on the number of threads
  for (size_t n = 0; n < static_cast<size_t>(rows); ++n) {
    total_a += static_cast<double>(sum_a[n]);
    total_b += static_cast<double>(sum_b[n]);
  }
  if (da) da->as<float>()[a.index] += static_cast<float>(a.factor * total_a);
  if (db) db->as<float>()[b.index] += static_cast<float>(b.factor * total_b);
}

// ---- smear ----------------------------------------------------------------------------------------------

void Smear(const Tensor& e, const Tensor* previous, const Tensor& weight, const Tensor& lambda,
           const Tensor& out, const Tensor& sigmoid_out) {
  const int64_t t_len = e.dim(1), c = e.dim(2), channels = weight.dim(1);
  const float l = lambda.as<float>()[0];
  with_float_type(e.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(e.dim(0) * t_len, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* now = e.as<T>() + n * c;
        T* po = out.as<T>() + n * c;
        const float s = sigmoid_of(dot(weight.as<float>(), now, channels));
        sigmoid_out.as<float>()[n] = s;
        const T* before = n % t_len > 0            ? now - c
                          : previous && t_len == 1 ? previous->as<T>() + n * c
                                                   : nullptr;
        const VF gate = set(before ? l * s : 0.0f);
        const T* source = before ? before : now;  // gate 0: any readable row
        for_each_vector(c, [&](int64_t i, auto lanes) HWY_ATTR {
          store(hn::MulAdd(gate, load(source + i, lanes), load(now + i, lanes)), po + i, lanes);
        });
      }
    });
  });
}

void SmearBackward(const Tensor& dout, const Tensor& e, const Tensor& weight, const Tensor& lambda,
                   const Tensor& sigmoid_in, const Tensor& de, const Tensor& dweight, const Tensor& dlambda) {
  const int64_t t_len = e.dim(1), c = e.dim(2), rows = e.dim(0) * t_len, channels = weight.dim(1);
  const float l = lambda.as<float>()[0];
  const float* s = sigmoid_in.as<float>();
  std::vector<float> dgate(static_cast<size_t>(rows), 0.0f);
  with_float_type(e.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // Row n receives its own dout, dout of the row behind it through that row's gate, and the gate's logit.
    parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* d = dout.as<T>() + n * c;
        T* out = de.as<T>() + n * c;
        const bool has_next = n % t_len + 1 < t_len;
        const VF gate = set(has_next ? l * s[n + 1] : 0.0f);
        const T* next = has_next ? d + c : d;
        for_each_vector(c, [&](int64_t i, auto lanes) HWY_ATTR {
          store(hn::MulAdd(gate, load(next + i, lanes), load(d + i, lanes)), out + i, lanes);
        });
        if (n % t_len > 0) {
          const float g = dot(d, e.as<T>() + (n - 1) * c, c);
          dgate[static_cast<size_t>(n)] = g;
          add_scaled(g * l * s[n] * (1 - s[n]), weight.as<float>(), out, channels);
        }
      }
    });
    double total = 0;
    for (int64_t n = 0; n < rows; ++n) {
      const float g = dgate[static_cast<size_t>(n)];
      total += static_cast<double>(g * s[n]);
      if (g != 0.0f) add_scaled(g * l * s[n] * (1 - s[n]), e.as<T>() + n * c, dweight.as<float>(), channels);
    }
    dlambda.as<float>()[0] += static_cast<float>(total);
  });
}

// ---- value embeddings -----------------------------------------------------------------------------------

void ValueGate(const Tensor& table, const Tensor& ids, const Tensor& h, const Tensor& gate_weight,
               const Tensor& qkv, const Tensor& gate) {
  const int64_t c = h.dim(1), row = qkv.dim(1), heads = gate_weight.dim(0), channels = gate_weight.dim(1);
  const int64_t d = table.dim(1) / heads;
  with_float_type(h.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(ids.numel(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* v = qkv.as<T>() + (n + 1) * row - heads * d;
        const float* ve = table.as<float>() + ids.as<int32_t>()[n] * heads * d;
        for (int64_t g = 0; g < heads; ++g) {
          const float value =
              3.0f * sigmoid_of(dot(gate_weight.as<float>() + g * channels, h.as<T>() + n * c, channels));
          gate.as<float>()[n * heads + g] = value;
          add_scaled(value, ve + g * d, v + g * d, d);
        }
      }
    });
  });
}

void ValueGateBackward(const Tensor& dqkv, const Tensor& table, const Tensor& ids, const Tensor& h,
                       const Tensor& gate_weight, const Tensor& gate, const Tensor& dtable,
                       const Tensor& dgate_weight, const Tensor& dh) {
  const int64_t c = h.dim(1), row = dqkv.dim(1), heads = gate_weight.dim(0), channels = gate_weight.dim(1);
  const int64_t d = table.dim(1) / heads, tokens = ids.numel();
  const Tensor dlogit(host_arena(), {tokens, heads}, DType::f32);
  with_float_type(h.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* dv = dqkv.as<T>() + (n + 1) * row - heads * d;
        const float* ve = table.as<float>() + ids.as<int32_t>()[n] * heads * d;
        for (int64_t g = 0; g < heads; ++g) {
          const float value = gate.as<float>()[n * heads + g];
          const float slope = dot(dv + g * d, ve + g * d, d) * value * (1 - value / 3);
          dlogit.as<float>()[n * heads + g] = slope;
          add_scaled(slope, gate_weight.as<float>() + g * channels, dh.as<T>() + n * c, channels);
        }
      }
    });
    // A thread owns heads: tokens are summed in order.
    parallel_for(heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < tokens; ++n) {
        const T* dv = dqkv.as<T>() + (n + 1) * row - heads * d;
        for (int64_t g = begin; g < end; ++g) {
          add_scaled(gate.as<float>()[n * heads + g], dv + g * d,
                     dtable.as<float>() + (ids.as<int32_t>()[n] * heads + g) * d, d);
          add_scaled(dlogit.as<float>()[n * heads + g], h.as<T>() + n * c,
                     dgate_weight.as<float>() + g * channels, channels);
        }
      }
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(ReluSquared);
HWY_EXPORT(ReluSquaredBackward);
HWY_EXPORT(Mix);
HWY_EXPORT(MixBackward);
HWY_EXPORT(Smear);
HWY_EXPORT(SmearBackward);
HWY_EXPORT(ValueGate);
HWY_EXPORT(ValueGateBackward);

void CpuBackend::relu_squared(const Tensor& u, const Tensor& y) { HWY_DYNAMIC_DISPATCH(ReluSquared)(u, y); }
void CpuBackend::relu_squared_backward(const Tensor& u, const Tensor& dy) {
  HWY_DYNAMIC_DISPATCH(ReluSquaredBackward)(u, dy);
}
void CpuBackend::mix(const Coefficient& a, const Tensor& x, const Coefficient& b, const Tensor& y,
                     const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(Mix)(a, x, b, y, out);
}
void CpuBackend::mix_backward(const Tensor& dout, const Coefficient& a, const Tensor& x, const Coefficient& b,
                              const Tensor& y, bool accumulate_dx, const Tensor& dx, bool accumulate_dy,
                              const Tensor& dy, const Tensor* da, const Tensor* db) {
  HWY_DYNAMIC_DISPATCH(MixBackward)(dout, a, x, b, y, accumulate_dx, dx, accumulate_dy, dy, da, db);
}
void CpuBackend::smear(const Tensor& e, const Tensor* previous, const Tensor& weight, const Tensor& lambda,
                       const Tensor& out, const Tensor& sigmoid) {
  HWY_DYNAMIC_DISPATCH(Smear)(e, previous, weight, lambda, out, sigmoid);
}
void CpuBackend::smear_backward(const Tensor& dout, const Tensor& e, const Tensor& weight,
                                const Tensor& lambda, const Tensor& sigmoid, const Tensor& de,
                                const Tensor& dweight, const Tensor& dlambda) {
  HWY_DYNAMIC_DISPATCH(SmearBackward)(dout, e, weight, lambda, sigmoid, de, dweight, dlambda);
}
void CpuBackend::value_gate(const Tensor& table, const Tensor& ids, const Tensor& h,
                            const Tensor& gate_weight, const Tensor& qkv, const Tensor& gate) {
  HWY_DYNAMIC_DISPATCH(ValueGate)(table, ids, h, gate_weight, qkv, gate);
}
void CpuBackend::value_gate_backward(const Tensor& dqkv, const Tensor& table, const Tensor& ids,
                                     const Tensor& h, const Tensor& gate_weight, const Tensor& gate,
                                     const Tensor& dtable, const Tensor& dgate_weight, const Tensor& dh) {
  HWY_DYNAMIC_DISPATCH(ValueGateBackward)(dqkv, table, ids, h, gate_weight, gate, dtable, dgate_weight, dh);
}

}  // namespace flexchat
#endif  // HWY_ONCE
