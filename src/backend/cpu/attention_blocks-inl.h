// Blocks of attention scores, shared by forward and backward: where rows of heads lie, products over a
// block's visible keys, and loops over rows of scores. Included once per SIMD target.
//
// A block is some query rows and a part of the keys. Products are cut at the diagonal and at the window's
// edge: sums over keys or rows at single tile rows, scores at whole vectors of keys.
#if defined(FLEXCHAT_ATTENTION_BLOCKS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FLEXCHAT_ATTENTION_BLOCKS_INL_H
#undef FLEXCHAT_ATTENTION_BLOCKS_INL_H
#else
#define FLEXCHAT_ATTENTION_BLOCKS_INL_H
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "backend/cpu/attention_kernels-inl.h"
#include "backend/cpu/attention_plan.h"
#include "backend/cpu/flex_tile-inl.h"
#include "backend/cpu/simd-inl.h"
#include "base/rng.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

using cpu::Range;
using cpu::RowSizes;

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.6931471805599453;

template <class T>
T* head(const HeadsView& view, int64_t b, int64_t t, int64_t h, int64_t d) {
  const int64_t step = view.head_stride == 0 ? d : view.head_stride;
  return static_cast<T*>(view.data) + b * view.batch_stride + t * view.token_stride + h * step;
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

// ---- blocks of scores -----------------------------------------------------------------------------------

// A block of query rows and the scores of a part of the keys, which are counted from the first packed one.
struct Block {
  const RowSizes& sizes;
  int64_t base;                  // first packed key
  int64_t r0, rows;              // query rows
  Range part;                    // keys of the scores, from a whole panel on
  const Range* shown = nullptr;  // by a mask to some row of each tile; null: all keys

  Range from_base(const Range& x) const { return {x.begin - base, x.end - base}; }
  // What the built-in mask shows to row r and to some row, and what some row of the tile that begins with row
  // r sees.
  Range row(int64_t r) const { return from_base(sizes.visible(r0 + r)); }
  Range keys() const { return from_base(sizes.visible_block(r0, rows)); }
  Range tile(int64_t r) const {
    const Range seen = from_base(sizes.visible_block(r0 + r, tile_rows(r)));
    return shown ? intersection(seen, shown[r / kTileRows]) : seen;
  }
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

// Dot products of a block's rows with the keys they see, which are packed as panels. Sums over D are cut into
// pieces of kSummed terms: their rounding is what decides the precision of attention.
constexpr int64_t kSummed = 32;
inline void multiply_scores(const Block& block, const Rows& rows, const float* panels, int64_t d,
                            float* scores) {
  const int64_t width = panel_width(), lanes = vector_lanes(), stride = block.stride();
  for (int64_t j = block.part.begin; j < block.part.end; j += width) {
    for (int64_t r = 0; r < block.rows; r += kTileRows) {
      const Range keys = intersection(block.tile(r), {j, j + width});
      if (empty(keys)) continue;
      for (int64_t k = 0; k < d; k += kSummed) {
        multiply<false>((keys.end - j + lanes - 1) / lanes, {.a = rows.data + r * rows.stride + k,
                                                             .a_stride = rows.stride,
                                                             .b = panels + j * d + k * width,
                                                             .b_stride = width,
                                                             .c = scores + r * stride + j - block.part.begin,
                                                             .c_stride = stride,
                                                             .rows = block.tile_rows(r),
                                                             .k = std::min(kSummed, d - k),
                                                             .accumulate = k > 0});
      }
    }
  }
}

// out (rows, D) = or += weights (rows, keys) x (keys, D) over a chunk of the block's keys, where x is packed
// as slabs of n keys. After their last key, rows are multiplied by factor[row]. Rows that see nothing become
// 0 in the first chunk.
enum class Chunk : uint8_t { first, later, added };  // added: out holds sums of other blocks, or 0
inline void multiply_weights(const Block& block, const Range& chunk, Chunk place, const float* weights,
                             const float* slabs, int64_t n, int64_t d, const float* factor,
                             const Target& out) {
  const int64_t lanes = vector_lanes(), stride = block.stride();
  for_each_group(d, [&](int64_t first, int64_t count) HWY_ATTR {
    for (int64_t r = 0; r < block.rows; r += kTileRows) {
      const Range tile = block.tile(r), keys = intersection(tile, chunk);
      if (empty(keys) && !(empty(tile) && place == Chunk::first)) continue;
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
                       .accumulate = place == Chunk::added || (!empty(keys) && keys.begin > tile.begin),
                       .factor = factor && (empty(keys) || keys.end == tile.end) ? factor + r : nullptr});
    }
  });
}

// Up to kTileRows keys from key j on, and the block's rows that see them. accumulate: their sums have a part.
struct KeyTile {
  int64_t j, n;
  Range rows;
  bool accumulate;
};
// out (n, D) at key j = or += weights^T (n, rows) x (rows, D) for each tile, where x is the block's rows
// packed as slabs.
inline void multiply_transposed(const Block& block, std::span<const KeyTile> tiles, const float* weights,
                                const float* slabs, int64_t d, const Target& out) {
  const int64_t lanes = vector_lanes(), stride = block.stride();
  for_each_group(d, [&](int64_t first, int64_t count) HWY_ATTR {
    for (const KeyTile& tile : tiles) {
      multiply<true>(count, {.a = weights + tile.rows.begin * stride + tile.j - block.part.begin,
                             .a_stride = stride,
                             .b = slabs + (first * block.rows + tile.rows.begin * count) * lanes,
                             .b_stride = count * lanes,
                             .c = out.data + tile.j * out.stride + first * lanes,
                             .c_stride = out.stride,
                             .rows = tile.n,
                             .k = tile.rows.end - tile.rows.begin,
                             .accumulate = tile.accumulate});
    }
  });
}

// Columns of a row of scores: visible keys, and the whole vectors around them that products read, which stop
// at a row tile's keys or a tile of keys.
struct Span {
  Range keys, read;
};
inline Span span_of(const Block& block, int64_t r) {
  const auto column = [&](const Range& x) {
    const Range y = intersection(x, block.part);
    return Range{y.begin - block.part.begin, y.end - block.part.begin};
  };
  const Range seen = block.tile(r / kTileRows * kTileRows), tile = column(seen);
  if (empty(tile)) return {{0, 0}, {0, 0}};
  const int64_t step = std::max<int64_t>(vector_lanes(), kTileRows);
  return {column(intersection(seen, block.row(r))),
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

HWY_INLINE VF minus_infinity() { return set(-std::numeric_limits<float>::infinity()); }

// Rows of scores that one loop walks together, so that the latencies of one hide behind the others.
constexpr int kJointRows = 4;
static_assert(kTileRows % kJointRows == 0);  // they read the same keys
template <int kRows>
struct JointRows {
  float* p[kRows];
  Range keys[kRows];  // what each sees
  Range read, full;   // what is read of them; what all see

  JointRows(const Block& block, float* scores, int64_t r) : read(span_of(block, r).read), full(read) {
    for (int i = 0; i < kRows; ++i) {
      p[i] = scores + (r + i) * block.stride();
      keys[i] = span_of(block, r + i).keys;
      full = {std::max(full.begin, keys[i].begin), std::min(full.end, keys[i].end)};
    }
  }
};

// fn(index, keep) over the vectors of rows.read, where keep(row, v, other) is v at keys that the row sees.
template <int kRows, class Fn>
HWY_INLINE void for_each_score(const JointRows<kRows>& rows, const Fn& fn) {
  const int64_t lanes = vector_lanes();
  const auto edge = [&](int64_t i) HWY_ATTR {
    fn(i, [&](int r, VF v, VF other) HWY_ATTR { return visible_lanes(rows.keys[r], i, v, other); });
  };
  int64_t i = rows.read.begin;
  for (; i < std::min(rows.full.begin, rows.read.end); i += lanes) edge(i);
  for (; i + lanes <= rows.full.end; i += lanes) fn(i, [](int, VF v, VF) HWY_ATTR { return v; });
  for (; i < rows.read.end; i += lanes) edge(i);
}

// largest[r] = max(largest[r], visible scores of row r)
template <int kRows>
HWY_INLINE void max_rows(const JointRows<kRows>& rows, float* largest) {
  const VF low = set(-std::numeric_limits<float>::infinity());
  VF m[kRows];
  for (VF& x : m) x = low;
  for_each_score(rows, [&](int64_t i, auto keep) HWY_ATTR {
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) m[r] = hn::Max(m[r], keep(r, hn::LoadU(F32(), rows.p[r] + i), low));
  });
  for (int r = 0; r < kRows; ++r) largest[r] = std::max(largest[r], max_lanes(m[r]));
}

// p = 2^(scale * p - shift[r]) at visible keys (kHoles: and not where p is -inf), 0 at others; adds to
// sum[r].
template <bool kHoles, int kRows>
HWY_INLINE void exp_rows(const JointRows<kRows>& rows, float scale, const float* shift, float* sum) {
  const VF a = set(scale), zero = set(0);
  VF m[kRows], total[kRows];
  for (int r = 0; r < kRows; ++r) {
    m[r] = set(shift[r]);
    total[r] = zero;
  }
  for_each_score(rows, [&](int64_t i, auto keep) HWY_ATTR {
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      float* p = rows.p[r] + i;
      const VF s = hn::LoadU(F32(), p);
      VF e = exp2(hn::MulSub(a, s, m[r]));
      if constexpr (kHoles) e = hn::IfThenZeroElse(hn::Eq(s, minus_infinity()), e);
      e = keep(r, e, zero);
      hn::StoreU(e, F32(), p);
      total[r] = hn::Add(total[r], e);
    }
  });
  for (int r = 0; r < kRows; ++r) sum[r] += sum_lanes(total[r]);
}

// fn(r, number of rows as a type) over rows [0, rows), kJointRows or one at a time.
template <class Fn>
HWY_INLINE void for_joint_rows(int64_t rows, const Fn& fn) {
  int64_t r = 0;
  for (; r + kJointRows <= rows; r += kJointRows) fn(r, std::integral_constant<int, kJointRows>());
  for (; r < rows; ++r) fn(r, std::integral_constant<int, 1>());
}

// The same rows of scores as multiply_scores() makes, from keys that are not packed: each is read once for
// all rows.
template <class A, class T>
void multiply_scores_directly(const Block& block, const A* q, int64_t q_stride, const T* k, int64_t k_stride,
                              int64_t d, float* scores) {
  const int64_t stride = block.stride();
  const Range keys = intersection(block.keys(), block.part);
  int64_t j = keys.begin;
  for (; j + 4 <= keys.end; j += 4) {
    for (int64_t r = 0; r < block.rows; ++r) {
      four_dots(q + r * q_stride, k + j * k_stride, k_stride, d, scores + r * stride + j - block.part.begin);
    }
  }
  for (; j < keys.end; ++j) {
    for (int64_t r = 0; r < block.rows; ++r)
      scores[r * stride + j - block.part.begin] = dot(q + r * q_stride, k + j * k_stride, d);
  }
}

// out += sum_j p[j] * v[j] over n rows `stride` apart: a block of columns stays in registers while rows
// stream by.
template <class T>
void add_weighted_sum(const float* p, const T* v, int64_t stride, int64_t n, float* out, int64_t d) {
  const int64_t lanes = vector_lanes();
  int64_t i = 0;
  for (; i + 8 * lanes <= d; i += 8 * lanes) {
    VF s[8];
    for (int64_t r = 0; r < 8; ++r) s[r] = load(out + i + r * lanes, Whole());
    for (int64_t j = 0; j < n; ++j) {
      const VF w = set(p[j]);
      for (int64_t r = 0; r < 8; ++r)
        s[r] = hn::MulAdd(w, load(v + j * stride + i + r * lanes, Whole()), s[r]);
    }
    for (int64_t r = 0; r < 8; ++r) store(s[r], out + i + r * lanes, Whole());
  }
  for_each_vector(d - i, [&](int64_t c, auto part) HWY_ATTR {
    VF s = load(out + i + c, part);
    for (int64_t j = 0; j < n; ++j) s = hn::MulAdd(set(p[j]), load(v + j * stride + i + c, part), s);
    store(s, out + i + c, part);
  });
}

// ---- programmable scores --------------------------------------------------------------------------------

// A block and its scores. Several of them make up what a block of query rows visits.
struct Piece {
  Block block;
  float* scores;
  bool masked;
  // If masked, which keys each row may see: bits, a row's in whole vectors (TileHook::look).
  const uint8_t* allowed = nullptr;

  int64_t n_tiles() const { return (block.rows + kTileRows - 1) / kTileRows; }
  static int64_t vector_bytes() { return (vector_lanes() + 7) / 8; }
  int64_t row_bytes() const { return block.stride() / vector_lanes() * vector_bytes(); }
  // Where the bits of row r from a vector's first column on begin.
  int64_t at(int64_t r, int64_t column) const {
    return r * row_bytes() + column / vector_lanes() * vector_bytes();
  }
};
constexpr int64_t kBitsRoom = 8;  // bytes that may be read and written past the last bits

// Dropout of one query row (Philox4x32-10, as attention_dropout_bits).
class DropoutRow {
 public:
  DropoutRow(const cpu::CpuAttentionPlan& plan, int64_t b, int64_t h, int64_t r)
      : seed_(plan.spec().dropout_seed),
        threshold_(plan.dropout_threshold()),
        factor_(plan.dropout_factor()),
        counter_{static_cast<uint32_t>(r), static_cast<uint32_t>(h), static_cast<uint32_t>(b)} {}

  // kept[i] = 0 or 1 / (1 - dropout) for keys [first, first + n); first a multiple of 4, kept has room for
  // whole groups of 4 vectors.
  void factors(int64_t first, int64_t n, float* kept) const {
    const hn::RebindToUnsigned<F32> du;
    const int64_t lanes = vector_lanes();
    const VF zero = set(0), factor = set(factor_);
    HWY_ALIGN uint32_t bits[4 * hn::MaxLanes(du)];
    for (int64_t i = 0; i < n; i += 4 * lanes) {
      words(static_cast<uint32_t>((first + i) / 4), bits);
      for (int64_t w = 0; w < 4; ++w) {
        // Dropped: bits < threshold, where a threshold of 2^32 drops all.
        const auto x = hn::Load(du, bits + w * lanes);
        const auto stays = hn::Lt(hn::Set(du, static_cast<uint32_t>(threshold_ - 1)), x);
        hn::StoreU(hn::IfThenElse(hn::RebindMask(F32(), stays), factor, zero), F32(), kept + i + w * lanes);
      }
    }
  }

 private:
#if HWY_TARGET == HWY_SCALAR
  void words(uint32_t first, uint32_t* out) const {
    const auto word = philox4x32({first, counter_[0], counter_[1], counter_[2]}, seed_);
    std::copy(word.begin(), word.end(), out);
  }
#else
  using U32 = hn::RebindToUnsigned<F32>;
  using VU = hn::Vec<U32>;
  struct Product {
    VU high, low;
  };
  static HWY_INLINE Product multiply_words(VU a, uint32_t m) {
    const U32 du;
    const hn::RepartitionToWide<U32> dw;
    const VU mv = hn::Set(du, m);
    const auto even = hn::MulEven(a, mv);
    const auto odd = hn::MulEven(hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(dw, a))), mv);
    const auto upper = hn::Set(dw, 0xFFFFFFFF00000000u);
    const auto high = hn::Or(hn::ShiftRight<32>(even), hn::And(odd, upper));
    const auto low = hn::Or(hn::AndNot(upper, even), hn::ShiftLeft<32>(odd));
    return {hn::BitCast(du, high), hn::BitCast(du, low)};
  }

  // The words of counters [first, first + lanes), each counter's four behind one another.
  HWY_INLINE void words(uint32_t first, uint32_t* out) const {
    const U32 du;
    VU c0 = hn::Iota(du, first), c1 = hn::Set(du, counter_[0]), c2 = hn::Set(du, counter_[1]),
       c3 = hn::Set(du, counter_[2]);
    auto k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const Product p0 = multiply_words(c0, 0xD2511F53u), p1 = multiply_words(c2, 0xCD9E8D57u);
      c0 = hn::Xor(hn::Xor(p1.high, c1), hn::Set(du, k0));
      c2 = hn::Xor(hn::Xor(p0.high, c3), hn::Set(du, k1));
      c1 = p1.low;
      c3 = p0.low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    hn::StoreInterleaved4(c0, c1, c2, c3, du, out);
  }
#endif

  uint64_t seed_, threshold_;
  float factor_;
  std::array<uint32_t, 3> counter_;
};

// Room for DropoutRow::factors of a whole row of scores.
HWY_INLINE int64_t dropout_room(int64_t n) { return round_up(n, 4 * vector_lanes()); }

// The programs of a plan on one head's tiles.
class TileHook {
 public:
  void start(const cpu::CpuAttentionPlan& plan, bool backward, int64_t b, int64_t h) {
    scale_ = static_cast<float>(plan.spec().scale);
    const RowSizes sizes = plan.row(b);
    mask_.start(plan.mask(), b, h, sizes.q_len, sizes.kv_len, scale_);
    mod_.start(plan.mod(backward), b, h, sizes.q_len, sizes.kv_len, scale_);
  }
  // What turns a score into the exponent of 2.
  float exponent_scale() const { return mod_.has_program() ? kLog2E : scale_ * kLog2E; }

  void rows(int64_t first, int64_t n) {
    for (TileMachine* machine : {&mask_, &mod_}) {
      if (machine->has_program()) machine->rows(first, n);
    }
  }

  // Of a masked piece, before its scores are computed: what the mask shows to each row, as bits, and to each
  // tile of rows, in piece.block.shown. Bytes: rows * row_bytes() + kBitsRoom.
  void look(Piece& piece, uint8_t* allowed, Range* shown) {
    const Block& block = piece.block;
    const int64_t n = block.part.end - block.part.begin, lanes = vector_lanes();
    std::fill_n(shown, piece.n_tiles(), Range{n, 0});
    for (int64_t first = 0; first < n; first += kTileKeys) {
      const int64_t count = std::min(kTileKeys, n - first);
      mask_.keys(block.base + block.part.begin + first, count);
      for (int64_t r = 0; r < block.rows; ++r) {
        mask_.run(r, {0, round_up(count, lanes)}, nullptr);
        const TileOperand mask = mask_.root(0);
        Range& seen = shown[r / kTileRows];
        for (int64_t i = 0; i < count; i += lanes) {
          const auto bits = hn::MaskFromVec(mask.at(i));
          hn::StoreMaskBits(F32(), bits, allowed + piece.at(r, first + i));
          if (!hn::AllFalse(F32(), bits))
            seen = {std::min(seen.begin, first + i), std::max(seen.end, std::min(n, first + i + lanes))};
        }
      }
    }
    for (int64_t t = 0; t < piece.n_tiles(); ++t)
      shown[t] = {block.part.begin + shown[t].begin, block.part.begin + shown[t].end};
    piece.allowed = allowed;
    piece.block.shown = shown;
  }

  // Replaces the scores of a piece by modded ones, -inf where the mask forbids. fn(machine, row, first, span)
  // runs after each row of each tile, whose keys begin at column `first` of the piece; the machine has run
  // the mod.
  template <class Fn>
  void apply(const Piece& piece, const Fn& fn) {
    const Block& block = piece.block;
    const int64_t n = block.part.end - block.part.begin, lanes = vector_lanes();
    for (int64_t first = 0; first < n; first += kTileKeys) {
      const int64_t count = std::min(kTileKeys, n - first);
      if (mod_.has_program()) mod_.keys(block.base + block.part.begin + first, count);
      for (int64_t r = 0; r < block.rows; ++r) {
        const Span whole = span_of(block, r);
        const Range tile = {first, first + round_up(count, lanes)};
        const Span span = {intersection(whole.keys, tile), intersection(whole.read, tile)};
        if (empty(span.read)) continue;
        float* p = piece.scores + r * block.stride();
        if (mod_.has_program()) {
          mod_.run(r, {span.read.begin - first, span.read.end - first}, p + first);
          const TileOperand modded = mod_.root(0);
          for (int64_t i = span.read.begin; i < span.read.end; i += lanes)
            hn::StoreU(modded.at(i - first), F32(), p + i);
        }
        for (int64_t i = span.read.begin; piece.masked && i < span.read.end; i += lanes) {
          const auto bits = hn::LoadMaskBits(F32(), piece.allowed + piece.at(r, i));
          hn::StoreU(hn::IfThenElse(bits, hn::LoadU(F32(), p + i), minus_infinity()), F32(), p + i);
        }
        fn(mod_, r, first, span);
      }
    }
  }
  void apply(const Piece& piece) {
    if (piece.masked || mod_.has_program())
      apply(piece, [](const TileMachine&, int64_t, int64_t, const Span&) {});
  }

 private:
  TileMachine mask_, mod_;
  float scale_ = 1;
};

// ---- memory ---------------------------------------------------------------------------------------------

// Rows of a head that pages hold, one behind the other.
struct PageBuffer {
  std::vector<char> bytes;
};

// At least n elements, uninitialized or old.
template <class T>
T* grown(std::vector<T>& buffer, int64_t n) {
  if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(static_cast<size_t>(n));
  return buffer.data();
}

struct Scratch {
  Buffer q, k, v, o, d_o, s, ds, q_slabs, k_slabs, do_slabs, dq, dk, dv, kept, row;
  PageBuffer k_rows, v_rows;
  std::vector<cpu::Segment> segments;
  std::vector<Piece> pieces;
  std::vector<uint8_t> allowed;  // of the pieces
  std::vector<Range> shown;
  TileHook hook;
};
// A thread keeps it from call to call (some MB): clearing fresh pages would cost a tenth of a call.
inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
};

// Rows [begin, begin + n) of key head g: where they are, or gathered from their pages.
template <class T>
HeadRows<T> key_rows(const HeadsView& view, const cpu::CpuAttentionPlan& plan, const AttentionTensors& x,
                     int64_t b, int64_t begin, int64_t n, int64_t g, PageBuffer& buffer) {
  const int64_t d = plan.shape().head_dim, page_size = plan.spec().page_size;
  if (page_size == 0) return {head<T>(view, b, begin, g, d), view.token_stride};
  buffer.bytes.resize(static_cast<size_t>(n * d) * sizeof(T));
  T* rows = reinterpret_cast<T*>(buffer.bytes.data());
  const int32_t* table = x.block_table->as<int32_t>() + b * x.block_table->dim(1);
  for (int64_t j = 0; j < n; ++j) {
    const int64_t page = table[(begin + j) / page_size];
    std::copy_n(head<T>(view, page, (begin + j) % page_size, g, d), d, rows + j * d);
  }
  return {rows, d};
}

template <class T>
void clear_rows(const HeadsView& view, int64_t b, const Range& rows, int64_t h, int64_t d) {
  for (int64_t t = rows.begin; t < rows.end; ++t) std::fill_n(head<T>(view, b, t, h, d), d, T{});
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
