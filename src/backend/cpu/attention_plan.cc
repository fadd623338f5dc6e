#include "backend/cpu/attention_plan.h"

#include <set>

#include "backend/attention_support.h"
#include "backend/cpu/cpu_backend.h"
#include "base/error.h"
#include "base/strings.h"
#include "flex/derivative.h"

namespace flexchat {
namespace cpu {
namespace {

constexpr uint8_t kEmpty = 0, kFull = 1, kPartial = 2;

std::string reason_for(const AttentionSpec& spec) {
  std::vector<std::string> parts;
  if (spec.causal) parts.emplace_back(spec.window < 0 ? "built-in causal mask" : "built-in window mask");
  if (spec.mask) parts.emplace_back("mask by the tile interpreter");
  if (spec.score_mod) parts.emplace_back("score mod by the tile interpreter");
  if (spec.dropout > 0) parts.emplace_back("dropout");
  if (spec.page_size > 0) parts.emplace_back("pages gathered head by head");
  return "the one kernel of the CPU, for every case" + (parts.empty() ? "" : ": " + join(parts));
}

}  // namespace

// ---- segments -------------------------------------------------------------------------------------------

// Appends the runs of equal states as a new list.
void SegmentLists::add(std::vector<uint8_t>& states, int64_t kv_len) {
  for (size_t j = 0; j < states.size();) {
    size_t end = j + 1;
    while (end < states.size() && states[end] == states[j]) ++end;
    if (states[j] != kEmpty) {
      segments_.push_back(
          {{static_cast<int64_t>(j) * kBlockKeys, std::min(kv_len, static_cast<int64_t>(end) * kBlockKeys)},
           states[j] == kPartial});
    }
    j = end;
  }
  begin_.push_back(static_cast<int64_t>(segments_.size()));
  std::fill(states.begin(), states.end(), kEmpty);
}

SegmentLists::SegmentLists(const flex::BlockMask& mask, const flex::Extent& extent)
    : n_batch_(mask.n_batch),
      n_head_(mask.n_head),
      n_blocks_(mask.n_q_blocks),
      n_kv_blocks_(mask.n_kv_blocks) {
  std::vector<uint8_t> states(static_cast<size_t>(n_kv_blocks_), kEmpty);
  for (int64_t b = 0; b < n_batch_; ++b) {
    for (int64_t i = 0; i < n_head_ * n_blocks_; ++i) {
      const int64_t row = b * n_head_ * n_blocks_ + i;
      for (const int32_t j : mask.full.row(row)) states[static_cast<size_t>(j)] = kFull;
      for (const int32_t j : mask.partial.row(row)) states[static_cast<size_t>(j)] = kPartial;
      add(states, extent.kv_len(b));
    }
  }
}

SegmentLists SegmentLists::doubled(const flex::Extent& extent) const {
  SegmentLists result;
  result.n_batch_ = n_batch_;
  result.n_head_ = n_head_;
  result.n_blocks_ = (n_blocks_ + 1) / 2;
  result.n_kv_blocks_ = n_kv_blocks_;
  const auto size = static_cast<size_t>(n_kv_blocks_);
  std::vector<uint8_t> states(size, kEmpty), visits(size, kEmpty);
  for (int64_t b = 0; b < n_batch_; ++b) {
    for (int64_t h = 0; h < n_head_; ++h) {
      for (int64_t i = 0; i < n_blocks_; i += 2) {
        // Full where every block of queries that exists says so; queries beyond q_len exist nowhere.
        uint8_t n = 0;
        for (int64_t k = i; k < std::min(i + 2, n_blocks_); ++k) {
          if (k > i && k * kForwardRows >= extent.q_len(b)) continue;
          ++n;
          for (const Segment& s : (*this)(b, h, k)) {
            for (int64_t j = s.keys.begin / kBlockKeys; j * kBlockKeys < s.keys.end; ++j) {
              const auto at = static_cast<size_t>(j);
              ++visits[at];
              states[at] = std::max(states[at], s.masked ? kPartial : kFull);
            }
          }
        }
        for (size_t j = 0; j < size; ++j) {
          if (visits[j] > 0 && visits[j] < n) states[j] = kPartial;
        }
        std::fill(visits.begin(), visits.end(), kEmpty);
        result.add(states, extent.kv_len(b));
      }
    }
  }
  return result;
}

// ---- the plan -------------------------------------------------------------------------------------------

int64_t CaptureGradient::numel() const {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

CpuAttentionPlan::CpuAttentionPlan(const AttentionShape& attention_shape, const AttentionSpec& attention_spec)
    : AttentionPlan(attention_shape, attention_spec),
      extent_(shape().extent()),
      reason_(reason_for(spec())),
      programmable_(!spec().plain() || spec().dropout > 0 || spec().scale <= 0),
      // Scales that are not positive do not keep the order of scores, so the mod `score` applies them first.
      has_mod_(spec().score_mod.has_value() || spec().scale <= 0) {
  if (spec().mask) {
    forward_segments_ = SegmentLists(
        flex::build_block_mask(*spec().mask, spec().bindings, extent_, kForwardRows, kBlockKeys), extent_);
    backward_segments_ = forward_segments_.doubled(extent_);
  }
  if (spec().mask) mask_.emplace(std::vector{*spec().mask}, spec().bindings);
  if (has_mod_) compile_mod(spec().score_mod ? *spec().score_mod : flex::variables().score);
}

void CpuAttentionPlan::compile_mod(const flex::Expr& mod) {
  const AttentionSpec& s = spec();
  forward_mod_.emplace(std::vector{mod}, s.bindings);
  std::vector<flex::Expr> roots = {mod, flex::score_derivative(mod)};
  const std::vector<flex::CaptureDerivative> derivatives = flex::capture_derivatives(mod);
  for (size_t i = 0; i < derivatives.size(); ++i) {
    roots.push_back(derivatives[i].derivative);
    const flex::Node& node = derivatives[i].access.node();
    auto found = std::find_if(capture_gradients_.begin(), capture_gradients_.end(),
                              [&](const CaptureGradient& c) { return c.name == node.capture->name(); });
    if (found == capture_gradients_.end()) {
      found = capture_gradients_.insert(found, CaptureGradient{.name = node.capture->name()});
    }
    found->accesses.push_back(i);
  }
  for (CaptureGradient& c : capture_gradients_) {
    const auto& first = derivatives[c.accesses[0]].access.node();
    const Tensor& values = s.bindings.at(*first.capture);
    const auto only = [&](size_t axis, flex::Var var) {
      return std::all_of(c.accesses.begin(), c.accesses.end(), [&](size_t i) {
        return same(derivatives[i].access.node().args[axis], flex::Expr::variable(var));
      });
    };
    for (size_t axis = 0; axis < first.args.size(); ++axis) {
      const auto at = static_cast<int>(axis);
      c.sizes.push_back(values.dim(at));
      if (c.batch_axis < 0 && only(axis, flex::Var::b)) {
        c.batch_axis = at;
        c.sizes.back() = 1;
      } else if (c.head_axis < 0 && only(axis, flex::Var::h)) {
        c.head_axis = at;
        c.sizes.back() = shape().n_head / shape().n_kv_head;
      }
    }
    int64_t stride = 1;
    c.strides.assign(c.sizes.size(), 0);
    for (size_t axis = c.sizes.size(); axis-- > 0;) {
      if (static_cast<int>(axis) != c.batch_axis) c.strides[axis] = stride;
      stride *= c.sizes[axis];
    }
  }
  std::vector<flex::TileProgram::Access> accesses;
  for (size_t i = 0; i < derivatives.size(); ++i) {
    for (const CaptureGradient& c : capture_gradients_) {
      if (c.name == derivatives[i].access.node().capture->name())
        accesses.push_back({derivatives[i].access, c.strides});
    }
  }
  backward_mod_.emplace(roots, s.bindings, accesses);
}

RowSizes CpuAttentionPlan::row(int64_t b) const {
  const AttentionShape& s = shape();
  return {extent_.q_len(b), extent_.kv_len(b), extent_.q_offset(b),
          s.n_head,         s.n_kv_head,       s.head_dim,
          spec().causal,    spec().window,     static_cast<float>(spec().scale)};
}

void CpuAttentionPlan::segments(bool backward, int64_t b, int64_t h, int64_t block,
                                std::vector<Segment>& out) const {
  const RowSizes sizes = row(b);
  const int64_t step = backward ? kBackwardRows : kForwardRows, r0 = block * step;
  const Range seen = sizes.visible_block(r0, std::min(step, sizes.q_len - r0));
  const Range blocks = {seen.begin / kBlockKeys * kBlockKeys, seen.end};
  out.clear();
  if (!spec().mask) {
    if (!empty(seen)) out.push_back({blocks, false});
    return;
  }
  for (const Segment& s : (backward ? backward_segments_ : forward_segments_)(b, h, block)) {
    const Range keys = intersection(s.keys, blocks);
    if (!empty(keys)) out.push_back({keys, s.masked});
  }
}

const CpuAttentionPlan& checked_plan(const AttentionPlan& plan) {
  const auto* mine = dynamic_cast<const CpuAttentionPlan*>(&plan);
  if (!mine) fail("an attention plan for kernel '{}' cannot run on the cpu backend", plan.kernel());
  return *mine;
}

}  // namespace cpu

std::vector<std::string> CpuBackend::attention_kernels() const { return {"cpu"}; }

std::shared_ptr<const AttentionPlan> CpuBackend::plan_attention(const AttentionShape& shape,
                                                                const AttentionSpec& spec,
                                                                std::string_view kernel) {
  if (kernel != "auto" && kernel != "cpu") {
    fail("the cpu backend has no attention kernel '{}'{}; allowed: auto, {}", kernel,
         did_you_mean(kernel, attention_kernels()), join(attention_kernels()));
  }
  spec.check(shape);
  check_attention_support("cpu", shape, spec);
  return std::make_shared<cpu::CpuAttentionPlan>(shape, spec);
}

}  // namespace flexchat
