// The output head and its loss: how its logits are kept from filling the memory, and what that costs.
// N = B*T tokens, C = n_embd, V = vocabulary. Three products of 2*N*C*V FLOPs each, four with `cce`.
//
//   full     all logits at once, (N, V) master; their gradients alone where the device keeps logits in
//            registers (below: fused)
//   chunked  rows in chunks that fit a budget; the gradients of hidden state and head are formed chunk by
//            chunk in the same pass (as Liger Kernel, Hsu et al. 2024)
//   cce      no more than a panel of logits, some rows by some columns: a first pass over the panels of a
//            block of rows takes the LSE, a second computes the logits again and forms the gradients (as Cut
//            Cross-Entropy, Wijmans et al. 2024). Exact unless a filter is asked for.
//
// All accumulate the gradient of the head in the master dtype, and sum in a fixed order.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "backend/backend.h"

namespace flexchat {

enum class LossBackend { automatic, full, chunked, cce };

// "auto", "full" (or "current"), "chunked" (or "liger"), "cce"; an unknown name is an error that lists them.
LossBackend parse_loss_backend(std::string_view name);
std::string_view loss_backend_name(LossBackend backend);

struct LossOptions {
  LossBackend backend = LossBackend::automatic;
  // Bytes of temporary memory (what the loss takes beside its inputs, its results and gradients); 0: 8 MiB of
  // logits on hosts; on devices an eighth of bf16 logits, but 64 to 256 MiB; for cce 2 and 31 MiB.
  int64_t memory_budget = 0;
  // cce on hosts: panels in which every |d nll / d logit| is below this are left out of the products. 0:
  // exact. With f the filter, a row's gradient of the hidden state is off by at most f * sum of the left-out
  // rows of the head; ops/linear_cross_entropy_test measures it.
  double filter = 0;
  bool lse = false, argmax = false;  // wanted beside the nll
};

// How a loss is going to be computed. Errors: a filter for another backend than cce or on a device that the
// host cannot read; a budget too small for one row (chunked) or one logit (cce).
struct LossPlan {
  LossBackend backend = LossBackend::full;  // never automatic
  std::string reason;                       // why this one, for people
  int64_t rows = 0, columns = 0;            // of the panel of logits that is in memory at a time
  // chunked: each panel of columns goes into the gradient at once, in the compute dtype and without the
  // factor 1/sum of its row, which is applied to the far smaller operands of the products. Logits are then
  // written and read once, in a panel that stays in a GPU's L2.
  bool one_pass = false;
  // Logits stay in the registers of the product that makes them (Backend::linear_softmax); only gradients of
  // logits take memory, and columns are theirs.
  bool fused = false;
  int64_t bytes = 0;  // temporary memory at most, besides the arena's rounding and (N) vectors
};
LossPlan plan_loss(Backend& backend, int64_t n, int64_t c, int64_t vocab, DType dtype, bool gradients,
                   double cap, const LossOptions& options);

struct LossResult {
  Tensor nll;     // (N) master; 0 where the target is ignored
  Tensor lse;     // (N) master, of the capped logits, for every row; undefined unless wanted
  Tensor argmax;  // (N) i32, the first of the largest logits; undefined unless wanted
  LossPlan plan;
  int64_t panels = 0, skipped = 0;  // cce: panels of gradients, and those that the filter left out
};

}  // namespace flexchat
