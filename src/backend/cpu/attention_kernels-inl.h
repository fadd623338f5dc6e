// Single-thread f32 building blocks of attention: packing of (n, D) head matrices, register-tiled products
// over packed operands, and a base-2 exponential. Included once per SIMD target (Highway's foreach_target).
//
// A product multiplies an operand A that is broadcast element by element with an operand B read as
// unit-stride vectors; a tile of kTileRows x (at most) kTileVectors vectors of the result stays in registers
// over all of k. B comes packed, padded to whole vectors, in one of two layouts:
//   slabs   for k = row of X: columns in groups of 1..3 vectors, each group a contiguous (n, group) matrix
//   panels  for k = column of X: rows in panels of kTileVectors vectors, each a contiguous (D, panel) matrix
#if defined(FLEXCHAT_ATTENTION_KERNELS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FLEXCHAT_ATTENTION_KERNELS_INL_H
#undef FLEXCHAT_ATTENTION_KERNELS_INL_H
#else
#define FLEXCHAT_ATTENTION_KERNELS_INL_H
#endif

#include <hwy/aligned_allocator.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

// 24 accumulators of AVX-512's 32 registers, 12 of AVX2's 16.
#if HWY_ARCH_X86 && HWY_MAX_BYTES < 64
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 8;
#endif
constexpr int kTileVectors = 3;

HWY_INLINE int64_t vector_lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }
HWY_INLINE int64_t panel_width() { return kTileVectors * vector_lanes(); }
HWY_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Uninitialized floats, aligned for whole vectors; grows and never shrinks.
class Buffer {
 public:
  float* reserve(int64_t n) {
    if (n > size_) {
      data_ = hwy::AllocateAligned<float>(static_cast<size_t>(n));
      size_ = n;
    }
    return data_.get();
  }

 private:
  hwy::AlignedFreeUniquePtr<float[]> data_;
  int64_t size_ = 0;
};

// fn(first vector, vectors) for the column groups of a row of d elements, as even as they can be.
template <class Fn>
HWY_INLINE void for_each_group(int64_t d, const Fn& fn) {
  const int64_t vectors = (d + vector_lanes() - 1) / vector_lanes();
  const int64_t groups = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t i = 0, first = 0; i < groups; ++i) {
    const int64_t count = (vectors - first + groups - i - 1) / (groups - i);
    fn(first, count);
    first += count;
  }
}

// Starts reading d elements at x. Rows of a head lie pages apart, where no hardware prefetcher follows.
template <class T>
HWY_INLINE void prefetch_row(const T* x, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < d; i += kLine) __builtin_prefetch(x + i);
}

constexpr int64_t kRowsAhead = 8;  // of packing

// Rows x (n, d), `stride` apart, as slabs; out holds n * round_up(d, lanes).
template <class T>
void pack_slabs(const T* x, int64_t stride, int64_t n, int64_t d, float* out) {
  const int64_t lanes = vector_lanes();
  for (int64_t t0 = 0; t0 < n; t0 += kRowsAhead) {
    const int64_t t1 = std::min(n, t0 + kRowsAhead);
    for (int64_t t = t1; t < std::min(n, t1 + kRowsAhead); ++t) prefetch_row(x + t * stride, d);
    for_each_group(d, [&](int64_t first, int64_t count) HWY_ATTR {
      float* y = out + (first * n + t0 * count) * lanes;
      const int64_t begin = first * lanes, size = std::min(d - begin, count * lanes);
      for (int64_t t = t0; t < t1; ++t, y += count * lanes) {
        const T* row = x + t * stride + begin;
        for_each_vector(size,
                        [&](int64_t i, auto part) HWY_ATTR { store(load(row + i, part), y + i, Whole()); });
      }
    });
  }
}

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
// 16 vectors as rows of a matrix become its columns.
HWY_INLINE void transpose(VF (&x)[16]) {
  const hn::Repartition<double, F32> dd;
  VF y[16];
  HWY_UNROLL(4)
  for (int r = 0; r < 16; r += 4) {  // 4 x 4 within each block of 128 bits
    const auto a = hn::BitCast(dd, hn::InterleaveLower(F32(), x[r], x[r + 1])),
               b = hn::BitCast(dd, hn::InterleaveUpper(F32(), x[r], x[r + 1])),
               c = hn::BitCast(dd, hn::InterleaveLower(F32(), x[r + 2], x[r + 3])),
               e = hn::BitCast(dd, hn::InterleaveUpper(F32(), x[r + 2], x[r + 3]));
    y[r] = hn::BitCast(F32(), hn::InterleaveLower(dd, a, c));
    y[r + 1] = hn::BitCast(F32(), hn::InterleaveUpper(dd, a, c));
    y[r + 2] = hn::BitCast(F32(), hn::InterleaveLower(dd, b, e));
    y[r + 3] = hn::BitCast(F32(), hn::InterleaveUpper(dd, b, e));
  }
  HWY_UNROLL(4)
  for (int c = 0; c < 4; ++c) {  // then 4 x 4 blocks
    const __m512 a = _mm512_shuffle_f32x4(y[c].raw, y[c + 4].raw, 0x44),
                 b = _mm512_shuffle_f32x4(y[c].raw, y[c + 4].raw, 0xEE),
                 e = _mm512_shuffle_f32x4(y[c + 8].raw, y[c + 12].raw, 0x44),
                 f = _mm512_shuffle_f32x4(y[c + 8].raw, y[c + 12].raw, 0xEE);
    x[c] = VF{_mm512_shuffle_f32x4(a, e, 0x88)};
    x[c + 4] = VF{_mm512_shuffle_f32x4(a, e, 0xDD)};
    x[c + 8] = VF{_mm512_shuffle_f32x4(b, f, 0x88)};
    x[c + 12] = VF{_mm512_shuffle_f32x4(b, f, 0xDD)};
  }
}

// rows (16) of d elements as columns of a panel: out[i * width + r] = rows[r][i].
template <class T>
void pack_columns(const T* const* rows, int64_t d, int64_t width, int64_t, float* out) {
  for_each_vector(d, [&](int64_t i, auto part) HWY_ATTR {
    VF x[16];
    HWY_UNROLL(16)
    for (int r = 0; r < 16; ++r) x[r] = load(rows[r] + i, part);
    transpose(x);
    float* y = out + i * width;
    if (i + 16 <= d) {
      HWY_UNROLL(16)
      for (int c = 0; c < 16; ++c) hn::StoreU(x[c], F32(), y + c * width);
    } else {
      HWY_UNROLL(16)
      for (int c = 0; c < 16; ++c) {
        if (i + c < d) hn::StoreU(x[c], F32(), y + c * width);
      }
    }
  });
}
constexpr int64_t kPackedColumns = 16;
#else
// rows (4) of d elements as columns of a panel: out[i * width + r] = rows[r][i], of which `count` are wanted.
template <class T>
void pack_columns(const T* const* rows, int64_t d, int64_t width, int64_t count, float* out) {
  const int64_t lanes = vector_lanes();
  HWY_ALIGN float quads[4 * hn::MaxLanes(F32())];
  for_each_vector(d, [&](int64_t i, auto part) HWY_ATTR {
    hn::StoreInterleaved4(load(rows[0] + i, part), load(rows[1] + i, part), load(rows[2] + i, part),
                          load(rows[3] + i, part), F32(), quads);
    float* y = out + i * width;
    const int64_t columns = std::min(lanes, d - i);
    if (count == 4) {
      for (int64_t c = 0; c < columns; ++c) std::memcpy(y + c * width, quads + 4 * c, 4 * sizeof(float));
    } else {  // vectors of fewer than 4 lanes
      for (int64_t c = 0; c < columns; ++c) std::copy_n(quads + 4 * c, count, y + c * width);
    }
  });
}
constexpr int64_t kPackedColumns = 4;
#endif

// The same rows as panels; out holds round_up(n, panel) * d.
template <class T>
void pack_panels(const T* x, int64_t stride, int64_t n, int64_t d, float* out) {
  const int64_t width = panel_width();
  for (int64_t t0 = 0; t0 < n; t0 += width, out += width * d) {
    for (int64_t t = 0; t < width; t += kPackedColumns) {
      const T* rows[kPackedColumns];  // those past the end are copies, which nobody looks at
      for (int64_t r = 0; r < kPackedColumns; ++r) {
        rows[r] = x + std::min(t0 + t + r, n - 1) * stride;
        if (t0 + t + r + kPackedColumns < n) prefetch_row(rows[r] + kPackedColumns * stride, d);
      }
      pack_columns(rows, d, width, std::min(kPackedColumns, width - t), out + t);
    }
  }
}

// c (rows, vectors) = factor[r] * (sum over k of a(r, k) * b[k] + c where `accumulate`)
struct Tile {
  const float* a;
  int64_t a_stride;  // between rows, or between steps of k when A is read across
  const float* b;
  int64_t b_stride;  // between steps of k
  float* c;
  int64_t c_stride;
  int64_t rows;  // 1..kTileRows
  int64_t k;
  bool accumulate = false;
  const float* factor = nullptr;  // (rows) or null for 1
};

// kAcross: a(r, k) = a[k * a_stride + r], where all kTileRows elements must be readable; otherwise
// a[r * a_stride + k].
template <int kVectors, bool kAcross>
HWY_NOINLINE void multiply_tile(const Tile& t) {
  const int64_t lanes = vector_lanes();
  VF sum[kTileRows][kVectors];
  HWY_UNROLL(8)
  for (int r = 0; r < kTileRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = set(0);
  }
  const float* row[kTileRows];
  row[0] = t.a;
  HWY_UNROLL(8)
  for (int r = 1; r < kTileRows; ++r) row[r] = row[r - 1] + (r < t.rows ? t.a_stride : 0);
  for (int64_t r = 0; t.accumulate && r < t.rows; ++r) {  // its lines arrive during the sums
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(t.c + r * t.c_stride + v * lanes, 1);
  }
  const float *a = t.a, *b = t.b;
  const int64_t a_stride = t.a_stride, b_stride = t.b_stride, steps = t.k;
  for (int64_t k = 0; k < steps; ++k, a += a_stride, b += b_stride) {
    VF bv[kVectors];
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) bv[v] = hn::LoadU(F32(), b + v * lanes);
    HWY_UNROLL(8)
    for (int r = 0; r < kTileRows; ++r) {
      const VF ar = set(kAcross ? a[r] : row[r][k]);
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(ar, bv[v], sum[r][v]);
    }
  }
  // What most tiles need comes first, without a branch for each row.
  if (t.rows == kTileRows && t.factor == nullptr) {
    float* c = t.c;
    if (!t.accumulate) {
      HWY_UNROLL(8)
      for (int r = 0; r < kTileRows; ++r, c += t.c_stride) {
        HWY_UNROLL(4)
        for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], F32(), c + v * lanes);
      }
      return;
    }
    HWY_UNROLL(8)
    for (int r = 0; r < kTileRows; ++r, c += t.c_stride) {
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        hn::StoreU(hn::Add(sum[r][v], hn::LoadU(F32(), c + v * lanes)), F32(), c + v * lanes);
      }
    }
    return;
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= t.rows) break;
    const VF f = set(t.factor ? t.factor[r] : 1.0f);
    float* c = t.c + r * t.c_stride;
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      const VF whole = t.accumulate ? hn::Add(sum[r][v], hn::LoadU(F32(), c + v * lanes)) : sum[r][v];
      hn::StoreU(hn::Mul(whole, f), F32(), c + v * lanes);
    }
  }
}

template <bool kAcross>
HWY_INLINE void multiply(int64_t vectors, const Tile& t) {
  static_assert(kTileVectors == 3);
  if (vectors == 3) return multiply_tile<3, kAcross>(t);
  if (vectors == 2) return multiply_tile<2, kAcross>(t);
  multiply_tile<1, kAcross>(t);
}

// 2^x for x <= 127, off by 2 units roundoff at most (a minimax polynomial on [-1/2, 1/2]); below 2^-126 it
// stays there. NaN gives NaN.
HWY_INLINE VF exp2(VF x) {
  const VF y = hn::Max(set(-126.0f), x);  // in this order x86's maximum keeps NaN
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  const VF f{_mm512_reduce_ps(y.raw, 0)};  // what is left of the nearest integer
#else
  const hn::RebindToSigned<F32> di;
  const VF magic = set(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const VF shifted = hn::Add(y, magic);
  const VF f = hn::Sub(y, hn::Sub(shifted, magic));
#endif
  VF p = set(0.0013276472454890609f);
  p = hn::MulAdd(p, f, set(0.009675541892647743f));
  p = hn::MulAdd(p, f, set(0.05550713092088699f));
  p = hn::MulAdd(p, f, set(0.24022120237350464f));
  p = hn::MulAdd(p, f, set(0.6931469440460205f));
  p = hn::MulAdd(p, f, set(1.0000001192092896f));
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return VF{_mm512_scalef_ps(p.raw, hn::Sub(y, f).raw)};
#else
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  return hn::BitCast(F32(), hn::Add(hn::BitCast(di, p), exponent));
#endif
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
