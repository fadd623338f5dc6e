// A mask as clauses of linear comparisons, which classify any block of positions on their own: so a device
// can build block lists with one thread a block. What quadtrees save by looking at regions
// (flex/block_mask.h), it makes up for by looking at all blocks at once.
//
//   mask   = clause && clause && ...        clause = atom || atom || ...
//   atom   = form < 0, <= 0, == 0 or != 0
//   form   = constant + sum of factor * {q, kv, b, h, n_q, n_kv} + sum of factor * captured integer
//
// causal, window, sink, document, prefix-LM, padding and any && || ! of them have this form, and so has abs
// of a form compared with another. Other masks (products of positions, // and %, numbers) stay with
// build_block_mask. Verdicts are those of interval analysis: operands of && and || are bounded one at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "base/host_device.h"
#include "flex/expr.h"
#include "flex/interval.h"

namespace flexchat::flex {

constexpr int max_mask_clauses = 8, max_clause_atoms = 4, max_atom_reads = 2, max_mask_reads = 16;

// factor * one element of a captured tensor, or a stretch of them along the one axis that q or kv indexes.
struct LinearRead {
  int number;  // among the reads of the mask
  int factor;
  int capture;  // index into the captures given to linear_mask
  int n_axes;
  Var index[4];  // of each axis: b, h, q or kv
};

struct LinearAtom {
  Op op;  // lt, le, eq or ne: of the form with 0
  int64_t constant;
  int factor[n_vars];  // by Var; that of score is 0
  int n_reads;
  LinearRead reads[max_atom_reads];
};

struct LinearMask {
  int n_clauses;
  int n_atoms[max_mask_clauses];  // clauses without captured tensors come first
  LinearAtom atoms[max_mask_clauses][max_clause_atoms];
};

// Nothing for a mask that has another form. captures: at least those of the mask. Errors: as check_mask.
std::optional<LinearMask> linear_mask(const Expr& mask, std::span<const Capture> captures);

// Values of what does not depend on positions.
struct LinearRow {
  int64_t b, h, n_q, n_kv;
};
// The least and the largest of integers.
struct IntegerRange {
  int64_t lo, hi;
};

// What the atom is over a box. range(read) gives the range of the elements it reads.
template <class Range>
FLEXCHAT_HOST_DEVICE Truth atom_truth(const LinearAtom& atom, const LinearRow& row, const Box& box,
                                      const Range& range) {
  const auto factor = [&](Var var) { return int64_t{atom.factor[static_cast<int>(var)]}; };
  const int64_t fixed = atom.constant + factor(Var::b) * row.b + factor(Var::h) * row.h +
                        factor(Var::n_q) * row.n_q + factor(Var::n_kv) * row.n_kv;
  IntegerRange sum{fixed, fixed};
  const auto add = [&](int64_t by, const IntegerRange& x) {
    sum.lo += by * (by > 0 ? x.lo : x.hi);
    sum.hi += by * (by > 0 ? x.hi : x.lo);
  };
  add(factor(Var::q), {box.q_first, box.q_last});
  add(factor(Var::kv), {box.kv_first, box.kv_last});
  for (int i = 0; i < atom.n_reads; ++i) add(atom.reads[i].factor, range(atom.reads[i]));
  const bool zero_only = sum.lo == 0 && sum.hi == 0, no_zero = sum.lo > 0 || sum.hi < 0;
  const auto truth = [](bool always, bool never) {
    return always ? Truth::always : never ? Truth::never : Truth::mixed;
  };
  if (atom.op == Op::lt) return truth(sum.hi < 0, sum.lo >= 0);
  if (atom.op == Op::le) return truth(sum.hi <= 0, sum.lo > 0);
  return atom.op == Op::eq ? truth(zero_only, no_zero) : truth(no_zero, zero_only);
}

// What the mask is over a box, clause by clause up to the first that never holds.
template <class Range>
FLEXCHAT_HOST_DEVICE Truth mask_truth(const LinearMask& mask, const LinearRow& row, const Box& box,
                                      const Range& range) {
  Truth all = Truth::always;
  for (int c = 0; c < mask.n_clauses; ++c) {
    Truth any = Truth::never;
    for (int i = 0; i < mask.n_atoms[c] && any != Truth::always; ++i) {
      const Truth one = atom_truth(mask.atoms[c][i], row, box, range);
      if (one != Truth::never) any = one;
    }
    if (any == Truth::never) return any;
    if (any == Truth::mixed) all = any;
  }
  return all;
}

}  // namespace flexchat::flex
