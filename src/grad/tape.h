// Reverse-mode differentiation. Every op (src/ops) computes its result at once and records the closure that
// turns the gradient of its outputs into gradients of its inputs; backward() runs the closures newest first
// and frees each, with the activations it holds, as soon as it is done.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "base/tensor.h"

namespace flexchat {

// An activation and, during backward, its gradient (same shape and dtype).
struct Node {
  Tensor value;
  Tensor grad;
};
using Var = std::shared_ptr<Node>;

class Tape {
 public:
  // A tape that does not record runs the same ops for inference and evaluation.
  Tape(Backend& backend, bool recording) : backend_(backend), recording_(recording) {}
  Backend& backend() const { return backend_; }
  bool recording() const { return recording_; }

  // In a fresh pass nothing has been added to gradients of weights yet, so that linear products overwrite
  // theirs. Others are still added to. Not for a weight that two linear ops read.
  void set_fresh(bool fresh) { fresh_ = fresh; }
  bool fresh() const { return fresh_; }

  static Var leaf(Tensor value) { return std::make_shared<Node>(Node{std::move(value), {}}); }
  // Ops ask recording() first: what a closure captures costs time that inference should not pay.
  void record(std::function<void()> backward_step) { steps_.push_back(std::move(backward_step)); }
  // The gradients of the last op's outputs must be set.
  void backward();

  // Activation checkpointing (Chen et al. 2016): runs `segment` on a copy of x without recording, keeps only
  // x, and runs it again when backward gets there. The same ops in the same order give the same bits.
  // The segment may read, but not change, other variables; it may work in place on its argument if nothing
  // else reads x.
  using Segment = std::function<Var(Tape&, const Var&)>;
  Var checkpoint(const Var& x, const Segment& segment);

 private:
  Backend& backend_;
  bool recording_, fresh_ = false;
  std::vector<std::function<void()>> steps_;
};

// The gradient of `v` to write to; *accumulate tells whether it holds a value to add to.
const Tensor& grad_of(Backend& backend, const Var& v, bool* accumulate);

}  // namespace flexchat
