// An attention made ready for the CPU: the sizes of each row of the batch, the runs of keys that each block
// of queries visits, and the programs of mask and score mod.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "flex/block_mask.h"
#include "flex/tile_program.h"

namespace flexchat::cpu {

constexpr int64_t kForwardRows = 32;   // query rows of a block: tiles that share a panel of keys in L1
constexpr int64_t kBackwardRows = 64;  // more, since the sums of dk and dv run over a block's rows
constexpr int64_t kBlockKeys = 48;     // keys of a block of the mask: whole panels of 1 to 16 lanes

// Keys or rows [begin, end).
struct Range {
  int64_t begin, end;
};
inline Range intersection(const Range& a, const Range& b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}
inline bool empty(const Range& x) { return x.begin >= x.end; }

// One row of a batch.
struct RowSizes {
  int64_t q_len, kv_len, q_offset;
  int64_t n_head, n_kv_head, head_dim;
  bool causal;
  int64_t window;
  float scale;

  int64_t group() const { return n_head / n_kv_head; }
  // Keys that the built-in mask shows to query r, and to some of the queries [r, r + rows).
  Range visible(int64_t r) const {
    if (!causal) return {0, kv_len};
    const int64_t i = q_offset + r, end = std::min(kv_len, i + 1);
    return {window < 0 ? 0 : std::min(end, std::max<int64_t>(0, i - window)), end};
  }
  Range visible_block(int64_t r, int64_t rows) const { return {visible(r).begin, visible(r + rows - 1).end}; }
};

// A run of keys; `masked`: the mask forbids some of them to some queries.
struct Segment {
  Range keys;
  bool masked;
};

// The runs of keys that each block of queries visits, in ascending order. Begins are multiples of kBlockKeys.
class SegmentLists {
 public:
  SegmentLists() = default;
  SegmentLists(const flex::BlockMask& mask, const flex::Extent& extent);
  // The same for blocks of twice the queries.
  SegmentLists doubled(const flex::Extent& extent) const;

  std::span<const Segment> operator()(int64_t b, int64_t h, int64_t block) const {
    const int64_t list = ((n_batch_ == 1 ? 0 : b) * n_head_ + (n_head_ == 1 ? 0 : h)) * n_blocks_ + block;
    const auto at = static_cast<size_t>(list);
    return {segments_.data() + begin_[at], static_cast<size_t>(begin_[at + 1] - begin_[at])};
  }

 private:
  void add(std::vector<uint8_t>& states, int64_t kv_len);

  int64_t n_batch_ = 1, n_head_ = 1, n_blocks_ = 0, n_kv_blocks_ = 0;
  std::vector<int64_t> begin_{0};
  std::vector<Segment> segments_;
};

// A differentiable captured tensor whose gradient a backward pass sums: first for each (row b, key head g)
// by itself, where an axis that only `b` indexes has one entry and one that only `h` indexes those of the
// heads that read g, then over these parts in order.
struct CaptureGradient {
  std::string name;
  std::vector<int64_t> sizes{};    // of a part
  std::vector<int64_t> strides{};  // of a part, 0 for an axis of b
  int batch_axis = -1, head_axis = -1;
  std::vector<size_t> accesses{};  // of the backward programs; root 2 + i is the derivative of access i
  int64_t numel() const;
};

class CpuAttentionPlan final : public AttentionPlan {
 public:
  CpuAttentionPlan(const AttentionShape& shape, const AttentionSpec& spec);
  std::string_view kernel() const override { return "cpu"; }
  std::string_view reason() const override { return reason_; }

  RowSizes row(int64_t b) const;
  const flex::Extent& extent() const { return extent_; }
  // Does it need more than the built-in mask, positive scales and sums?
  bool programmable() const { return programmable_; }

  // The segments of a block of kForwardRows or kBackwardRows queries, cut to what the built-in mask shows.
  void segments(bool backward, int64_t b, int64_t h, int64_t block, std::vector<Segment>& out) const;

  // Programs, or null. Roots: the mask; the modded score, and for backward its derivative and those by
  // captured tensors.
  const flex::TileProgram* mask() const { return mask_ ? &*mask_ : nullptr; }
  const flex::TileProgram* mod(bool backward) const {
    const auto& program = backward ? backward_mod_ : forward_mod_;
    return program ? &*program : nullptr;
  }
  bool has_mod() const { return has_mod_; }
  const std::vector<CaptureGradient>& capture_gradients() const { return capture_gradients_; }

  float dropout_factor() const { return static_cast<float>(1 / (1 - spec().dropout)); }
  // Weights whose bits are below this are dropped.
  uint64_t dropout_threshold() const { return static_cast<uint64_t>(std::ceil(spec().dropout * 0x1p32)); }

 private:
  void compile_mod(const flex::Expr& mod);

  flex::Extent extent_;
  std::string reason_;
  bool programmable_, has_mod_;
  SegmentLists forward_segments_, backward_segments_;
  std::optional<flex::TileProgram> mask_, forward_mod_, backward_mod_;
  std::vector<CaptureGradient> capture_gradients_;
};

// `plan` as this backend made it; an error for another's.
const CpuAttentionPlan& checked_plan(const AttentionPlan& plan);

}  // namespace flexchat::cpu
