// Value embeddings: v += gate * ve[id] with gate = 3 * sigmoid(gate_weight . h[:channels]), one gate for each
// of the G key heads. Forward moves v twice and the table's rows once; backward dv once, and for each id its
// row of the table once and of the gradient twice. About 2 FLOPs an element forward, 4 backward.
#include "backend/cuda/token_sums.cuh"

namespace flexchat::cuda {
namespace {

// Sizes every kernel here needs. The strides are those of rows of h and of qkv.
struct GateShape {
  int64_t tokens, h_stride, v_stride;
  int heads, channels, d;
};

constexpr int kTokens = 8;  // of a block
constexpr int kAhead = 2;   // packs a thread has in flight

// Dynamic shared memory: (kTokens, heads) gates. v points at the first value column of token 0.
template <class T, int W>
__global__ void __launch_bounds__(kBlock)
    value_gate_kernel(GateShape s, const float* table, const int32_t* ids, const T* h, const float* weight,
                      T* v, float* gate) {
  extern __shared__ float gates[];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int tokens = static_cast<int>(s.tokens - first < kTokens ? s.tokens - first : kTokens);
  for (int p = threadIdx.x; p < tokens * s.heads; p += kBlock) {
    const float* w = weight + p % s.heads * s.channels;
    const T* x = h + (first + p / s.heads) * s.h_stride;
    float logit = 0;
    for (int j = 0; j < s.channels; ++j) logit += w[j] * to_float(x[j]);
    gates[p] = 3.0f * sigmoid(logit);
    gate[first * s.heads + p] = gates[p];
  }
  __syncthreads();

  const int packs = s.heads * s.d / W;  // of a token
  for (int p = threadIdx.x; p < tokens * packs; p += kAhead * kBlock) {
    Packed<T, W> old[kAhead];
    Packed<float, W> entry[kAhead];
    T* to[kAhead];
    float factor[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int q = p + a * kBlock, token = q / packs, i = q % packs * W;
      if (q >= tokens * packs) continue;
      to[a] = v + (first + token) * s.v_stride + i;
      factor[a] = gates[token * s.heads + i / s.d];
      old[a].load(to[a]);
      entry[a].load(table + ids[first + token] * (static_cast<int64_t>(s.heads) * s.d) + i);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (p + a * kBlock >= tokens * packs) continue;
      store_packed<W>(to[a], [&](int j) { return old[a][j] + factor[a] * entry[a][j]; });
    }
  }
}

constexpr int kTokensBackward = 16;  // of a block

// From dgate = dv . ve, (tokens, heads), the gradient of the gate's logit, dgate * d(3 sigmoid) =
// dgate * gate * (1 - gate/3); from it dh and a partial sum of dgate_weight. Dynamic shared memory:
// (kTokensBackward, heads) logit gradients. partials (blocks, heads * channels).
template <class T>
__global__ void __launch_bounds__(kBlock)
    value_gate_backward_kernel(GateShape s, const float* dgate, const T* h, const float* weight,
                               const float* gate, T* dh, float* partials) {
  extern __shared__ float dlogits[];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokensBackward;
  const int tokens =
      static_cast<int>(s.tokens - first < kTokensBackward ? s.tokens - first : kTokensBackward);
  for (int p = threadIdx.x; p < tokens * s.heads; p += kBlock) {
    const float value = gate[first * s.heads + p];
    dlogits[p] = dgate[first * s.heads + p] * value * (1.0f - value / 3.0f);
  }
  __syncthreads();

  for (int p = threadIdx.x; p < tokens * s.channels; p += kBlock) {
    const int token = p / s.channels, j = p % s.channels;
    T* to = dh + (first + token) * s.h_stride + j;
    float x = to_float(*to);
    for (int g = 0; g < s.heads; ++g) x += dlogits[token * s.heads + g] * weight[g * s.channels + j];
    *to = from_float<T>(x);
  }
  for (int p = threadIdx.x; p < s.heads * s.channels; p += kBlock) {
    const T* x = h + first * s.h_stride + p % s.channels;
    float sum = 0;
    for (int t = 0; t < tokens; ++t) {
      sum += dlogits[t * s.heads + p / s.channels] * to_float(x[t * s.h_stride]);
    }
    partials[static_cast<int64_t>(blockIdx.x) * s.heads * s.channels + p] = sum;
  }
}

// For token_sums: the table's gradient, the sum of gate * dv, and dgate, the products of dv with the table.
struct GateSums {
  static constexpr bool kProjects = false, kDots = true;
  const float *table, *gate;
  float* dgate;
  int heads;
  __device__ float weight(int64_t token, int head) const { return gate[token * heads + head]; }
  __device__ void dot(int64_t token, int head, float x) const { dgate[token * heads + head] = x; }
};

GateShape gate_shape(const Tensor& table, const Tensor& ids, const Tensor& h, const Tensor& gate_weight,
                     const Tensor& qkv) {
  const auto heads = static_cast<int>(gate_weight.dim(0));
  return {ids.numel(),
          h.dim(1),
          qkv.dim(1),
          heads,
          static_cast<int>(gate_weight.dim(1)),
          static_cast<int>(table.dim(1)) / heads};
}

// The value columns of qkv.
template <class T>
T* values_of(const Tensor& qkv, const Tensor& table) {
  return qkv.as<T>() + (qkv.dim(1) - table.dim(1));
}
template <class T>
bool vector_path(const GateShape& s, const T* v, const Tensor& table) {
  return s.d % kVector<T> == 0 && s.v_stride % kVector<T> == 0 && aligned16({v, table.data()});
}

}  // namespace

void CudaBackend::value_gate(const Tensor& table, const Tensor& ids, const Tensor& h,
                             const Tensor& gate_weight, const Tensor& qkv, const Tensor& gate) {
  const GateShape s = gate_shape(table, ids, h, gate_weight, qkv);
  for_dtype(qkv.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const v = values_of<T>(qkv, table);
    const double elements = as_double(s.tokens * table.dim(1));
    launch(context_, "value_gate", {elements * (2 * sizeof(T) + 4), 2 * elements},
           vector_path(s, v, table) ? value_gate_kernel<T, kVector<T>> : value_gate_kernel<T, 1>,
           dim3(block_count(s.tokens, kTokens)), dim3(kBlock), sizeof(float) * kTokens * s.heads, s,
           table.as<float>(), ids.as<int32_t>(), h.as<T>(), gate_weight.as<float>(), v, gate.as<float>());
  });
}

void CudaBackend::value_gate_backward(const Tensor& dqkv, const Tensor& table, const Tensor& ids,
                                      const Tensor& h, const Tensor& gate_weight, const Tensor& gate,
                                      const Tensor& dtable, const Tensor& dgate_weight, const Tensor& dh) {
  const GateShape s = gate_shape(table, ids, h, gate_weight, dqkv);
  const int64_t blocks = block_count(s.tokens, kTokensBackward), weights = gate_weight.numel();
  const Tensor partials = empty({blocks, weights}, DType::f32), dgate = empty(gate.shape(), DType::f32);
  const TokenOrder order = sort_tokens(context_, ids, table.dim(0));
  for_dtype(dqkv.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const dv = values_of<T>(dqkv, table);
    add_token_sums<T>(context_, "value_gate_dtable", order, dv, s.v_stride, table.dim(1), s.d,
                      GateSums{table.as<float>(), gate.as<float>(), dgate.as<float>(), s.heads},
                      dtable.as<float>());
    launch(context_, "value_gate_backward",
           {as_double(8 * gate.numel()) + 3 * sizeof(T) * as_double(s.tokens * s.channels),
            4 * as_double(gate.numel() * s.channels)},
           value_gate_backward_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kBlock),
           sizeof(float) * kTokensBackward * s.heads, s, dgate.as<float>(), h.as<T>(),
           gate_weight.as<float>(), gate.as<float>(), dh.as<T>(), partials.as<float>());
    add_partials(context_, partials, {dgate_weight.as<float>(), weights});
  });
}

}  // namespace flexchat::cuda
