// The vocabulary of emitted Mod sections (mod_contract.cuh): where a mod is evaluated, reads of captured
// tensors, and the functions of the expression language. In f32 kernels functions are the accurate ones; with
// bf16 and f16 operands the hardware's approximations are far below the rounding of the products; numbers
// below 2^-126 are then zeros, which spares three instructions a function.
#pragma once
#include "attention_params.cuh"

#define MOD_DEVICE __device__ __forceinline__

namespace flexchat::cuda {

struct ModContext {
  const AttentionParams& p;
  int b, h, n_q, n_kv;  // n_q, n_kv: this row's lengths
};

template <class... Index>
MOD_DEVICE long long capture_index(const AttentionCapture& c, Index... index) {
  const int at[] = {index..., 0};
  long long i = 0;
#pragma unroll
  for (int a = 0; a < static_cast<int>(sizeof...(Index)); ++a) i += c.stride[a] * at[a];
  return i;
}
template <class... Index>
MOD_DEVICE float capture_number(const AttentionCapture& c, Index... index) {
  return __ldg(static_cast<const float*>(c.data) + capture_index(c, index...));
}
template <class... Index>
MOD_DEVICE int capture_integer(const AttentionCapture& c, Index... index) {
  return __ldg(static_cast<const int*>(c.data) + capture_index(c, index...));
}

constexpr bool kModExact = ATTENTION_DTYPE == 0;
constexpr float kModLog2e = 1.4426950408889634f, kModLn2 = 0.6931471805599453f;

MOD_DEVICE float mod_rcp(float x) {
  if (kModExact) return 1.0f / x;
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MOD_DEVICE float mod_exp2(float x) {
  if (kModExact) return exp2f(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MOD_DEVICE float mod_log2(float x) {
  if (kModExact) return log2f(x);
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MOD_DEVICE float mod_exp(float x) { return kModExact ? expf(x) : mod_exp2(x * kModLog2e); }
MOD_DEVICE float mod_log(float x) { return kModExact ? logf(x) : mod_log2(x) * kModLn2; }
MOD_DEVICE float mod_div(float x, float y) { return kModExact ? x / y : x * mod_rcp(y); }
MOD_DEVICE float mod_sqrt(float x) { return sqrtf(x); }
MOD_DEVICE float mod_pow(float x, float y) { return powf(x, y); }
MOD_DEVICE float mod_sigmoid(float x) { return mod_rcp(1.0f + mod_exp(-x)); }
// 1 - 2/(e^(2x) + 1) keeps an absolute error near 1e-7, which a cap of 50 turns into 5e-6; tanh.approx would
// give 0.02.
MOD_DEVICE float mod_tanh(float x) {
  return kModExact ? tanhf(x) : 1.0f - 2.0f * mod_rcp(mod_exp(2.0f * x) + 1.0f);
}
// sigmoid(x) and tanh(x) of x * log2(e).
MOD_DEVICE float mod_sigmoid_base2(float x) { return mod_rcp(1.0f + mod_exp2(-x)); }
MOD_DEVICE float mod_tanh_base2(float x) { return 1.0f - 2.0f * mod_rcp(mod_exp2(2.0f * x) + 1.0f); }
MOD_DEVICE float mod_softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
MOD_DEVICE float mod_abs(float x) { return fabsf(x); }
MOD_DEVICE float mod_min(float x, float y) { return fminf(x, y); }
MOD_DEVICE float mod_max(float x, float y) { return fmaxf(x, y); }
MOD_DEVICE int mod_iabs(int x) { return x < 0 ? -x : x; }
MOD_DEVICE int mod_imin(int x, int y) { return x < y ? x : y; }
MOD_DEVICE int mod_imax(int x, int y) { return x < y ? y : x; }
// Rounded towards minus infinity; x // 0 = 0, x % 0 = x.
MOD_DEVICE int mod_floor_div(int x, int y) {
  if (y == 0) return 0;
  const int d = x / y;
  return d - ((x % y != 0) && ((x < 0) != (y < 0)));
}
MOD_DEVICE int mod_floor_mod(int x, int y) { return x - y * mod_floor_div(x, y); }

}  // namespace flexchat::cuda
