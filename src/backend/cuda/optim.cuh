// What the kernels that walk an UpdatePlan share.
#pragma once

#include "backend/cuda/optim_plan.h"
#include "backend/cuda/reduce.cuh"
#include "backend/update_rates.h"

namespace flexchat::cuda {

inline const CudaUpdatePlan& cuda_plan(const UpdatePlan& plan) {
  return static_cast<const CudaUpdatePlan&>(plan);
}

__device__ inline const GradientRates& gradient_rates(const double* rates) {
  return *reinterpret_cast<const GradientRates*>(rates);
}
// Rates is AdamWRates or MuonRates, `row` a slot's rates_row.
template <class Rates>
__device__ const Rates& group_rates(const double* rates, int32_t row) {
  return reinterpret_cast<const Rates*>(rates)[row];
}

// Up to eight elements: by 16-byte accesses where the address allows it and there are eight.
template <class T>
__device__ void load_at(const T* p, int64_t count, bool aligned, float (&x)[8]) {
  if (aligned && count >= 8) {
    load8(p, x);
  } else {
    load_some(p, count, x);
  }
}
template <class T>
__device__ void store_at(T* p, int64_t count, bool aligned, const float (&x)[8]) {
  if (aligned && count >= 8) {
    store8(p, x);
  } else {
    store_some(p, count, x);
  }
}

// A slot's new values, elements [i, i + count), into its compute copy.
__device__ inline void store_compute(const PlannedSlot& slot, int64_t i, int64_t count, bool aligned,
                                     const float (&p)[8]) {
  if (slot.copy == ComputeCopy::bf16) store_at(static_cast<bf16*>(slot.compute) + i, count, aligned, p);
  if (slot.copy == ComputeCopy::f16) store_at(static_cast<f16*>(slot.compute) + i, count, aligned, p);
}

}  // namespace flexchat::cuda
