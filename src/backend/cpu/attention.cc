// Causal (windowed) attention, blocked over query rows so that scores stay in L2: register-tiled products
// (attention_kernels-inl.h) with a two-pass softmax between them. A thread works on one (batch, head),
// backward on one (batch, key head), and every sum of a product has a fixed order for any number of threads.
// Products are cut at the diagonal and at the window's edge: sums over keys or rows at single tile rows,
// scores at whole vectors of keys. FLOPs: 4 * rows * visible keys * D forward, 10 backward. A forward of few
// query rows over many keys does not repay packing them: 2 .. 15 rows use oneDNN's products, which are faster
// there, and a single row streams the keys and values once. Arithmetic is f32; bf16 and f16 heads are
// converted as they are packed.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "backend/cpu/attention_kernels-inl.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "backend/cpu/dnnl_matmul.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

constexpr int64_t kForwardRows = 32;   // query rows of a block: tiles that share a panel of keys in L1
constexpr int64_t kBackwardRows = 64;  // more, since the sums of dk and dv run over a block's rows
constexpr int64_t kChunk = 256;        // keys whose slabs the tiles of a block share in sums over keys
constexpr int64_t kPart = 240;         // keys whose scores backward holds at a time, in L2 or better
constexpr int64_t kPackedRows = 16;    // query rows of a key head that repay packing its keys
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

template <class T>
T* head(const HeadsView& view, int64_t b, int64_t t, int64_t h, int64_t d) {
  return static_cast<T*>(view.data) + b * view.batch_stride + t * view.token_stride + h * d;
}

// Rows [begin, begin + n) of one head as f32: in place when they are f32, otherwise converted into scratch.
struct Rows {
  const float* data = nullptr;
  int64_t stride = 0;
};
template <class T>
Rows rows_of(const HeadsView& view, int64_t b, int64_t begin, int64_t n, int64_t h, int64_t d,
             Buffer& scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return {head<float>(view, b, begin, h, d), view.token_stride};
  } else {
    float* rows = scratch.reserve(n * d);
    for (int64_t t = 0; t < n; ++t) {
      const T* x = head<T>(view, b, begin + t, h, d);
      float* y = rows + t * d;
      for_each_vector(d, [&](int64_t i, auto lanes) HWY_ATTR { store(load(x + i, lanes), y + i, lanes); });
    }
    return {rows, d};
  }
}

// Where products put their rows, in whole vectors: in place if f32 heads consist of whole vectors, otherwise
// in scratch that put_rows() converts.
struct Target {
  float* data = nullptr;
  int64_t stride = 0;
};
template <class T>
bool in_place(int64_t d) {
  return std::is_same_v<T, float> && d % vector_lanes() == 0;
}
template <class T>
Target target_of(const HeadsView& view, int64_t b, int64_t begin, int64_t n, int64_t h, int64_t d,
                 Buffer& scratch) {
  if (in_place<T>(d)) return {head<float>(view, b, begin, h, d), view.token_stride};
  const int64_t stride = round_up(d, vector_lanes());
  return {scratch.reserve(n * stride), stride};
}

template <class T>
void put_row(const float* x, float factor, T* y, int64_t d) {
  const VF f = set(factor);
  for_each_vector(
      d, [&](int64_t i, auto lanes) HWY_ATTR { store(hn::Mul(load(x + i, lanes), f), y + i, lanes); });
}

template <class T>
void put_rows(const Target& from, const HeadsView& view, int64_t b, int64_t begin, int64_t n, int64_t h,
              int64_t d) {
  if (in_place<T>(d)) return;
  for (int64_t t = 0; t < n; ++t)
    put_row(from.data + t * from.stride, 1, head<T>(view, b, begin + t, h, d), d);
}

// Visible keys [begin, end) of query row r, and of all rows of a block.
struct Range {
  int64_t begin, end;
};
Range visible(const AttentionShape& s, int64_t r) {
  const int64_t i = s.q_offset + r;
  const int64_t end = std::min(s.kv_len, i + 1);
  return {s.window < 0 ? 0 : std::min(end, std::max<int64_t>(0, i - s.window)), end};
}
Range visible_block(const AttentionShape& s, int64_t r0, int64_t rows) {
  return {visible(s, r0).begin, visible(s, r0 + rows - 1).end};
}

// ---- blocks of scores -----------------------------------------------------------------------------------

// A block of query rows and the scores of a part of the keys, which are counted from the first packed one.
struct Block {
  const AttentionShape& shape;
  int64_t base;      // first packed key
  int64_t r0, rows;  // query rows
  Range part;        // keys of the scores, from a whole panel on

  Range from_base(const Range& x) const { return {x.begin - base, x.end - base}; }
  // What row r sees, and what some row of all or of the tile that begins with row r sees.
  Range row(int64_t r) const { return from_base(visible(shape, r0 + r)); }
  Range keys() const { return from_base(visible_block(shape, r0, rows)); }
  Range tile(int64_t r) const { return from_base(visible_block(shape, r0 + r, tile_rows(r))); }
  int64_t tile_rows(int64_t r) const { return std::min<int64_t>(kTileRows, rows - r); }

  // Between rows of scores: an odd number of vectors, so that a column does not meet in few sets of the
  // cache.
  int64_t stride() const {
    const int64_t lanes = vector_lanes();
    return (round_up(part.end - part.begin, panel_width()) / lanes | 1) * lanes;
  }
  // Tiles of keys may read beyond the last row.
  float* reserve(Buffer& buffer) const { return buffer.reserve(rows * stride() + kTileRows); }
};
Range intersection(const Range& a, const Range& b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}
bool empty(const Range& x) { return x.begin >= x.end; }

// Dot products of a block's rows with the keys they see, which are packed as panels.
void multiply_scores(const Block& block, const Rows& rows, const float* panels, int64_t d, float* scores) {
  const int64_t width = panel_width(), lanes = vector_lanes(), stride = block.stride();
  for (int64_t j = block.part.begin; j < block.part.end; j += width) {
    for (int64_t r = 0; r < block.rows; r += kTileRows) {
      const Range keys = intersection(block.tile(r), {j, j + width});
      if (empty(keys)) continue;
      multiply<false>((keys.end - j + lanes - 1) / lanes, {.a = rows.data + r * rows.stride,
                                                           .a_stride = rows.stride,
                                                           .b = panels + j * d,
                                                           .b_stride = width,
                                                           .c = scores + r * stride + j - block.part.begin,
                                                           .c_stride = stride,
                                                           .rows = block.tile_rows(r),
                                                           .k = d});
    }
  }
}

// out (rows, D) = or += weights (rows, keys) x (keys, D) over a chunk of the block's keys, where x is packed
// as slabs of n keys. After their last key, rows are multiplied by factor[row]. Rows that see nothing become
// 0 in the first chunk.
void multiply_weights(const Block& block, const Range& chunk, bool first_chunk, const float* weights,
                      const float* slabs, int64_t n, int64_t d, const float* factor, const Target& out) {
  const int64_t lanes = vector_lanes(), stride = block.stride();
  for_each_group(d, [&](int64_t first, int64_t count) HWY_ATTR {
    for (int64_t r = 0; r < block.rows; r += kTileRows) {
      const Range tile = block.tile(r), keys = intersection(tile, chunk);
      if (empty(keys) && !(empty(tile) && first_chunk)) continue;
      const int64_t from = empty(keys) ? chunk.begin : keys.begin;
      multiply<false>(count,
                      {.a = weights + r * stride + from - block.part.begin,
                       .a_stride = stride,
                       .b = slabs + (first * n + from * count) * lanes,
                       .b_stride = count * lanes,
                       .c = out.data + r * out.stride + first * lanes,
                       .c_stride = out.stride,
                       .rows = block.tile_rows(r),
                       .k = keys.end - keys.begin,
                       .accumulate = !empty(keys) && keys.begin > tile.begin,
                       .factor = factor && (empty(keys) || keys.end == tile.end) ? factor + r : nullptr});
    }
  });
}

// out (n, D) at key j = or += weights^T (n, rows) x (rows, D), where x is the block's rows packed as slabs.
void multiply_transposed(const Block& block, int64_t j, const Range& rows, const float* weights,
                         const float* slabs, int64_t d, int64_t n, bool accumulate, const Target& out) {
  const int64_t lanes = vector_lanes(), stride = block.stride();
  for_each_group(d, [&](int64_t first, int64_t count) HWY_ATTR {
    multiply<true>(count, {.a = weights + rows.begin * stride + j - block.part.begin,
                           .a_stride = stride,
                           .b = slabs + (first * block.rows + rows.begin * count) * lanes,
                           .b_stride = count * lanes,
                           .c = out.data + j * out.stride + first * lanes,
                           .c_stride = out.stride,
                           .rows = n,
                           .k = rows.end - rows.begin,
                           .accumulate = accumulate});
  });
}

// Columns of a row of scores: visible keys, and the whole vectors around them that products read, which stop
// at a row tile's keys or a tile of keys.
struct Span {
  Range keys, read;
};
Span span_of(const Block& block, int64_t r) {
  const auto column = [&](const Range& x) {
    const Range y = intersection(x, block.part);
    return Range{y.begin - block.part.begin, y.end - block.part.begin};
  };
  const Range tile = column(block.tile(r / kTileRows * kTileRows));
  if (empty(tile)) return {{0, 0}, {0, 0}};
  const int64_t step = std::max<int64_t>(vector_lanes(), kTileRows);
  return {column(block.row(r)),
          {tile.begin / step * step, std::min(block.stride(), round_up(tile.end, step))}};
}

// The lanes of the vector at index i that stand for visible keys; `other` in the rest.
HWY_INLINE VF visible_lanes(const Range& keys, int64_t i, VF v, VF other) {
  const hn::RebindToSigned<F32> di;
  const auto begin = hn::Set(di, static_cast<int32_t>(std::max<int64_t>(keys.begin - i, 0) - 1));
  const auto end = hn::Set(di, static_cast<int32_t>(std::min(keys.end - i, vector_lanes())));
  const auto lane = hn::Iota(di, 0);
  const auto inside =
      hn::And(hn::VecFromMask(di, hn::Lt(begin, lane)), hn::VecFromMask(di, hn::Lt(lane, end)));
  return hn::IfThenElse(hn::RebindMask(F32(), hn::MaskFromVec(inside)), v, other);
}

// fn(index, keep) over the vectors of span.read, where keep(v, other) is v at visible keys.
template <class Fn>
HWY_INLINE void for_each_score(const Span& span, const Fn& fn) {
  const int64_t lanes = vector_lanes();
  const auto edge = [&](int64_t i) HWY_ATTR {
    fn(i, [&](VF v, VF other) HWY_ATTR { return visible_lanes(span.keys, i, v, other); });
  };
  int64_t i = span.read.begin;
  for (; i < std::min(span.keys.begin, span.read.end); i += lanes) edge(i);
  for (; i + lanes <= span.keys.end; i += lanes) fn(i, [](VF v, VF) HWY_ATTR { return v; });
  for (; i < span.read.end; i += lanes) edge(i);
}

// p = 2^(scale * p - shift) at visible keys, 0 at others; returns the sum.
HWY_INLINE float exp_row(float* p, const Span& span, float scale, float shift) {
  const VF a = set(scale), m = set(shift);
  VF sum = set(0);
  for_each_score(span, [&](int64_t i, auto keep) HWY_ATTR {
    const VF e = keep(exp2(hn::MulSub(a, hn::LoadU(F32(), p + i), m)), set(0));
    hn::StoreU(e, F32(), p + i);
    sum = hn::Add(sum, e);
  });
  return sum_lanes(sum);
}

HWY_INLINE float max_row(const float* p, const Span& span) {
  const VF low = set(-std::numeric_limits<float>::infinity());
  VF m0 = low, m1 = low, m2 = low, m3 = low;  // taking turns hides the latency of the maximum
  for_each_score(span, [&](int64_t i, auto keep) HWY_ATTR {
    const VF m = hn::Max(m0, keep(hn::LoadU(F32(), p + i), low));
    m0 = m1;
    m1 = m2;
    m2 = m3;
    m3 = m;
  });
  return max_lanes(hn::Max(hn::Max(m0, m1), hn::Max(m2, m3)));
}

struct Scratch {
  Buffer q, k, v, o, d_o, s, ds, q_slabs, k_slabs, do_slabs, dq, dk, dv;
};
// A thread keeps it from call to call (some MB): clearing fresh pages would cost a tenth of a call.
Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// ---- forward --------------------------------------------------------------------------------------------

// scores become weights that still miss factor[r] = 1 / their sum; lse, when given, that of the whole head.
void softmax(const Block& block, float* scores, float* factor, float* lse) {
  const float scale = static_cast<float>(block.shape.scale) * kLog2E;
  const int64_t stride = block.stride();
  for (int64_t r = 0; r < block.rows; ++r) {
    const Span span = span_of(block, r);
    float* p = scores + r * stride;
    const float shift = empty(span.keys) ? 0.0f : scale * max_row(p, span);
    const float sum = exp_row(p, span, scale, shift);
    factor[r] = empty(span.keys) ? 0.0f : 1 / sum;
    if (lse) lse[block.r0 + r] = shift * kLn2 + std::log(sum);  // log 0 = -inf: sees nothing
  }
}

// k is packed as panels, v as slabs of n keys.
template <class T>
void forward_block(const Block& block, int64_t b, int64_t h, const HeadsView& q, int64_t n, const float* k,
                   const float* v, const HeadsView& out, float* lse, Scratch& x) {
  const int64_t d = block.shape.head_dim, r0 = block.r0, rows = block.rows;
  float* scores = block.reserve(x.s);
  multiply_scores(block, rows_of<T>(q, b, r0, rows, h, d, x.q), k, d, scores);
  float factor[kForwardRows];
  softmax(block, scores, factor, lse);
  for (int64_t r = r0 + rows; r < std::min(r0 + 2 * rows, block.shape.q_len); ++r)
    prefetch_row(head<T>(q, b, r, h, d), d);
  const Target o = target_of<T>(out, b, r0, rows, h, d, x.o);
  const Range keys = block.keys();
  for (int64_t j = keys.begin; j == keys.begin || j < keys.end; j += kChunk)
    multiply_weights(block, {j, j + kChunk}, j == keys.begin, scores, v, n, d, factor, o);
  put_rows<T>(o, out, b, r0, rows, h, d);
}

// Heads [begin, end) of all batches, h fastest.
template <class T>
void forward_heads(const AttentionShape& s, int64_t begin, int64_t end, const HeadsView& q,
                   const HeadsView& k, const HeadsView& v, const HeadsView& out, const Tensor* lse) {
  const int64_t d = s.head_dim, group = s.n_head / s.n_kv_head;
  const Range keys = visible_block(s, 0, s.q_len);
  const int64_t n = keys.end - keys.begin;
  Scratch& x = thread_scratch();
  float *panels = x.k.reserve(round_up(n, panel_width()) * d),
        *slabs = x.v.reserve(n * round_up(d, vector_lanes()));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / s.n_head, h = i % s.n_head, g = h / group;
    if (i == begin || h % group == 0) {
      pack_panels(head<T>(k, b, keys.begin, g, d), k.token_stride, n, d, panels);
      pack_slabs(head<T>(v, b, keys.begin, g, d), v.token_stride, n, d, slabs);
    }
    float* row_lse = lse ? lse->as<float>() + i * s.q_len : nullptr;
    for (int64_t r0 = 0; r0 < s.q_len; r0 += kForwardRows) {
      const Block block = {s, keys.begin, r0, std::min(kForwardRows, s.q_len - r0), {0, n}};
      forward_block<T>(block, b, h, q, n, panels, slabs, out, row_lse, x);
    }
  }
}

// All query rows of a head, fewer than kPackedRows, by products that leave keys and values where they are.
template <class T>
void forward_few_rows(const AttentionShape& s, int64_t b, int64_t h, const HeadsView& q, const HeadsView& k,
                      const HeadsView& v, const HeadsView& out, float* lse, Scratch& x) {
  const int64_t d = s.head_dim, g = h / (s.n_head / s.n_kv_head), rows = s.q_len;
  const Range keys = visible_block(s, 0, rows);
  const int64_t n = keys.end - keys.begin;
  const Block block = {s, keys.begin, 0, rows, {0, n}};
  const int64_t stride = block.stride();
  float *scores = block.reserve(x.s), factor[kPackedRows];
  const Rows qr = rows_of<T>(q, b, 0, rows, h, d, x.q), kr = rows_of<T>(k, b, keys.begin, n, g, d, x.k),
             vr = rows_of<T>(v, b, keys.begin, n, g, d, x.v);
  sgemm(Trans::no, Trans::yes, rows, n, d, 1, qr.data, qr.stride, kr.data, kr.stride, 0, scores, stride);
  softmax(block, scores, factor, lse);
  for (int64_t r = 0; r < rows; ++r) {  // beyond what softmax has written
    const Range read = span_of(block, r).read;
    std::fill(scores + r * stride, scores + r * stride + read.begin, 0.0f);
    std::fill(scores + r * stride + read.end, scores + (r + 1) * stride, 0.0f);
  }
  const Target o = target_of<T>(out, b, 0, rows, h, d, x.o);
  sgemm(Trans::no, Trans::no, rows, d, n, 1, scores, stride, vr.data, vr.stride, 0, o.data, o.stride);
  for (int64_t r = 0; r < rows; ++r) put_row(o.data + r * o.stride, factor[r], head<T>(out, b, r, h, d), d);
}

// out = sum_j p[j] * v[j] over n rows `stride` apart: a block of columns stays in registers while rows stream
// by.
template <class T>
void weighted_sum(const float* p, const T* v, int64_t stride, int64_t n, float* out, int64_t d) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t i = 0;
  for (; i + 8 * lanes <= d; i += 8 * lanes) {
    VF s[8];
    for (VF& x : s) x = set(0);
    for (int64_t j = 0; j < n; ++j) {
      const VF w = set(p[j]);
      for (int64_t r = 0; r < 8; ++r)
        s[r] = hn::MulAdd(w, load(v + j * stride + i + r * lanes, Whole()), s[r]);
    }
    for (int64_t r = 0; r < 8; ++r) store(s[r], out + i + r * lanes, Whole());
  }
  for_each_vector(d - i, [&](int64_t c, auto part) HWY_ATTR {
    VF s = set(0);
    for (int64_t j = 0; j < n; ++j) s = hn::MulAdd(set(p[j]), load(v + j * stride + i + c, part), s);
    store(s, out + i + c, part);
  });
}

// One query row by itself: keys and values are each streamed once, and nothing is packed.
template <class T>
void forward_row(const AttentionShape& s, int64_t b, int64_t h, int64_t r, const HeadsView& q,
                 const HeadsView& k, const HeadsView& v, const HeadsView& out, float* lse, Scratch& x) {
  const int64_t d = s.head_dim, g = h / (s.n_head / s.n_kv_head);
  const Range keys = visible(s, r);
  const int64_t n = keys.end - keys.begin;
  const Span all = {{0, n}, {0, round_up(n, vector_lanes())}};
  float *p = x.s.reserve(all.read.end), *o = x.o.reserve(d);
  const T *qr = head<T>(q, b, r, h, d), *kr = head<T>(k, b, keys.begin, g, d);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) four_dots(qr, kr + j * k.token_stride, k.token_stride, d, p + j);
  for (; j < n; ++j) p[j] = dot(qr, kr + j * k.token_stride, d);
  const float scale = static_cast<float>(s.scale) * kLog2E;
  const float shift = n > 0 ? scale * max_row(p, all) : 0.0f;
  const float sum = exp_row(p, all, scale, shift);
  weighted_sum(p, head<T>(v, b, keys.begin, g, d), v.token_stride, n, o, d);
  put_row(o, n > 0 ? 1 / sum : 0.0f, head<T>(out, b, r, h, d), d);
  if (lse) lse[r] = shift * kLn2 + std::log(sum);
}

void Attention(const AttentionShape& s, const HeadsView& q, const HeadsView& k, const HeadsView& v,
               const HeadsView& out, const Tensor* lse) {
  with_float_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A single short row is cheaper than waking a thread.
    const int64_t work = s.q_len * s.kv_len * s.head_dim;
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(work, 1));
    parallel_for(s.batch * s.n_head, grain, [&](int64_t begin, int64_t end) {
      if (s.q_len > 1 && s.q_len * (s.n_head / s.n_kv_head) >= kPackedRows) {
        forward_heads<T>(s, begin, end, q, k, v, out, lse);
        return;
      }
      Scratch& x = thread_scratch();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.n_head, h = i % s.n_head;
        float* row_lse = lse ? lse->as<float>() + i * s.q_len : nullptr;
        if (s.q_len == 1) {
          forward_row<T>(s, b, h, 0, q, k, v, out, row_lse, x);
        } else {
          forward_few_rows<T>(s, b, h, q, k, v, out, row_lse, x);
        }
      }
    });
  });
}

// ---- backward -------------------------------------------------------------------------------------------

// A key head of n keys packed for backward, and where its dk and dv are summed.
struct KeyHead {
  int64_t n;
  const float *k_panels, *k_slabs, *v_panels;
  Target dk, dv;
  int64_t written = 0;  // keys before this one have a dk and dv that others add to
};

// scores become the weights P; dscores, the gradient of P, become that of the scores. delta[r] = scale * dO .
// O.
void softmax_backward(const Block& block, const float* lse, const float* delta, float* scores,
                      float* dscores) {
  const auto scale = static_cast<float>(block.shape.scale);
  const VF a = set(scale * kLog2E), factor = set(scale), zero = set(0);
  for (int64_t r = 0; r < block.rows; ++r) {
    const Span span = span_of(block, r);
    if (empty(span.read)) continue;
    float *p = scores + r * block.stride(), *ds = dscores + r * block.stride();
    const VF d_r = set(delta[r]), shift = set(lse[r] * kLog2E);
    for_each_score(span, [&](int64_t i, auto keep) HWY_ATTR {
      const VF e = keep(exp2(hn::MulSub(a, hn::LoadU(F32(), p + i), shift)), zero);
      const VF g = keep(hn::MulSub(factor, hn::LoadU(F32(), ds + i), d_r), zero);
      hn::StoreU(e, F32(), p + i);
      hn::StoreU(hn::Mul(e, g), F32(), ds + i);
    });
  }
}

// A block of query rows as f32, plainly and as slabs.
struct QueryRows {
  Rows q, d_o;
  const float *q_slabs, *do_slabs;
};

// Adds a block's scores to dk and dv of their key head.
void add_to_keys(const Block& block, const QueryRows& x, const float* scores, const float* dscores,
                 KeyHead& keys) {
  const int64_t d = block.shape.head_dim;
  const Range part = intersection(block.keys(), block.part);
  Range seen = {0, 0};  // rows that see some of the keys [j, j + kTileRows)
  for (int64_t j = part.begin / kTileRows * kTileRows; j < part.end; j += kTileRows) {
    const int64_t n = std::min<int64_t>(kTileRows, keys.n - j);
    while (seen.begin < block.rows && block.row(seen.begin).end <= j) ++seen.begin;
    while (seen.end < block.rows && block.row(seen.end).begin < j + n) ++seen.end;
    if (empty(seen)) continue;
    const bool accumulate = j < keys.written;
    multiply_transposed(block, j, seen, dscores, x.q_slabs, d, n, accumulate, keys.dk);
    multiply_transposed(block, j, seen, scores, x.do_slabs, d, n, accumulate, keys.dv);
    keys.written = std::max(keys.written, j + kTileRows);
  }
}

// Adds query rows [r0, r0 + rows) to dk and dv of their key head and writes their dq.
template <class T>
void backward_rows(const AttentionShape& s, int64_t b, int64_t h, int64_t r0, int64_t rows,
                   const HeadsView& q, KeyHead& keys, const HeadsView& out, const HeadsView& dout,
                   const float* lse, const HeadsView& dq, Scratch& x) {
  const int64_t d = s.head_dim, width = round_up(d, vector_lanes());
  float *q_slabs = x.q_slabs.reserve(rows * width), *do_slabs = x.do_slabs.reserve(rows * width);
  pack_slabs(head<T>(q, b, r0, h, d), q.token_stride, rows, d, q_slabs);
  pack_slabs(head<T>(dout, b, r0, h, d), dout.token_stride, rows, d, do_slabs);
  const QueryRows query = {rows_of<T>(q, b, r0, rows, h, d, x.q), rows_of<T>(dout, b, r0, rows, h, d, x.d_o),
                           q_slabs, do_slabs};
  float delta[kBackwardRows];
  for (int64_t r = 0; r < rows; ++r) {
    delta[r] = static_cast<float>(s.scale) *
               dot(query.d_o.data + r * query.d_o.stride, head<T>(out, b, r0 + r, h, d), d);
    if (const int64_t next = r0 + rows + r; next < s.q_len) {
      for (const HeadsView* y : {&q, &out, &dout}) prefetch_row(head<T>(*y, b, next, h, d), d);
    }
  }
  const Target dqr = target_of<T>(dq, b, r0, rows, h, d, x.dq);
  const Range all = visible_block(s, r0, rows);
  const int64_t step = round_up(kPart, panel_width()), first = all.begin / step * step;
  for (int64_t j = first; j == first || j < all.end; j += step) {
    const Block block = {s, 0, r0, rows, {j, std::min(j + step, keys.n)}};
    float *scores = block.reserve(x.s), *dscores = block.reserve(x.ds);
    multiply_scores(block, query.q, keys.k_panels, d, scores);
    multiply_scores(block, query.d_o, keys.v_panels, d, dscores);
    softmax_backward(block, lse + r0, delta, scores, dscores);
    multiply_weights(block, block.part, j == first, dscores, keys.k_slabs, keys.n, d, nullptr, dqr);
    add_to_keys(block, query, scores, dscores, keys);
  }
  put_rows<T>(dqr, dq, b, r0, rows, h, d);
}

// Key head g of batch b, with all the query heads that read it, summed in order.
template <class T>
void backward_key_head(const AttentionShape& s, int64_t b, int64_t g, const HeadsView& q, const HeadsView& k,
                       const HeadsView& v, const HeadsView& out, const HeadsView& dout, const Tensor& lse,
                       const HeadsView& dq, const HeadsView& dk, const HeadsView& dv, Scratch& x) {
  const int64_t d = s.head_dim, group = s.n_head / s.n_kv_head, n = s.kv_len;
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
                  target_of<T>(dk, b, 0, n, g, d, x.dk),
                  target_of<T>(dv, b, 0, n, g, d, x.dv)};
  const Range seen = visible_block(s, 0, s.q_len);  // without gaps; the first query head to see them writes
  for (int64_t t = 0; t < n; ++t) {
    if (t >= seen.begin && t < seen.end) continue;
    std::fill_n(keys.dk.data + t * keys.dk.stride, round_up(d, vector_lanes()), 0.0f);
    std::fill_n(keys.dv.data + t * keys.dv.stride, round_up(d, vector_lanes()), 0.0f);
  }
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    const float* row_lse = lse.as<float>() + (b * s.n_head + h) * s.q_len;
    for (int64_t r0 = 0; r0 < s.q_len; r0 += kBackwardRows) {
      backward_rows<T>(s, b, h, r0, std::min(kBackwardRows, s.q_len - r0), q, keys, out, dout, row_lse, dq,
                       x);
    }
  }
  put_rows<T>(keys.dk, dk, b, 0, n, g, d);
  put_rows<T>(keys.dv, dv, b, 0, n, g, d);
}

void AttentionBackward(const AttentionShape& s, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const HeadsView& out, const HeadsView& dout, const Tensor& lse, const HeadsView& dq,
                       const HeadsView& dk, const HeadsView& dv) {
  with_float_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(s.batch * s.n_kv_head, 1, [&](int64_t begin, int64_t end) {
      Scratch& x = thread_scratch();
      for (int64_t i = begin; i < end; ++i) {
        backward_key_head<T>(s, i / s.n_kv_head, i % s.n_kv_head, q, k, v, out, dout, lse, dq, dk, dv, x);
      }
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(Attention);
HWY_EXPORT(AttentionBackward);

void CpuBackend::attention(const AttentionShape& shape, const HeadsView& q, const HeadsView& k,
                           const HeadsView& v, const HeadsView& out, const Tensor* lse) {
  HWY_DYNAMIC_DISPATCH(Attention)(shape, q, k, v, out, lse);
}
void CpuBackend::attention_backward(const AttentionShape& shape, const HeadsView& q, const HeadsView& k,
                                    const HeadsView& v, const HeadsView& out, const HeadsView& dout,
                                    const Tensor& lse, const HeadsView& dq, const HeadsView& dk,
                                    const HeadsView& dv) {
  HWY_DYNAMIC_DISPATCH(AttentionBackward)(shape, q, k, v, out, dout, lse, dq, dk, dv);
}

}  // namespace flexchat
#endif  // HWY_ONCE
