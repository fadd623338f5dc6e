// A mask as a flat program that classifies any block of positions on its own, so that a device can do so with
// one thread a block. The rules are those of interval analysis (flex/bound.h); what quadtrees save by looking
// at regions (flex/block_mask.h), a device makes up for by looking at all blocks at once.
//
// Not every mask has one: functions of the C library, indices that are more than a variable, captured tensors
// indexed by queries and keys together and very long expressions stay with build_block_mask.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "flex/bound.h"

namespace flexchat::flex {

// What an instruction's value depends on besides the batch row and the head.
enum class Scope : uint8_t { row, queries, keys, both };

struct FlatInstruction {
  Op op;
  Type type;
  Var var;           // variable
  Scope scope;
  bool of_integers;  // comparisons: both operands are integers
  int8_t args[3];    // earlier instructions; op capture: args[0] is its access
  double value;      // constant
};

// One element of a captured tensor, or a stretch of them along the one axis that q or kv indexes.
struct FlatAccess {
  int capture;   // index into the captures given to flatten_mask
  bool integers;
  int n_axes;
  Var index[4];  // of each axis
};

constexpr int max_flat_code = 64, max_flat_terms = 16, max_flat_accesses = 8;

// The conjunction of `terms`, of which those without captured tensors come first.
struct FlatMask {
  int n_code, n_terms, n_accesses;
  FlatInstruction code[max_flat_code];
  int8_t terms[max_flat_terms];  // the instruction of each; its operands lie between the last term and it
  FlatAccess accesses[max_flat_accesses];
};

// Nothing for a mask that has no flat program. captures: at least those of the mask. Errors: as check_mask.
std::optional<FlatMask> flatten_mask(const Expr& mask, std::span<const Capture> captures);

// What `mask` is the conjunction of; at most `most` terms.
std::vector<Expr> split_terms(const Expr& mask, size_t most);

// The batch row and head that blocks belong to.
struct FlatRow {
  int64_t b, h, n_q, n_kv;
};

// Bounds of instruction i over the box. bound(k): those of an earlier instruction; range(access): the interval
// of a captured tensor over the box.
template <class Bounds, class Range>
FLEXCHAT_HOST_DEVICE Bound flat_bound(const FlatMask& mask, int i, const FlatRow& row, const Box& box,
                                      const Bounds& bound, const Range& range) {
  const FlatInstruction& in = mask.code[i];
  if (in.op == Op::constant) return bounds::ranged(bounds::exactly(in.value));
  if (in.op == Op::capture) return bounds::ranged(range(mask.accesses[in.args[0]]));
  if (in.op != Op::variable)
    return bounds::combine(box, in.op, in.type == Type::integer, in.of_integers, bound(in.args[0]),
                           bound(in.args[1]), bound(in.args[2]));
  if (in.var == Var::q) return bounds::linear(box, 1, 0, {0, 0});
  if (in.var == Var::kv) return bounds::linear(box, 0, 1, {0, 0});
  const int64_t x = in.var == Var::b     ? row.b
                    : in.var == Var::h   ? row.h
                    : in.var == Var::n_q ? row.n_q
                                         : row.n_kv;
  return bounds::ranged(bounds::exactly(static_cast<double>(x)));
}

// outer (n_code): bounds of what all blocks of the same queries share, for flat_truth.
template <class Range>
FLEXCHAT_HOST_DEVICE void flat_begin(const FlatMask& mask, const FlatRow& row, const Box& box, Bound* outer,
                                     const Range& range) {
  for (int i = 0; i < mask.n_code; ++i)
    if (mask.code[i].scope <= Scope::queries)
      outer[i] = flat_bound(mask, i, row, box, [&](int k) -> const Bound& { return outer[k]; }, range);
}

// Does the mask hold in the box? Terms are bounded one by one, up to the first that never holds.
template <class Range>
FLEXCHAT_HOST_DEVICE Truth flat_truth(const FlatMask& mask, const FlatRow& row, const Box& box,
                                      const Bound* outer, const Range& range) {
  Bound inner[max_flat_code];
  const auto bound = [&](int k) -> const Bound& {
    return mask.code[k].scope <= Scope::queries ? outer[k] : inner[k];
  };
  Truth all = Truth::always;
  for (int term = 0, i = 0; term < mask.n_terms; ++term) {
    for (; i <= mask.terms[term]; ++i)
      if (mask.code[i].scope > Scope::queries) inner[i] = flat_bound(mask, i, row, box, bound, range);
    const Truth one = bounds::truth(bound(mask.terms[term]).range);
    if (one == Truth::never) return one;
    if (one == Truth::mixed) all = one;
  }
  return all;
}

}  // namespace flexchat::flex
