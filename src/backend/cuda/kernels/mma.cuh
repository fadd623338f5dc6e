// Tile products for attention: small wrappers over PTX (ldmatrix, mma.sync, cp.async; sm_80 and up), and the
// same three products in plain FFMA for f32, where TF32 would lose 13 bits.
//
// A tile is rows x columns of Element in shared memory (tiles.cuh: swizzled or padded). Accumulators have the
// layout of mma.m16n8k16: element e of acc[m][n] in lane l is row 16*m + l/4 + 8*(e/2), column
// 8*n + 2*(l%4) + e%2. Rows and columns where a product starts are multiples of 16 (of 8 in f32).
#pragma once
#include "attention_params.cuh"
#include "tiles.cuh"

namespace flexchat::cuda {

#define ATTENTION_DEVICE __device__ __forceinline__

constexpr int kDType = ATTENTION_DTYPE, kHeadDim = ATTENTION_HEAD_DIM;
constexpr bool kExact = kDType == kAttentionF32;
constexpr int kElementBytes = kExact ? 4 : 2;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

ATTENTION_DEVICE float negative_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

ATTENTION_DEVICE unsigned shared_address(const void* p) {
  unsigned a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}

// 16 bytes from global to shared memory; zeros unless `valid`, and then nothing is read.
ATTENTION_DEVICE void copy_async(unsigned to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
}
ATTENTION_DEVICE void copy_async(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
ATTENTION_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int pending>
ATTENTION_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// exp2(-inf) = 0; relative error 2^-22.
ATTENTION_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Quad {
  unsigned x[4];
};
ATTENTION_DEVICE Quad load_matrix(unsigned address) {
  Quad r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x[0]), "=r"(r.x[1]), "=r"(r.x[2]), "=r"(r.x[3])
               : "r"(address)
               : "memory");
  return r;
}
ATTENTION_DEVICE Quad load_matrix_trans(unsigned address) {
  Quad r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x[0]), "=r"(r.x[1]), "=r"(r.x[2]), "=r"(r.x[3])
               : "r"(address)
               : "memory");
  return r;
}

// c (16x8 f32) += a (16x16) * b (16x8)
ATTENTION_DEVICE void mma(float (&c)[4], const Quad& a, unsigned b0, unsigned b1) {
#if ATTENTION_DTYPE == 1
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kStoresMatrices = !kExact;
// Four 8x8 matrices to shared memory; the row at `address` is that of load_matrix.
ATTENTION_DEVICE void store_matrix(unsigned address, const Quad& a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a.x[0]),
               "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3])
               : "memory");
}
#else
constexpr bool kStoresMatrices = false;
ATTENTION_DEVICE void store_matrix(unsigned, const Quad&) {}
#endif

// Two floats rounded to Element, the first in the low half.
ATTENTION_DEVICE unsigned pack(float low, float high) {
  unsigned r;
#if ATTENTION_DTYPE == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
// Two neighbouring 16x8 pieces of an accumulator as one 16x16 piece of a left operand.
ATTENTION_DEVICE Quad pack(const float (&left)[4], const float (&right)[4]) {
  return {
      {pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]), pack(right[2], right[3])}};
}
ATTENTION_DEVICE void unpack(unsigned x, float& low, float& high) {
#if ATTENTION_DTYPE == 1
  low = __uint_as_float(x << 16);
  high = __uint_as_float(x & 0xffff0000u);
#else
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(x));
#endif
}

ATTENTION_DEVICE void store_shared(unsigned address, unsigned x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
ATTENTION_DEVICE void store_shared(unsigned address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
ATTENTION_DEVICE float load_shared(unsigned address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
ATTENTION_DEVICE float2 load_shared2(unsigned address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
ATTENTION_DEVICE float4 load_shared4(unsigned address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Addresses inside a tile with `columns` elements a row.
template <int columns>
struct Tile {
  static constexpr int chunks = columns * kElementBytes / 16;
  static constexpr bool swizzled = chunks % 8 == 0;
  static constexpr int row_bytes = tile_row_bytes(columns, kElementBytes);
  ATTENTION_DEVICE static unsigned chunk_offset(int row, int chunk) {
    return static_cast<unsigned>(row * row_bytes + ((swizzled ? chunk ^ (row & 7) : chunk) << 4));
  }
  // Chunks of a row, and of the rows a multiple of 8 below it, which are swizzled alike: what is the same for
  // all of them is computed once, which the compiler is spared finding out.
  struct Line {
    unsigned base, mix;
    ATTENTION_DEVICE unsigned at(int below, int chunk) const {
      return base + ((static_cast<unsigned>(chunk) << 4) ^ mix) + static_cast<unsigned>(below * row_bytes);
    }
  };
  // at(below, chunk) of chunk + odd; with odd == 1 of even chunks only.
  ATTENTION_DEVICE static Line line(unsigned tile, int row, int odd = 0) {
    return {tile + static_cast<unsigned>(row * row_bytes),
            static_cast<unsigned>((swizzled ? row & 7 : 0) ^ odd) << 4};
  }
  // The same of this lane's two elements in an accumulator's columns: rows row + lane / 4 and those below,
  // column 8 * n + 2 * (lane % 4) at(below, n * chunks_of_8).
  static constexpr int chunks_of_8 = kElementBytes / 2;
  ATTENTION_DEVICE static Line lane_line(unsigned tile, int row, int lane) {
    const int byte = 2 * (lane % 4) * kElementBytes;
    return line(tile + static_cast<unsigned>(byte & 15), row, byte >> 4);
  }
};

template <int m_tiles, int n_tiles>
ATTENTION_DEVICE void add_up(float (&acc)[m_tiles][n_tiles][4], const float (&part)[m_tiles][n_tiles][4]) {
#pragma unroll
  for (int m = 0; m < m_tiles; ++m)
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] += part[m][n][e];
}

// x[m][n] to x[m][n - 1]; the first is gone, the last stays.
template <int m_tiles, int n_tiles>
ATTENTION_DEVICE void shift(float (&x)[m_tiles][n_tiles][4]) {
#pragma unroll
  for (int n = 1; n < n_tiles; ++n)
#pragma unroll
    for (int m = 0; m < m_tiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n - 1][e] = x[m][n][e];
}
// The same, the first to the last.
template <int m_tiles, int n_tiles>
ATTENTION_DEVICE void rotate(float (&x)[m_tiles][n_tiles][4]) {
  float first[m_tiles][4];
#pragma unroll
  for (int m = 0; m < m_tiles; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) first[m][e] = x[m][0][e];
  shift(x);
#pragma unroll
  for (int m = 0; m < m_tiles; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[m][n_tiles - 1][e] = first[m][e];
}
// Calls f(n, at) for n = 0 .. n_tiles - 1, the n-th pieces of accumulators being x[m][at]. rolled: there is
// one copy of f's code, which compiles in a fraction of the time; accumulators move along under it.
template <bool rolled, class F, int m_tiles, int n_tiles, class... More>
ATTENTION_DEVICE void for_each_piece(const F& f, float (&x)[m_tiles][n_tiles][4], More&... more) {
  if constexpr (rolled) {
#pragma unroll 1
    for (int n = 0; n < n_tiles; ++n) {
      f(n, 0);
      rotate(x);
      (rotate(more), ...);
    }
  } else {
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) f(n, n);
  }
}

// f32: acc += x (8 columns of the left operand) times 8 rows of tile b from b_row on. The 8 are summed by
// themselves: rounding errors grow with the length of a piece.
template <int columns, int m_tiles, int n_tiles>
ATTENTION_DEVICE void add_rows(float (&acc)[m_tiles][n_tiles][4], const float (&x)[8][m_tiles][2], unsigned b,
                               int b_row, int b_column, int lane) {
  using T = Tile<columns>;
#pragma unroll
  for (int n = 0; n < n_tiles; ++n) {
    float part[m_tiles][4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float2 y = load_shared2(T::lane_line(b, k, lane).at(b_row, (b_column / 8 + n) * T::chunks_of_8));
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          part[m][2 * i] = fmaf(x[k][m][i], y.x, part[m][2 * i]);
          part[m][2 * i + 1] = fmaf(x[k][m][i], y.y, part[m][2 * i + 1]);
        }
    }
#pragma unroll
    for (int m = 0; m < m_tiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] += part[m][e];
  }
}

// acc[m][n] += A B^T over `depth` columns: rows a_row.. of tile a, rows b_row.. of tile b. a and b are laid
// out as Tile<depth>.
template <int depth, int m_tiles, int n_tiles>
ATTENTION_DEVICE void product_nt(float (&acc)[m_tiles][n_tiles][4], unsigned a, int a_row, unsigned b,
                                 int b_row, int lane) {
  using T = Tile<depth>;
  if constexpr (kExact) {
    // Sums of sums of sums: rounding errors grow with 16, 4 and depth / 64, not with depth.
    const typename T::Line a_line = T::line(a, a_row + lane / 4);
    const typename T::Line b_line[2] = {T::line(b, b_row + 2 * (lane % 4)),
                                        T::line(b, b_row + 2 * (lane % 4) + 1)};
    constexpr int outer = depth <= 64 ? depth : depth % 64 == 0 ? 64 : depth % 48 == 0 ? 48 : depth;
#pragma unroll 1
    for (int k1 = 0; k1 < depth; k1 += outer) {
      float sum[m_tiles][n_tiles][4] = {};
#pragma unroll 1
      for (int k0 = k1; k0 < k1 + outer; k0 += 16) {
        float part[m_tiles][n_tiles][4] = {};
#pragma unroll 1
        for (int k = k0; k < k0 + 16; k += 4) {
          float4 x[m_tiles][2];
#pragma unroll
          for (int m = 0; m < m_tiles; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) x[m][i] = load_shared4(a_line.at(16 * m + 8 * i, k / 4));
#pragma unroll
          for (int n = 0; n < n_tiles; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float4 y = load_shared4(b_line[e].at(8 * n, k / 4));
#pragma unroll
              for (int m = 0; m < m_tiles; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  float& c = part[m][n][2 * i + e];
                  c = fmaf(x[m][i].x, y.x, c);
                  c = fmaf(x[m][i].y, y.y, c);
                  c = fmaf(x[m][i].z, y.z, c);
                  c = fmaf(x[m][i].w, y.w, c);
                }
            }
        }
        add_up(outer == depth ? acc : sum, part);
      }
      if (outer != depth) add_up(acc, sum);
    }
  } else {
    // ldmatrix x4: lanes 0-7, 8-15, 16-23, 24-31 give the rows of four 8x8 matrices. A: (rows 0-7, 8-15) of
    // the first 8 columns, then of the second. B: both column halves of rows 0-7, then of rows 8-15.
    const typename T::Line a_line = T::line(a, a_row + (lane & 15), lane >> 4);
    const typename T::Line b_line = T::line(b, b_row + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
#pragma unroll
    for (int k = 0; k < depth / 16; ++k) {
      Quad x[m_tiles];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) x[m] = load_matrix(a_line.at(16 * m, 2 * k));
#pragma unroll
      for (int n = 0; n < n_tiles; n += 2) {
        const Quad y = load_matrix(b_line.at(8 * n, 2 * k));
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
          mma(acc[m][n], x[m], y.x[0], y.x[1]);
          mma(acc[m][n + 1], x[m], y.x[2], y.x[3]);
        }
      }
    }
  }
}

// acc[m][n] += P B: P (16*m_tiles x 8*k_tiles) in registers with the accumulator's layout, rounded to
// Element; B rows b_row.. and columns b_column.. of tile b, laid out as Tile<columns>. prepare(k) is called
// before columns k and k + 1 of P are read, for even k. P may be changed.
template <int columns, int m_tiles, int k_tiles, int n_tiles, class Prepare>
ATTENTION_DEVICE void product_rn(float (&acc)[m_tiles][n_tiles][4], float (&p)[m_tiles][k_tiles][4],
                                 unsigned b, int b_row, int b_column, int lane, const Prepare& prepare) {
  using T = Tile<columns>;
  if constexpr (kExact) {
    static_assert(k_tiles % 2 == 0);
#pragma unroll
    for (int k = 0; k < k_tiles; k += 2) prepare(k);
      // One copy of the code, which compiles in a fraction of the time: P moves along under it.
#pragma unroll 1
    for (int k0 = 0; k0 < 8 * k_tiles; k0 += 8) {
      float x[8][m_tiles][2];
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int m = 0; m < m_tiles; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            x[k][m][i] = __shfl_sync(~0u, p[m][0][2 * i + k % 2], (lane & ~3) | (k / 2));
      add_rows<columns>(acc, x, b, b_row + k0, b_column, lane);
      shift(p);
    }
  } else {
    static_assert(k_tiles % 2 == 0 && n_tiles % 2 == 0);
    const typename T::Line b_line = T::line(b, b_row + (lane & 15), lane >> 4);
#pragma unroll
    for (int k = 0; k < k_tiles; k += 2) {
      prepare(k);
      Quad x[m_tiles];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) x[m] = pack(p[m][k], p[m][k + 1]);
#pragma unroll
      for (int n = 0; n < n_tiles; n += 2) {
        const Quad y = load_matrix_trans(b_line.at(8 * k, b_column / 8 + n));
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
          mma(acc[m][n], x[m], y.x[0], y.x[1]);
          mma(acc[m][n + 1], x[m], y.x[2], y.x[3]);
        }
      }
    }
  }
}
template <int columns, int m_tiles, int k_tiles, int n_tiles>
ATTENTION_DEVICE void product_rn(float (&acc)[m_tiles][n_tiles][4], float (&p)[m_tiles][k_tiles][4],
                                 unsigned b, int b_row, int b_column, int lane) {
  product_rn<columns>(acc, p, b, b_row, b_column, lane, [](int) {});
}

// acc[m][n] += A B over `depth` columns of A: rows a_row.. and columns a_column.. of tile a
// (Tile<a_columns>), rows a_column.. and columns b_column.. of tile b (Tile<b_columns>). Not for f32.
template <int a_columns, int b_columns, int depth, int m_tiles, int n_tiles>
ATTENTION_DEVICE void product_nn(float (&acc)[m_tiles][n_tiles][4], unsigned a, int a_row, int a_column,
                                 unsigned b, int b_column, int lane) {
  using TA = Tile<a_columns>;
  using TB = Tile<b_columns>;
  const int a_lane = a_row + (lane & 15), a_half = a_column / 8 + (lane >> 4);
  const int b_lane = a_column + (lane & 15), b_half = b_column / 8 + (lane >> 4);
#pragma unroll
  for (int k = 0; k < depth / 16; ++k) {
    Quad x[m_tiles];
#pragma unroll
    for (int m = 0; m < m_tiles; ++m)
      x[m] = load_matrix(a + TA::chunk_offset(a_lane + 16 * m, 2 * k + a_half));
#pragma unroll
    for (int n = 0; n < n_tiles; n += 2) {
      const Quad y = load_matrix_trans(b + TB::chunk_offset(b_lane + 16 * k, b_half + n));
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) {
        mma(acc[m][n], x[m], y.x[0], y.x[1]);
        mma(acc[m][n + 1], x[m], y.x[2], y.x[3]);
      }
    }
  }
}

// acc[m][n] += A^T B over `depth` rows: columns a_column.. of tile a (Tile<a_columns>), columns b_column.. of
// tile b (Tile<b_columns>).
template <int a_columns, int b_columns, int depth, int m_tiles, int n_tiles>
ATTENTION_DEVICE void product_tn(float (&acc)[m_tiles][n_tiles][4], unsigned a, int a_column, unsigned b,
                                 int b_column, int lane) {
  using TA = Tile<a_columns>;
  using TB = Tile<b_columns>;
  if constexpr (kExact) {
#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += 8) {
      float x[8][m_tiles][2];
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int m = 0; m < m_tiles; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int chunk = a_column / 4 + 4 * m + 2 * i + lane / 16;
            x[k][m][i] = load_shared(a + TA::chunk_offset(k0 + k, chunk) + lane / 4 % 4 * 4);
          }
      add_rows<b_columns>(acc, x, b, k0, b_column, lane);
    }
  } else {
    // A^T: matrices (k 0-7, m 0-7), (k 0-7, m 8-15), (k 8-15, m 0-7), (k 8-15, m 8-15), each transposed.
    const int a_lane = (lane & 7) + ((lane >> 4) << 3), a_half = a_column / 8 + ((lane >> 3) & 1);
    const int b_lane = lane & 15, b_half = b_column / 8 + (lane >> 4);
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      Quad x[m_tiles];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
        x[m] = load_matrix_trans(a + TA::chunk_offset(a_lane + k, a_half + 2 * m));
#pragma unroll
      for (int n = 0; n < n_tiles; n += 2) {
        const Quad y = load_matrix_trans(b + TB::chunk_offset(b_lane + k, b_half + n));
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
          mma(acc[m][n], x[m], y.x[0], y.x[1]);
          mma(acc[m][n + 1], x[m], y.x[2], y.x[3]);
        }
      }
    }
  }
}

}  // namespace flexchat::cuda
