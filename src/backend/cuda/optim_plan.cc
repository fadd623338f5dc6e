#include "backend/cuda/optim_plan.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/cuda_backend.h"

namespace flexchat::cuda {
namespace {

ComputeCopy copy_of(const UpdateSlot& slot) {
  if (!slot.compute.defined()) return ComputeCopy::none;
  return slot.compute.dtype() == DType::bf16 ? ComputeCopy::bf16 : ComputeCopy::f16;
}

PlannedSlot planned(const UpdateSlot& slot) {
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.as<float>() : nullptr; };
  PlannedSlot out = {};
  out.grad = pointer(slot.grad);
  out.value = pointer(slot.value);
  out.first = pointer(slot.first);
  out.second = pointer(slot.second);
  out.compute = slot.compute.defined() ? slot.compute.data() : nullptr;
  out.numel = slot.grad.numel();
  out.rates_row = static_cast<int32_t>(slot.rates_row);
  out.copy = copy_of(slot);
  out.aligned = true;
  for (const void* p : {static_cast<const void*>(out.grad), static_cast<const void*>(out.value),
                        static_cast<const void*>(out.first), static_cast<const void*>(out.second),
                        static_cast<const void*>(out.compute)}) {
    out.aligned = out.aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  }
  return out;
}

// A table in device memory.
template <class T>
Tensor uploaded(Backend& backend, const std::vector<T>& table) {
  const auto bytes = static_cast<int64_t>(table.size() * sizeof(T));
  const Tensor host(host_arena(), {bytes}, DType::u8);
  if (bytes > 0) std::memcpy(host.data(), table.data(), static_cast<size_t>(bytes));
  return backend.clone(host);
}

}  // namespace

CudaUpdatePlan::CudaUpdatePlan(Backend& backend, std::vector<UpdateSlot> slots)
    : UpdatePlan(std::move(slots)) {
  std::vector<PlannedSlot> table;
  std::vector<Piece> pieces;
  for (const UpdateSlot& slot : this->slots()) {
    const auto index = static_cast<int32_t>(table.size());
    table.push_back(planned(slot));
    const int64_t numel = table.back().numel;
    for (int64_t piece = 0; piece * kPiece < numel; ++piece)
      pieces.push_back({index, static_cast<int32_t>(piece)});
    numel_ += static_cast<double>(numel);
  }
  piece_count_ = static_cast<int64_t>(pieces.size());
  slot_table_ = uploaded(backend, table);
  piece_table_ = uploaded(backend, pieces);
  partials_ = backend.empty({std::max<int64_t>(piece_count_, 1)}, DType::f64);
}

std::shared_ptr<const UpdatePlan> CudaBackend::plan_update(std::vector<UpdateSlot> slots) {
  return std::make_shared<CudaUpdatePlan>(*this, std::move(slots));
}

}  // namespace flexchat::cuda
