// The tables that one launch over many parameters walks: what each slot points to, and which piece of which
// slot each block works on. Uploaded once, when the plan is made, so that no launch copies anything.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace flexchat::cuda {

enum class ComputeCopy : int32_t { none, bf16, f16 };

struct PlannedSlot {
  const float* grad;
  float *value, *first, *second;
  void* compute;
  int64_t numel;
  int32_t rates_row;
  ComputeCopy copy;
  bool aligned;  // every pointer allows 16-byte accesses
};

// Elements [piece * kPiece, ...) of a slot.
constexpr int64_t kPiece = 16384;
struct Piece {
  int32_t slot, piece;
};

class CudaUpdatePlan final : public UpdatePlan {
 public:
  CudaUpdatePlan(Backend& backend, std::vector<UpdateSlot> slots);

  const PlannedSlot* slot_table() const { return static_cast<const PlannedSlot*>(slot_table_.data()); }
  const Piece* pieces() const { return static_cast<const Piece*>(piece_table_.data()); }
  int64_t piece_count() const { return piece_count_; }
  double* partials() const { return partials_.as<double>(); }  // (piece_count): scratch of grad_norm
  double numel() const { return numel_; }                      // of all slots together

 private:
  Tensor slot_table_, piece_table_, partials_;
  int64_t piece_count_ = 0;
  double numel_ = 0;
};

}  // namespace flexchat::cuda
