// Time and memory of the loss: forward and backward, as in training.
#pragma once

#include <cstdint>

#include "ops/loss.h"

namespace flexchat {

struct LossTiming {
  LossPlan plan;
  double ms = 0;            // median of the repeats: loss, gradient of hidden state and head
  double tflops = 0;        // of three products, 6*N*C*V FLOPs, over that time (cce computes a fourth)
  int64_t extra_bytes = 0;  // peak of the arena beside inputs, nll and gradients
  double mean_nll = 0;      // about log V for these inputs: shows that something was computed
};

// h (N, C) normal, head (V, C) normal / sqrt(C), random targets, softcap 15. Three runs come first, to load
// kernels, tune products and take the memory; then `repeats` >= 1 are timed, each to the end of the device's
// work. As in a training step of one batch, gradients are written and not added to what is there, and devices
// that can record replay.
LossTiming time_loss(Backend& backend, int64_t n, int64_t c, int64_t vocab, DType dtype,
                     const LossOptions& options, int repeats);

}  // namespace flexchat
