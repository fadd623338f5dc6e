// Checks of an attention call before any kernel sees it. They read sizes and captured integers, never scores:
// their cost is a few interval analyses a batch row, and nothing for mods that index by plain variables.
#include "flex/attention.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "base/error.h"
#include "base/rng.h"
#include "flex/interval.h"
#include "flex/program.h"

namespace flexchat {
namespace {

using flex::Axis;
using flex::Expr;
using flex::Interval;
using flex::Op;
using flex::Var;

constexpr double largest_integer = 2147483647;    // kernels compute integers in 32 bits
constexpr int64_t largest_position = 16'777'215;  // lengths up to 2^24 are exact in f32

bool finite(const Interval& r) { return std::isfinite(r.lo) && std::isfinite(r.hi); }

// Every distinct node, operands first.
void collect(const Expr& expr, std::unordered_set<const flex::Node*>& seen, std::vector<Expr>& nodes) {
  if (!seen.insert(&expr.node()).second) return;
  for (const Expr& arg : expr.node().args) collect(arg, seen, nodes);
  nodes.push_back(expr);
}

class CaptureChecker {
 public:
  CaptureChecker(const AttentionShape& shape, const flex::Bindings& bindings)
      : extent_(shape.extent()), bindings_(bindings) {}

  // Values of every captured tensor of `expr`: present, of the right rank and type, readable where needed.
  void check_values(const Expr& expr, bool all_on_host) {
    for (const flex::Capture& capture : flex::Program({expr}).captures) {
      const Tensor& values = bindings_.at(capture);
      const bool integers = capture.type() == flex::Type::integer;
      check(!(all_on_host || integers) || values.arena().host(),
            "captured tensor {} must be in host memory: {} decide which blocks are visited and are checked "
            "before they index anything",
            capture.signature(), integers ? "integers" : "tensors that a mask reads");
      const auto clash = std::find_if(seen_.begin(), seen_.end(), [&](const flex::Capture& other) {
        return other.name() == capture.name() && other.differentiable() != capture.differentiable();
      });
      check(clash == seen_.end(),
            "captured tensor {} is differentiable in one place and not in another; declare it once",
            capture.signature());
      seen_.push_back(capture);
    }
  }

  // No access may leave its tensor, no integer its 32 bits, at any position of the shape; and f32 must hold
  // every position exactly.
  void check_positions(const Expr& expr) const {
    const flex::Box all = all_rows();
    check(std::max(all.q_last, all.kv_last) <= largest_position,
          "position {} is beyond {}, the last that masks and score mods can tell from its neighbours",
          std::max(all.q_last, all.kv_last), largest_position);
    std::unordered_set<const flex::Node*> seen;
    std::vector<Expr> nodes;
    collect(expr, seen, nodes);
    for (const Expr& node : nodes) {
      if (node.node().op == Op::capture) check_access(node);
      if (node.type() == flex::Type::integer) check_integer(node);
    }
  }

 private:
  // Calls visit(range) with bounds of `expr` that together hold for every position of the shape; one box for
  // all rows where nothing tells them apart.
  template <class Visit>
  void for_each_range(const Expr& expr, const Visit& visit) const {
    flex::IntervalAnalysis analysis(expr, bindings_);
    const bool by_row = expr.uses(Var::b) || expr.uses(Var::n_q) || expr.uses(Var::n_kv);
    const bool by_length_only = by_row && !expr.uses(Var::b) && extent_.uniform();
    const int64_t n_head = expr.uses(Var::h) ? extent_.n_head : 1;
    const int64_t n_batch = by_row && !by_length_only ? extent_.n_batch : 1;
    for (int64_t b = 0; b < n_batch; ++b) {
      const flex::Box box = by_row ? row_box(b) : all_rows();
      if (box.q_first > box.q_last || box.kv_first > box.kv_last) continue;  // no element is ever computed
      for (int64_t h = 0; h < n_head; ++h) {
        analysis.set_row(b, h, extent_.q_len(b), extent_.kv_len(b));
        visit(analysis.range(box));
      }
    }
  }

  flex::Box row_box(int64_t b) const {
    return {extent_.q_offset(b), extent_.q_offset(b) + extent_.q_len(b) - 1, 0, extent_.kv_len(b) - 1};
  }
  flex::Box all_rows() const {
    flex::Box all = {0, -1, 0, -1};
    bool first = true;
    for (int64_t b = 0; b < extent_.n_batch; ++b) {
      const flex::Box row = row_box(b);
      if (row.q_first > row.q_last || row.kv_first > row.kv_last) continue;
      all.q_first = first ? row.q_first : std::min(all.q_first, row.q_first);
      all.q_last = std::max(all.q_last, row.q_last);
      all.kv_last = std::max(all.kv_last, row.kv_last);
      first = false;
    }
    return all;
  }

  void check_access(const Expr& access) const {
    const flex::Capture& capture = *access.node().capture;
    const Tensor& values = bindings_.at(capture);
    for (size_t axis = 0; axis < capture.axes().size(); ++axis) {
      const Expr& index = access.node().args[axis];
      check_index_reads(capture, index);
      const int64_t size = values.dim(static_cast<int>(axis));
      for_each_range(index, [&](const Interval& r) {
        if (r.lo >= 0 && r.hi < static_cast<double>(size)) return;
        fail(
            "captured tensor {}: the index {} of axis {} ('{}') may be {} to {}, but that axis has size {}{}",
            capture.signature(), flex::to_text(index), axis + 1, flex::axis_name(capture.axes()[axis]), r.lo,
            r.hi, size, capture.axes()[axis] == Axis::any ? "; bound the index with min and max" : "");
      });
    }
  }

  // The index is computed here as well, so what it reads must be readable here.
  void check_index_reads(const flex::Capture& capture, const Expr& index) const {
    for (const flex::Capture& inner : flex::Program({index}).captures) {
      check(bindings_.at(inner).arena().host(),
            "captured tensor {} must be in host memory: an index of {} depends on it", inner.signature(),
            capture.signature());
    }
  }

  // Bounds that are unknown pass: they prove nothing.
  void check_integer(const Expr& node) const {
    const Op op = node.node().op;
    const bool narrow = op == Op::capture && bindings_.at(*node.node().capture).dtype() != DType::i64;
    const bool may_grow = op == Op::add || op == Op::sub || op == Op::mul || op == Op::neg || op == Op::abs ||
                          op == Op::floor_div || op == Op::capture;
    if (!may_grow || narrow || reads_device(node)) return;
    for_each_range(node, [&](const Interval& r) {
      if (!finite(r) || (r.lo >= -largest_integer && r.hi <= largest_integer)) return;
      fail(
          "the integer `{}` may be {:.0f} to {:.0f}, beyond 32 bits; compute it as a number (write a "
          "constant as 2.0)",
          flex::to_text(node), r.lo, r.hi);
    });
  }

  bool reads_device(const Expr& node) const {
    const std::vector<flex::Capture> captures = flex::Program({node}).captures;
    return std::any_of(captures.begin(), captures.end(),
                       [&](const flex::Capture& c) { return !bindings_.at(c).arena().host(); });
  }

  const flex::Extent extent_;
  const flex::Bindings& bindings_;
  std::vector<flex::Capture> seen_;
};

}  // namespace

void AttentionShape::check() const {
  extent().check();
  flexchat::check(n_kv_head >= 1 && n_head % n_kv_head == 0,
                  "{} query heads cannot share {} key heads; the second must divide the first", n_head,
                  n_kv_head);
  flexchat::check(head_dim >= 1, "a head dim of {}; it must be at least 1", head_dim);
}

void AttentionSpec::check(const AttentionShape& shape) const {
  shape.check();
  flexchat::check(std::isfinite(scale), "attention scale is {}; it must be finite", scale);
  flexchat::check(window >= -1, "attention window is {}; allowed are -1 (none) and up", window);
  flexchat::check(causal || window < 0,
                  "an attention window of {} needs causal; write other windows as a mask", window);
  flexchat::check(dropout >= 0 && dropout < 1, "attention dropout is {}; allowed is 0 up to, not with, 1",
                  dropout);
  flexchat::check(page_size >= 0, "attention page size is {}; allowed are 0 (no pages) and up", page_size);
  if (mask) flex::check_mask(*mask);
  if (score_mod) flex::check_score_mod(*score_mod);

  CaptureChecker checker(shape, bindings);
  if (mask) checker.check_values(*mask, true);
  if (score_mod) checker.check_values(*score_mod, false);
  if (mask) checker.check_positions(*mask);
  if (score_mod) checker.check_positions(*score_mod);
}

uint32_t attention_dropout_bits(uint64_t seed, int64_t b, int64_t h, int64_t q, int64_t kv) {
  const std::array<uint32_t, 4> counter = {static_cast<uint32_t>(kv / 4), static_cast<uint32_t>(q),
                                           static_cast<uint32_t>(h), static_cast<uint32_t>(b)};
  return philox4x32(counter, seed)[static_cast<size_t>(kv % 4)];
}

}  // namespace flexchat
