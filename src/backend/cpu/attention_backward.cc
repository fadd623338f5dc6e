// Attention with any mask and score mod, backward: a thread works on one (batch, key head), whose query heads
// and blocks of query rows it sums in order, so that every sum has a fixed order for any number of threads.
// FLOPs: 10 * rows * visible keys * D. With s the scores, m the factors of dropout, D = dout.out - dlse:
//   p = exp(mod(s) - lse),  ds' = p (m dout.v - D),  ds = ds' mod'(s),  dc = sum ds' dmod/dc
//   dq = scale ds k,  dk = scale ds^T q,  dv = (p m)^T dout
// The mod and its derivatives are computed again by the tile interpreter. Gradients of captured tensors are
// summed in double for each (batch, key head) and then over those, in order.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention_backward.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include "backend/cpu/attention_blocks-inl.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"

#ifndef FLEXCHAT_ATTENTION_BACKWARD_PARTS
#define FLEXCHAT_ATTENTION_BACKWARD_PARTS
namespace flexchat::cpu {

// The gradient of a captured tensor: a part for each (batch, key head), added up at the end.
struct CaptureSum {
  const CaptureGradient* gradient;
  Tensor out;
  std::vector<double> parts;  // (B, G, gradient->numel())

  double* part(int64_t task) { return parts.data() + task * gradient->numel(); }
};

}  // namespace flexchat::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {
namespace {

using cpu::CaptureSum;
using cpu::CpuAttentionPlan;
using cpu::kBackwardRows;

// Query rows and keys of a block without programs: long sums over rows keep dk and dv in registers, and what
// a tile of any product reads again stays in L1. Blocks of a mask have fewer rows, as its edges cost whole
// ones.
constexpr int64_t kPlainRows = 128, kPlainKeys = 192;
constexpr int64_t kMostRows = std::max(kPlainRows, kBackwardRows);
constexpr int64_t kMostKeys = std::max(kPlainKeys, kTileKeys);

// A key head of n keys packed for backward, and where its dk and dv are summed.
struct KeyHead {
  int64_t n;
  const float *k_panels, *k_slabs, *v_panels;
  Target dk, dv;
  int64_t written = 0;  // keys before this one have a dk and dv that others add to
};

// A block of query rows as f32, plainly and as slabs.
struct QueryRows {
  Rows q, d_o;
  const float *q_slabs, *do_slabs;
};

// One (batch, key head).
struct KeyTask {
  const CpuAttentionPlan& plan;
  const AttentionTensors& x;
  const AttentionGradients& grads;
  int64_t b, g;
  RowSizes sizes;
  std::vector<CaptureSum>& captures;

  int64_t number() const { return b * sizes.n_kv_head + g; }
};

// scores become the weights P; dscores, the gradient of P, become that of the scores. kHoles: scores may be
// -inf. delta[r] = scale * (dO . O - dlse).
template <bool kHoles>
void softmax_backward(const Block& block, const float* lse, const float* delta, float* scores,
                      float* dscores) {
  const float scale = block.sizes.scale;
  const VF a = set(scale * kLog2E), factor = set(scale), zero = set(0);
  for (int64_t r = 0; r < block.rows; ++r) {
    const Span span = span_of(block, r);
    if (empty(span.read)) continue;
    float *p = scores + r * block.stride(), *ds = dscores + r * block.stride();
    const VF d_r = set(delta[r]), shift = set(lse[r] * kLog2E);
    for_each_score(span, [&](int64_t i, auto keep) HWY_ATTR {
      const VF s = hn::LoadU(F32(), p + i);
      VF e = keep(exp2(hn::MulSub(a, s, shift)), zero);
      VF g = keep(hn::MulSub(factor, hn::LoadU(F32(), ds + i), d_r), zero);
      if constexpr (kHoles) {
        const auto blind = hn::Eq(s, minus_infinity());
        e = hn::IfThenZeroElse(blind, e);
        g = hn::IfThenZeroElse(blind, g);
      }
      hn::StoreU(e, F32(), p + i);
      hn::StoreU(hn::Mul(e, g), F32(), ds + i);
    });
  }
}

// Of rows, those from the first tile that is shown some of the keys to the last.
Range rows_shown(const Block& block, const Range& rows, const Range& keys) {
  if (!block.shown || empty(rows)) return rows;
  const auto blind = [&](int64_t tile) { return empty(intersection(block.shown[tile], keys)); };
  int64_t first = rows.begin / kTileRows, last = (rows.end - 1) / kTileRows;
  while (first <= last && blind(first)) ++first;
  while (last > first && blind(last)) --last;
  return intersection(rows, {first * kTileRows, (last + 1) * kTileRows});
}

// Zeros where a masked block's rows of weights were not computed, for sums over rows read them.
void clear_hidden(const Block& block, float* scores) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const Range read = span_of(block, r).read;
    float* p = scores + r * block.stride();
    std::fill(p, p + read.begin, 0.0f);
    std::fill(p + read.end, p + block.stride(), 0.0f);
  }
}

// Adds a block's scores to dk and dv of their key head.
void add_to_keys(const Block& block, const QueryRows& x, const float* scores, const float* dscores,
                 KeyHead& keys) {
  const int64_t d = block.sizes.head_dim;
  const Range part = intersection(block.keys(), block.part);
  KeyTile tiles[kMostKeys / kTileRows + 2];
  int n_tiles = 0;
  Range seen = {0, 0};  // rows to which the built-in mask shows some of the keys [j, j + kTileRows)
  for (int64_t j = part.begin / kTileRows * kTileRows; j < part.end; j += kTileRows) {
    const int64_t n = std::min<int64_t>(kTileRows, keys.n - j);
    while (seen.begin < block.rows && block.row(seen.begin).end <= j) ++seen.begin;
    while (seen.end < block.rows && block.row(seen.end).begin < j + n) ++seen.end;
    const Range rows = rows_shown(block, seen, {j, j + n});
    if (empty(rows)) continue;
    tiles[n_tiles++] = {j, n, rows, j < keys.written};
    keys.written = std::max(keys.written, j + kTileRows);
  }
  const std::span<const KeyTile> all(tiles, static_cast<size_t>(n_tiles));
  multiply_transposed(block, all, dscores, x.q_slabs, d, keys.dk);
  multiply_transposed(block, all, scores, x.do_slabs, d, keys.dv);
}

// Can softmax_backward() do it?
bool is_mask_only(const CpuAttentionPlan& plan) { return !plan.has_mod() && plan.spec().dropout == 0; }

// ---- the built-in mask alone ----------------------------------------------------------------------------

void plain_rows(const Block& rows, const QueryRows& query, KeyHead& keys, const float* lse,
                const float* delta, const Target& dq, Scratch& x) {
  const int64_t d = rows.sizes.head_dim;
  const Range all = rows.keys();
  const int64_t step = round_up(kPlainKeys, panel_width()), first = all.begin / step * step;
  for (int64_t j = first; j == first || j < all.end; j += step) {
    const Block block = {rows.sizes, 0, rows.r0, rows.rows, {j, std::min(j + step, keys.n)}};
    float *scores = block.reserve(x.s), *dscores = block.reserve(x.ds);
    multiply_scores(block, query.q, keys.k_panels, d, scores);
    multiply_scores(block, query.d_o, keys.v_panels, d, dscores);
    softmax_backward<false>(block, lse, delta, scores, dscores);
    multiply_weights(block, block.part, j == first ? Chunk::first : Chunk::later, dscores, keys.k_slabs,
                     keys.n, d, nullptr, dq);
    add_to_keys(block, query, scores, dscores, keys);
  }
}

// ---- any mask and mod -----------------------------------------------------------------------------------

// Adds a row's shares dscore * derivative to the gradient of a captured tensor. Keys begin at column `first`.
void add_capture_row(const TileMachine& m, size_t access, const Span& span, int64_t first, int64_t first_key,
                     const float* dmodded, double* gradient, float* row) {
  const TileOperand derivative = m.root(2 + access), offset = m.offsets(access);
  const VF zero = set(0);
  VF total = zero;
  for (int64_t i = span.read.begin; i < span.read.end; i += vector_lanes()) {
    const VF d = hn::LoadU(F32(), dmodded + i);
    const VF share = hn::IfThenZeroElse(hn::Eq(d, zero), hn::Mul(d, derivative.at(i - first)));
    hn::StoreU(share, F32(), row + i - first);
    total = hn::Add(total, share);
  }
  switch (m.program().accesses[access].kind) {
    case flex::TileIndex::row:
      gradient[offset.first_integer()] += static_cast<double>(sum_lanes(total));
      return;
    case flex::TileIndex::contiguous: {
      double* to = gradient + offset.first_integer() + first_key;
      for (int64_t i = span.keys.begin; i < span.keys.end; ++i)
        to[i - first] += static_cast<double>(row[i - first]);
      return;
    }
    case flex::TileIndex::scattered: {
      const auto* at = reinterpret_cast<const int32_t*>(offset.data);
      for (int64_t i = span.keys.begin; i < span.keys.end; ++i) {
        gradient[at[(i - first) * offset.step]] += static_cast<double>(row[i - first]);
      }
      return;
    }
  }
}

// One row of a tile after its program has run: scores are modded ones and become the weights of dV, dscores,
// the gradient of P, become that of q.k.
struct ModdedRow {
  const KeyTask& task;
  int64_t h, r;  // r within the head
  float exponent_scale, lse, delta;
};

void modded_row(const ModdedRow& row, const TileMachine& m, const Piece& piece, float* dscores, int64_t first,
                const Span& span, int64_t r_in_block, Scratch& x) {
  const CpuAttentionPlan& plan = row.task.plan;
  const Block& block = piece.block;
  float *p = piece.scores + r_in_block * block.stride(), *ds = dscores + r_in_block * block.stride();
  const VF a = set(row.exponent_scale), shift = set(row.lse * kLog2E), delta = set(row.delta), zero = set(0),
           scale = set(row.task.sizes.scale);
  const int64_t first_key = block.base + block.part.begin + first;
  const float* kept = nullptr;
  if (plan.spec().dropout > 0) {
    const int64_t n = span.read.end - span.read.begin;
    float* factors = x.kept.reserve(dropout_room(n));
    DropoutRow(plan, row.task.b, row.h, row.r).factors(first_key + span.read.begin - first, n, factors);
    kept = factors;
  }
  for_each_score(span, [&](int64_t i, auto keep) HWY_ATTR {
    const VF s = hn::LoadU(F32(), p + i);
    const VF factor = kept ? hn::LoadU(F32(), kept + i - span.read.begin) : set(1);
    const auto blind = hn::Eq(s, minus_infinity());
    const VF e = keep(hn::IfThenZeroElse(blind, exp2(hn::MulSub(a, s, shift))), zero);
    const VF g = hn::MulSub(factor, hn::LoadU(F32(), ds + i), delta);
    hn::StoreU(hn::Mul(e, factor), F32(), p + i);
    hn::StoreU(keep(hn::IfThenZeroElse(blind, hn::Mul(e, g)), zero), F32(), ds + i);
  });
  if (plan.has_mod()) {
    for (CaptureSum& c : row.task.captures) {
      double* part = c.part(row.task.number());
      if (c.gradient->head_axis >= 0) {  // offsets count heads from 0, the part from those of this key head
        part -= row.task.g * row.task.sizes.group() *
                c.gradient->strides[static_cast<size_t>(c.gradient->head_axis)];
      }
      for (const size_t access : c.gradient->accesses)
        add_capture_row(m, access, span, first, first_key, ds, part,
                        x.row.reserve(kTileKeys + vector_lanes()));
    }
  }
  const TileOperand derivative = plan.has_mod() ? m.root(1) : TileOperand{};
  for (int64_t i = span.read.begin; i < span.read.end; i += vector_lanes()) {
    const VF d = hn::Mul(scale, hn::LoadU(F32(), ds + i));
    const VF with_mod = plan.has_mod() ? hn::Mul(d, derivative.at(i - first)) : d;
    hn::StoreU(hn::IfThenZeroElse(hn::Eq(d, zero), with_mod), F32(), ds + i);
  }
}

void modded_rows(const KeyTask& task, int64_t h, const Block& rows, const QueryRows& query, KeyHead& keys,
                 const float* lse, const float* delta, const Target& dq, Scratch& x) {
  const int64_t d = rows.sizes.head_dim, r0 = rows.r0;
  for (int64_t r = 0; r < rows.rows; ++r)
    std::fill_n(dq.data + r * dq.stride, round_up(d, vector_lanes()), 0.0f);
  x.hook.rows(rows.sizes.q_offset + r0, rows.rows);
  task.plan.segments(true, task.b, h, r0 / kBackwardRows, x.segments);
  const bool mask_only = is_mask_only(task.plan);
  for (const cpu::Segment& segment : x.segments) {
    for (int64_t j = segment.keys.begin; j < segment.keys.end; j += kTileKeys) {
      Piece piece = {{rows.sizes, 0, r0, rows.rows, {j, std::min(j + kTileKeys, segment.keys.end)}},
                     nullptr,
                     segment.masked};
      const Block& block = piece.block;
      float *scores = block.reserve(x.s), *dscores = block.reserve(x.ds);
      piece.scores = scores;
      if (piece.masked) {
        x.hook.look(piece, grown(x.allowed, block.rows * piece.row_bytes() + kBitsRoom),
                    grown(x.shown, piece.n_tiles()));
      }
      multiply_scores(block, query.q, keys.k_panels, d, scores);
      multiply_scores(block, query.d_o, keys.v_panels, d, dscores);
      if (mask_only && !piece.masked) {
        softmax_backward<false>(block, lse, delta, scores, dscores);
      } else if (mask_only) {
        x.hook.apply(piece);
        softmax_backward<true>(block, lse, delta, scores, dscores);
      } else {
        x.hook.apply(piece, [&](const TileMachine& m, int64_t r, int64_t first, const Span& span) {
          const ModdedRow row = {task, h, r0 + r, x.hook.exponent_scale(), lse[r], delta[r]};
          modded_row(row, m, piece, dscores, first, span, r, x);
        });
      }
      if (piece.masked) {
        clear_hidden(block, scores);
        clear_hidden(block, dscores);
      }
      multiply_weights(block, block.part, Chunk::added, dscores, keys.k_slabs, keys.n, d, nullptr, dq);
      add_to_keys(block, query, scores, dscores, keys);
    }
  }
}

// ---- heads ----------------------------------------------------------------------------------------------

// Adds query rows [r0, r0 + rows) of head h to dk and dv of their key head and writes their dq.
template <class T>
void backward_rows(const KeyTask& task, int64_t h, int64_t r0, int64_t rows, KeyHead& keys, Scratch& x) {
  const auto& [plan, tensors, grads, b, g, sizes, captures] = task;
  const HeadsView &q = tensors.q, &out = tensors.out, &dout = grads.dout;
  const int64_t d = sizes.head_dim, width = round_up(d, vector_lanes());
  float *q_slabs = x.q_slabs.reserve(rows * width), *do_slabs = x.do_slabs.reserve(rows * width);
  pack_slabs(head<T>(q, b, r0, h, d), q.token_stride, rows, d, q_slabs);
  pack_slabs(head<T>(dout, b, r0, h, d), dout.token_stride, rows, d, do_slabs);
  const QueryRows query = {rows_of<T>(q, b, r0, rows, h, d, x.q), rows_of<T>(dout, b, r0, rows, h, d, x.d_o),
                           q_slabs, do_slabs};
  const int64_t row = (b * sizes.n_head + h) * plan.shape().q_len + r0;
  const float scale =
      is_mask_only(plan) ? sizes.scale : 1.0f;  // which softmax_backward() has not to do again
  float delta[kMostRows];
  for (int64_t r = 0; r < rows; ++r) {
    const float dlse = grads.dlse ? grads.dlse->as<float>()[row + r] : 0.0f;
    delta[r] = scale * (dot(query.d_o.data + r * query.d_o.stride, head<T>(out, b, r0 + r, h, d), d) - dlse);
    if (const int64_t next = r0 + rows + r; next < sizes.q_len) {
      for (const HeadsView* y : {&q, &out, &dout}) prefetch_row(head<T>(*y, b, next, h, d), d);
    }
  }
  const Target dq = target_of<T>(grads.dq, b, r0, rows, h, d, x.dq);
  const Block block = {sizes, 0, r0, rows, {0, keys.n}};
  const float* lse = tensors.lse->as<float>() + row;
  if (plan.programmable()) {
    modded_rows(task, h, block, query, keys, lse, delta, dq, x);
  } else {
    plain_rows(block, query, keys, lse, delta, dq, x);
  }
  put_rows<T>(dq, grads.dq, b, r0, rows, h, d);
}

// Key head g of batch b, with all the query heads that read it, summed in order.
template <class T>
void backward_key_head(const KeyTask& task, Scratch& x) {
  const auto& [plan, tensors, grads, b, g, sizes, captures] = task;
  const AttentionShape& s = plan.shape();
  const int64_t d = sizes.head_dim, group = sizes.group(), n = sizes.q_len > 0 ? sizes.kv_len : 0;
  clear_rows<T>(grads.dk, b, {n, s.kv_len}, g, d);
  clear_rows<T>(grads.dv, b, {n, s.kv_len}, g, d);
  const int64_t q_len = n > 0 ? sizes.q_len : 0;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) clear_rows<T>(grads.dq, b, {q_len, s.q_len}, h, d);
  if (n == 0) return;

  const HeadsView &k = tensors.k, &v = tensors.v;
  float *k_panels = x.k.reserve(round_up(n, panel_width()) * d),
        *v_panels = x.v.reserve(round_up(n, panel_width()) * d),
        *k_slabs = x.k_slabs.reserve(n * round_up(d, vector_lanes()));
  pack_panels(head<T>(k, b, 0, g, d), k.token_stride, n, d, k_panels);
  pack_panels(head<T>(v, b, 0, g, d), v.token_stride, n, d, v_panels);
  pack_slabs(head<T>(k, b, 0, g, d), k.token_stride, n, d, k_slabs);
  KeyHead keys = {n,
                  k_panels,
                  k_slabs,
                  v_panels,
                  target_of<T>(grads.dk, b, 0, n, g, d, x.dk),
                  target_of<T>(grads.dv, b, 0, n, g, d, x.dv)};
  // Without a mask keys are seen without gaps, and the first query head to see them writes.
  const Range seen = plan.programmable() ? Range{0, 0} : sizes.visible_block(0, q_len);
  if (plan.programmable()) keys.written = n;
  for (int64_t t = 0; t < n; ++t) {
    if (t >= seen.begin && t < seen.end) continue;
    std::fill_n(keys.dk.data + t * keys.dk.stride, round_up(d, vector_lanes()), 0.0f);
    std::fill_n(keys.dv.data + t * keys.dv.stride, round_up(d, vector_lanes()), 0.0f);
  }
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    if (plan.programmable()) x.hook.start(plan, true, b, h);
    const int64_t step = plan.programmable() ? kBackwardRows : kPlainRows;
    for (int64_t r0 = 0; r0 < q_len; r0 += step)
      backward_rows<T>(task, h, r0, std::min(step, q_len - r0), keys, x);
  }
  put_rows<T>(keys.dk, grads.dk, b, 0, n, g, d);
  put_rows<T>(keys.dv, grads.dv, b, 0, n, g, d);
}

}  // namespace

void AttentionBackward(const CpuAttentionPlan& plan, const AttentionTensors& x,
                       const AttentionGradients& grads, std::vector<CaptureSum>& captures) {
  with_float_type(x.q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t n_kv_head = plan.shape().n_kv_head;
    parallel_for(plan.shape().batch * n_kv_head, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = thread_scratch();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n_kv_head;
        backward_key_head<T>({plan, x, grads, b, i % n_kv_head, plan.row(b), captures}, scratch);
      }
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {
namespace cpu {
namespace {

std::vector<CaptureSum> make_sums(const CpuAttentionPlan& plan, const AttentionGradients& grads) {
  std::vector<CaptureSum> sums;
  const int64_t tasks = plan.shape().batch * plan.shape().n_kv_head;
  for (const auto& [name, out] : grads.captures) {
    const auto& all = plan.capture_gradients();
    const auto found =
        std::find_if(all.begin(), all.end(), [&, &wanted = name](const auto& c) { return c.name == wanted; });
    if (found == all.end()) fail("the score mod has no differentiable captured tensor '{}'", name);
    sums.push_back({&*found, out, std::vector<double>(static_cast<size_t>(tasks * found->numel()), 0.0)});
  }
  return sums;
}

// out = the parts, added in the order of (b, g).
void add_up(CaptureSum& sum, const AttentionShape& shape) {
  const CaptureGradient& c = *sum.gradient;
  const auto rank = static_cast<int>(c.sizes.size());
  std::vector<double> total(static_cast<size_t>(sum.out.numel()), 0.0);
  for (int64_t task = 0; task < shape.batch * shape.n_kv_head; ++task) {
    const int64_t b = task / shape.n_kv_head, g = task % shape.n_kv_head;
    const double* part = sum.part(task);
    for (int64_t i = 0; i < c.numel(); ++i) {
      int64_t rest = i, entry = 0, step = 1;
      for (int axis = rank - 1; axis >= 0; --axis) {
        const int64_t size = c.sizes[static_cast<size_t>(axis)];
        int64_t index = rest % size;
        rest /= size;
        if (axis == c.batch_axis) index = b;
        if (axis == c.head_axis) index += g * size;
        entry += index * step;
        step *= sum.out.dim(axis);
      }
      total[static_cast<size_t>(entry)] += part[i];
    }
  }
  float* out = sum.out.as<float>();
  for (size_t i = 0; i < total.size(); ++i) out[i] = static_cast<float>(total[i]);
}

}  // namespace
}  // namespace cpu

HWY_EXPORT(AttentionBackward);

void CpuBackend::attention_backward(const AttentionPlan& plan, const AttentionTensors& x,
                                    const AttentionGradients& grads) {
  const cpu::CpuAttentionPlan& mine = cpu::checked_plan(plan);
  check(plan.spec().page_size == 0, "attention over pages has no backward");
  std::vector<cpu::CaptureSum> captures = cpu::make_sums(mine, grads);
  HWY_DYNAMIC_DISPATCH(AttentionBackward)(mine, x, grads, captures);
  for (cpu::CaptureSum& sum : captures) cpu::add_up(sum, plan.shape());
}

}  // namespace flexchat
#endif  // HWY_ONCE
