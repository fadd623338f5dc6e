// Attention with any mask and score mod, forward (flex/attention.h says what it computes), blocked over query
// rows so that scores stay in L2: register-tiled products (attention_kernels-inl.h) with a two-pass softmax
// between them. A thread works on one (batch, head), and every sum has a fixed order for any number of
// threads. FLOPs: 4 * rows * visible keys * D. A mask is visited block by block from the plan's segments;
// where it hides only some keys, the tile interpreter (flex_tile-inl.h) evaluates it before the products,
// which leave out what no row of a tile sees. Between products and softmax it turns scores into modded ones,
// -inf where forbidden. A forward of few query rows over many keys does not repay packing them: 2 .. 15 rows
// and single rows read keys and values where they lie. Keys in pages are gathered first, so pages change no
// bit. Arithmetic is f32; bf16 and f16 heads are converted as they are packed.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "backend/cpu/attention_blocks-inl.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {
namespace {

using cpu::CpuAttentionPlan;
using cpu::kForwardRows;

constexpr int64_t kChunk = 192;      // keys whose slabs the tiles of a block share in sums over keys
constexpr int64_t kPackedRows = 16;  // query rows of a key head that repay packing its keys

// One head's share of a forward.
struct HeadTask {
  const CpuAttentionPlan& plan;
  const AttentionTensors& x;
  int64_t b, h;
  RowSizes sizes;
  float* lse;  // of this head, or null

  int64_t key_head() const { return h / sizes.group(); }
};

// Sums of exponentials of a block's rows, in base 2: sum[r] of 2^(score - shift[r]).
struct RowSums {
  float shift[kForwardRows], sum[kForwardRows];

  // factor[r] = 1 / sum[r], or 0 for a row that sees nothing, whose lse is -inf. lse may be null.
  void finish(int64_t rows, float* factor, float* lse) const {
    // ln 2 in two pieces: the product with a shift is then exact enough for any score.
    const VF zero = set(0), ln2 = set(0.693145752f), ln2_rest = set(1.42860677e-6f);
    for_each_vector(rows, [&](int64_t r, auto lanes) HWY_ATTR {
      const VF total = load(sum + r, lanes), m = load(shift + r, lanes);
      store(hn::IfThenZeroElse(hn::Eq(total, zero), hn::Div(set(1), total)), factor + r, lanes);
      if (lse) store(hn::MulAdd(m, ln2, hn::MulAdd(m, ln2_rest, flex_math::log(total))), lse + r, lanes);
    });
  }
};

// The shift that takes a row's largest score to 2^0.
float shift_of(float largest, float scale) {
  return largest == -std::numeric_limits<float>::infinity() ? 0.0f : scale * largest;
}

// scores become weights that still miss factor[r] = 1 / their sum; lse, when given, is that of these rows.
void softmax(const Block& block, float* scores, float* factor, float* lse) {
  const float scale = block.sizes.scale * kLog2E;
  RowSums sums;
  for_joint_rows(block.rows, [&](int64_t r, auto n) HWY_ATTR {
    const JointRows<n()> rows(block, scores, r);
    float largest[n()];
    std::fill_n(largest, n(), -std::numeric_limits<float>::infinity());
    max_rows(rows, largest);
    for (int i = 0; i < n(); ++i) sums.shift[r + i] = shift_of(largest[i], scale);
    std::fill_n(sums.sum + r, n(), 0.0f);
    exp_rows<false>(rows, scale, sums.shift + r, sums.sum + r);
  });
  sums.finish(block.rows, factor, lse);
}

// ---- the built-in mask alone ----------------------------------------------------------------------------

// k is packed as panels, v as slabs of n keys.
template <class T>
void plain_block(const HeadTask& task, const Block& block, int64_t n, const float* k, const float* v,
                 Scratch& x) {
  const auto& [plan, tensors, b, h, sizes, lse] = task;
  const int64_t d = sizes.head_dim, r0 = block.r0, rows = block.rows;
  float* scores = block.reserve(x.s);
  multiply_scores(block, rows_of<T>(tensors.q, b, r0, rows, h, d, x.q), k, d, scores);
  float factor[kForwardRows];
  softmax(block, scores, factor, lse ? lse + r0 : nullptr);
  for (int64_t r = r0 + rows; r < std::min(r0 + 2 * rows, sizes.q_len); ++r)
    prefetch_row(head<T>(tensors.q, b, r, h, d), d);
  const Target o = target_of<T>(tensors.out, b, r0, rows, h, d, x.o);
  const Range keys = block.keys();
  for (int64_t j = keys.begin; j == keys.begin || j < keys.end; j += kChunk) {
    multiply_weights(block, {j, j + kChunk}, j == keys.begin ? Chunk::first : Chunk::later, scores, v, n, d,
                     factor, o);
  }
  put_rows<T>(o, tensors.out, b, r0, rows, h, d);
}

// One query row by itself: keys and values are each streamed once, and nothing is packed.
template <class T>
void plain_row(const HeadTask& task, Scratch& x) {
  const auto& [plan, tensors, b, h, sizes, lse] = task;
  const int64_t d = sizes.head_dim, g = task.key_head();
  const Range keys = sizes.visible(0);
  const int64_t n = keys.end - keys.begin;
  const Block block = {sizes, keys.begin, 0, 1, {0, n}};
  float *p = block.reserve(x.s), *o = x.o.reserve(d);
  const T* q = head<T>(tensors.q, b, 0, h, d);
  const HeadRows<T> k = key_rows<T>(tensors.k, plan, tensors, b, keys.begin, n, g, x.k_rows),
                    v = key_rows<T>(tensors.v, plan, tensors, b, keys.begin, n, g, x.v_rows);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) four_dots(q, k.data + j * k.stride, k.stride, d, p + j);
  for (; j < n; ++j) p[j] = dot(q, k.data + j * k.stride, d);
  float factor[1];
  softmax(block, p, factor, lse);
  std::fill_n(o, d, 0.0f);
  add_weighted_sum(p, v.data, v.stride, n, o, d);
  put_row(o, factor[0], head<T>(tensors.out, b, 0, h, d), d);
}

// ---- any mask and mod -----------------------------------------------------------------------------------

// The pieces of a block of query rows, with memory for their scores, and what the mask shows of them.
void make_pieces(const HeadTask& task, int64_t base, int64_t r0, int64_t rows, Scratch& x) {
  task.plan.segments(false, task.b, task.h, r0 / kForwardRows, x.segments);
  x.pieces.clear();
  int64_t total = 0, bytes = 0, tiles = 0;
  for (const cpu::Segment& s : x.segments) {
    const Piece& piece = x.pieces.emplace_back(
        Piece{{task.sizes, base, r0, rows, {s.keys.begin - base, s.keys.end - base}}, nullptr, s.masked});
    total += rows * piece.block.stride();
    if (!s.masked) continue;
    bytes += rows * piece.row_bytes();
    tiles += piece.n_tiles();
  }
  float* scores = x.s.reserve(total + kTileRows);
  uint8_t* allowed = grown(x.allowed, bytes + kBitsRoom);
  Range* shown = grown(x.shown, tiles);
  for (Piece& piece : x.pieces) {
    piece.scores = scores;
    scores += rows * piece.block.stride();
    if (!piece.masked) continue;
    x.hook.look(piece, allowed, shown);
    allowed += rows * piece.row_bytes();
    shown += piece.n_tiles();
  }
}

// Multiplies weights of row r by the factors of its dropout.
void drop(const HeadTask& task, const Piece& piece, int64_t r, Scratch& x) {
  const Block& block = piece.block;
  const Range read = span_of(block, r).read;
  if (empty(read)) return;
  const int64_t n = read.end - read.begin;
  float* kept = x.kept.reserve(dropout_room(n));
  DropoutRow(task.plan, task.b, task.h, block.r0 + r)
      .factors(block.base + block.part.begin + read.begin, n, kept);
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    float* w = piece.scores + r * block.stride() + read.begin + i;
    store(hn::Mul(load(w, lanes), load(kept + i, lanes)), w, lanes);
  });
}

// As softmax(), over the pieces of a block and with dropout.
void modded_softmax(const HeadTask& task, int64_t r0, int64_t rows, float* factor, Scratch& x) {
  const float scale = x.hook.exponent_scale();
  const bool has_mod = task.plan.has_mod(), dropout = task.plan.spec().dropout > 0;
  RowSums sums;
  for_joint_rows(rows, [&](int64_t r, auto n) HWY_ATTR {
    float largest[n()];
    std::fill_n(largest, n(), -std::numeric_limits<float>::infinity());
    for (const Piece& piece : x.pieces) max_rows(JointRows<n()>(piece.block, piece.scores, r), largest);
    for (int i = 0; i < n(); ++i) sums.shift[r + i] = shift_of(largest[i], scale);
    std::fill_n(sums.sum + r, n(), 0.0f);
    for (const Piece& piece : x.pieces) {
      const JointRows<n()> joint(piece.block, piece.scores, r);
      if (has_mod || piece.masked) {
        exp_rows<true>(joint, scale, sums.shift + r, sums.sum + r);
      } else {
        exp_rows<false>(joint, scale, sums.shift + r, sums.sum + r);
      }
      for (int i = 0; dropout && i < n(); ++i) drop(task, piece, r + i, x);
    }
  });
  sums.finish(rows, factor, task.lse ? task.lse + r0 : nullptr);
}

// Keys and values of a head: packed as panels and slabs of n keys, or as they are.
template <class T>
struct PackedKeys {
  const float *panels, *slabs;
  int64_t n;
};

template <class T>
void piece_scores(const Piece& piece, const Rows& q, const PackedKeys<T>& keys, int64_t d) {
  multiply_scores(piece.block, q, keys.panels, d, piece.scores);
}
template <class T>
void piece_values(const Piece& piece, const PackedKeys<T>& keys, int64_t d, const Target& out, Scratch&) {
  const Range part = piece.block.part;
  for (int64_t j = part.begin; j < part.end; j += kChunk) {
    multiply_weights(piece.block, {j, std::min(j + kChunk, part.end)}, Chunk::added, piece.scores, keys.slabs,
                     keys.n, d, nullptr, out);
  }
}

template <class T>
struct DirectKeys {
  HeadRows<T> k, v;
};

template <class T>
void piece_scores(const Piece& piece, const Rows& q, const DirectKeys<T>& keys, int64_t d) {
  multiply_scores_directly(piece.block, q.data, q.stride, keys.k.data, keys.k.stride, d, piece.scores);
}
template <class T>
void piece_values(const Piece& piece, const DirectKeys<T>& keys, int64_t d, const Target& out, Scratch& x) {
  const Block& block = piece.block;
  const int64_t stride = block.stride();
  if (block.rows <= 2) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const Range span = span_of(block, r).keys;
      if (empty(span)) continue;
      const T* v = keys.v.data + (block.part.begin + span.begin) * keys.v.stride;
      add_weighted_sum(piece.scores + r * stride + span.begin, v, keys.v.stride, span.end - span.begin,
                       out.data + r * out.stride, d);
    }
    return;
  }
  const int64_t width = round_up(d, vector_lanes());
  for (int64_t j = block.part.begin; j < block.part.end; j += kChunk) {
    const int64_t n = std::min(kChunk, block.part.end - j);
    float* slabs = x.v.reserve(n * width);
    pack_slabs(keys.v.data + j * keys.v.stride, keys.v.stride, n, d, slabs);
    for_each_group(d, [&](int64_t first, int64_t count) HWY_ATTR {
      for (int64_t r = 0; r < block.rows; r += kTileRows) {
        const Range seen = intersection(block.tile(r), {j, j + n});
        if (empty(seen)) continue;
        const int64_t lanes = vector_lanes();
        multiply<false>(count, {.a = piece.scores + r * stride + seen.begin - block.part.begin,
                                .a_stride = stride,
                                .b = slabs + (first * n + (seen.begin - j) * count) * lanes,
                                .b_stride = count * lanes,
                                .c = out.data + r * out.stride + first * lanes,
                                .c_stride = out.stride,
                                .rows = block.tile_rows(r),
                                .k = seen.end - seen.begin,
                                .accumulate = true});
      }
    });
  }
}

// Query rows [r0, r0 + rows) over keys that are counted from `base`.
template <class T, class Keys>
void modded_block(const HeadTask& task, const Keys& keys, int64_t base, int64_t r0, int64_t rows,
                  Scratch& x) {
  const auto& [plan, tensors, b, h, sizes, lse] = task;
  const int64_t d = sizes.head_dim;
  x.hook.rows(sizes.q_offset + r0, rows);
  make_pieces(task, base, r0, rows, x);
  const Rows q = rows_of<T>(tensors.q, b, r0, rows, h, d, x.q);
  for (const Piece& piece : x.pieces) {
    piece_scores(piece, q, keys, d);
    x.hook.apply(piece);
  }
  float factor[kForwardRows];
  modded_softmax(task, r0, rows, factor, x);
  const int64_t width = round_up(d, vector_lanes());
  const Target o = {x.o.reserve(rows * width), width};
  std::fill_n(o.data, rows * width, 0.0f);
  for (const Piece& piece : x.pieces) piece_values(piece, keys, d, o, x);
  for (int64_t r = 0; r < rows; ++r)
    put_row(o.data + r * width, factor[r], head<T>(tensors.out, b, r0 + r, h, d), d);
}

// ---- heads ----------------------------------------------------------------------------------------------

// A head whose keys are worth packing; `pack`: they are not yet.
template <class T>
void packed_head(const HeadTask& task, bool pack, Scratch& x) {
  const auto& [plan, tensors, b, h, sizes, lse] = task;
  const int64_t d = sizes.head_dim;
  const bool modded = plan.programmable();
  Range keys = sizes.visible_block(0, sizes.q_len);
  if (modded) keys.begin = keys.begin / cpu::kBlockKeys * cpu::kBlockKeys;
  const int64_t n = std::max<int64_t>(0, keys.end - keys.begin);
  float *panels = x.k.reserve(round_up(n, panel_width()) * d),
        *slabs = x.v.reserve(n * round_up(d, vector_lanes()));
  if (pack && n > 0) {
    const HeadRows<T> k = key_rows<T>(tensors.k, plan, tensors, b, keys.begin, n, task.key_head(), x.k_rows),
                      v = key_rows<T>(tensors.v, plan, tensors, b, keys.begin, n, task.key_head(), x.v_rows);
    pack_panels(k.data, k.stride, n, d, panels);
    pack_slabs(v.data, v.stride, n, d, slabs);
  }
  for (int64_t r0 = 0; r0 < sizes.q_len; r0 += kForwardRows) {
    const int64_t rows = std::min(kForwardRows, sizes.q_len - r0);
    if (modded) {
      modded_block<T>(task, PackedKeys<T>{panels, slabs, n}, keys.begin, r0, rows, x);
    } else {
      plain_block<T>(task, {sizes, keys.begin, r0, rows, {0, n}}, n, panels, slabs, x);
    }
  }
}

// A head of fewer rows.
template <class T>
void unpacked_head(const HeadTask& task, Scratch& x) {
  const auto& [plan, tensors, b, h, sizes, lse] = task;
  if (sizes.q_len == 1 && !plan.programmable()) return plain_row<T>(task, x);
  Range keys = sizes.visible_block(0, sizes.q_len);
  keys.begin = keys.begin / cpu::kBlockKeys * cpu::kBlockKeys;
  const int64_t n = std::max<int64_t>(0, keys.end - keys.begin), g = task.key_head();
  const DirectKeys<T> direct = {key_rows<T>(tensors.k, plan, tensors, b, keys.begin, n, g, x.k_rows),
                                key_rows<T>(tensors.v, plan, tensors, b, keys.begin, n, g, x.v_rows)};
  modded_block<T>(task, direct, keys.begin, 0, sizes.q_len, x);
}

// Heads [begin, end) of all batches, h fastest.
template <class T>
void forward_heads(const CpuAttentionPlan& plan, const AttentionTensors& tensors, int64_t begin,
                   int64_t end) {
  const AttentionShape& s = plan.shape();
  const int64_t group = s.n_head / s.n_kv_head;
  Scratch& x = thread_scratch();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / s.n_head, h = i % s.n_head;
    float* lse = tensors.lse ? tensors.lse->as<float>() + i * s.q_len : nullptr;
    const HeadTask task = {plan, tensors, b, h, plan.row(b), lse};
    const int64_t q_len = task.sizes.kv_len > 0 ? task.sizes.q_len : 0;
    clear_rows<T>(tensors.out, b, {q_len, s.q_len}, h, s.head_dim);
    if (lse) std::fill(lse + q_len, lse + s.q_len, -std::numeric_limits<float>::infinity());
    if (q_len == 0) continue;
    x.hook.start(plan, false, b, h);
    if (q_len > 1 && q_len * group >= kPackedRows) {
      packed_head<T>(task, i == begin || h % group == 0, x);
    } else {
      unpacked_head<T>(task, x);
    }
  }
}

}  // namespace

void Attention(const CpuAttentionPlan& plan, const AttentionTensors& x) {
  with_float_type(x.q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AttentionShape& s = plan.shape();
    // A single short row is cheaper than waking a thread.
    const int64_t work = s.q_len * s.kv_len * s.head_dim;
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(work, 1));
    parallel_for(s.batch * s.n_head, grain,
                 [&](int64_t begin, int64_t end) { forward_heads<T>(plan, x, begin, end); });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(Attention);

void CpuBackend::attention(const AttentionPlan& plan, const AttentionTensors& x) {
  HWY_DYNAMIC_DISPATCH(Attention)(cpu::checked_plan(plan), x);
}

}  // namespace flexchat
#endif  // HWY_ONCE
