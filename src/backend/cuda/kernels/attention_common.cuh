// What all attention passes share: a row's lengths, which tiles to visit, visibility of an element, dropout,
// and moving tiles of rows between global and shared memory.
#pragma once
#include "mma.cuh"
#include "mod_math.cuh"

// Are the kernels of Hopper's warpgroups compiled (wgmma_tiles)?
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && ATTENTION_DTYPE != 0 && \
    (ATTENTION_HEAD_DIM == 64 || ATTENTION_HEAD_DIM == 128)
#define ATTENTION_WGMMA 1
#else
#define ATTENTION_WGMMA 0
#endif

namespace flexchat::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kSm90a = true;
#else
constexpr bool kSm90a = false;
#endif

// One batch row and query head.
struct Row {
  int b, h, n_q, n_kv, offset;
};
ATTENTION_DEVICE Row make_row(const AttentionParams& p, int b, int h) {
  return {b, h, p.q_lens ? p.q_lens[b] : p.q_len, p.kv_lens ? p.kv_lens[b] : p.kv_len,
          p.q_offsets ? p.q_offsets[b] : 0};
}

// Keys [first, end) are visible to position q as far as lengths and the built-in mask go.
struct KeyRange {
  int first, end;
};
ATTENTION_DEVICE KeyRange key_range(const AttentionParams& p, const Row& row, int q) {
  KeyRange r{0, row.n_kv};
  if (p.causal) {
    r.end = min(r.end, q + 1);
    if (p.window >= 0) r.first = max(0, q - p.window);
  }
  return r;
}

// Are there loops over scores with one copy of the mod's code (for_each_piece)? In f32 functions are long.
constexpr bool kRolledMods = kExact && MOD_IS_DEAR;

// A call with a mask expression has lists of tiles, and only such a call.
constexpr bool kHasLists = MOD_HAS_MASK;

// The key tiles that queries q_first..q_last (logical positions) visit, or, transposed, the query tiles.
struct TileWalk {
  const int* entry;  // kHasLists; otherwise tiles first, first + 1, ...
  int first, count;
  int entries[2];  // kHasLists: the first two
  ATTENTION_DEVICE int at(int i) const { return entry ? __ldg(entry + i) : 2 * (first + i); }
};
ATTENTION_DEVICE TileWalk list_walk(const AttentionBlocks& blocks, const Row& row, int tiles, int i) {
  const int r =
      ((blocks.batch_rows == 1 ? 0 : row.b) * blocks.head_rows + (blocks.head_rows == 1 ? 0 : row.h)) *
          tiles +
      i;
  const int4 list = __ldg(reinterpret_cast<const int4*>(blocks.begin) + r);
  return {blocks.entry + list.x, 0, list.y, {list.z, list.w}};
}
// Part of a list, one number in each lane: a warp that asked memory for each number when its turn comes would
// stand still until it arrives. For whole warps.
template <bool from_end>
struct ListReader {
  int numbers;
  // Numbers i.. of `list`, which has `count`; from_end: counted from its end.
  ATTENTION_DEVICE void load(const int* list, int count, int i) {
    const int at = min(i + static_cast<int>(threadIdx.x % 32), count - 1);
    numbers = __ldg(list + (from_end ? count - 1 - at : at));
  }
  // Number i, which goes up by one from call to call.
  ATTENTION_DEVICE int operator()(const int* list, int count, int i) {
    if (i % 32 == 0) load(list, count, i);
    return __shfl_sync(~0u, numbers, i % 32);
  }
};
// Is any element of keys kv.. kv + n - 1 hidden from q_first or q_last by lengths and the built-in mask?
ATTENTION_DEVICE bool crosses_border(const AttentionParams& p, const Row& row, int q_first, int q_last,
                                     int kv, int n) {
  return kv + n > key_range(p, row, q_first).end || kv < key_range(p, row, q_last).first;
}

// Philox4x32-10 (base/rng.h); counter (kv / 4, q, h, b): four weights of neighbouring keys.
struct DropoutBits {
  unsigned word[4];
};
ATTENTION_DEVICE DropoutBits dropout_bits(unsigned long long seed, int b, int h, int q, int kv4) {
  unsigned c0 = static_cast<unsigned>(kv4), c1 = static_cast<unsigned>(q), c2 = static_cast<unsigned>(h),
           c3 = static_cast<unsigned>(b);
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const unsigned h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// How a loop over the chunks of a tile is compiled: unrolled; rolled, which compiles fastest; or quick, which
// is rolled for tiles that are not full and unrolled, with fewer instructions, for those that are.
enum class Loop { unrolled, rolled, quick };
template <Loop kind>
struct LoopTag {
  static constexpr Loop loop = kind;
};

// Starts copies of `rows` rows of one head to a tile; rows past `valid` become zeros, unread.
template <int rows, int threads, Loop loop = Loop::unrolled>
ATTENTION_DEVICE void load_rows(unsigned tile, const void* data, long long stride, int valid, int thread) {
  using T = Tile<kHeadDim>;
  const char* from = static_cast<const char*>(data);
  constexpr int total = rows * T::chunks;
  if (loop == Loop::quick && valid >= rows) {
#pragma unroll
    for (int i = 0; i < (total + threads - 1) / threads; ++i) {
      const int at = i * threads + thread;
      if (total % threads != 0 && at >= total) break;
      const int row = at / T::chunks, chunk = at % T::chunks;
      copy_async(tile + T::chunk_offset(row, chunk), from + row * stride * kElementBytes + chunk * 16);
    }
    return;
  }
#pragma unroll(loop == Loop::unrolled ? 64 : 1)
  for (int i = 0; i < (total + threads - 1) / threads; ++i) {
    const int at = i * threads + thread;
    if (total % threads != 0 && at >= total) break;
    const int row = at / T::chunks, chunk = at % T::chunks;
    const bool ok = row < valid;
    copy_async(tile + T::chunk_offset(row, chunk),
               from + (ok ? row * stride * kElementBytes + chunk * 16 : 0), ok);
  }
}

// The same for keys or values kv.. of a batch row, through the block table when there are pages.
template <int rows, int threads, Loop loop = Loop::unrolled>
ATTENTION_DEVICE void load_keys(unsigned tile, const AttentionParams& p, const AttentionView& view,
                                const Row& row, int kv_head, int kv, int thread) {
  const char* data = static_cast<const char*>(view.data) + kv_head * view.head * kElementBytes;
#if ATTENTION_PAGED
  using T = Tile<kHeadDim>;
  constexpr int total = rows * T::chunks;
  const int* table = p.block_table + static_cast<long long>(row.b) * p.table_stride;
#pragma unroll
  for (int i = 0; i < (total + threads - 1) / threads; ++i) {
    const int at = i * threads + thread;
    if (total % threads != 0 && at >= total) break;
    const int key = kv + at / T::chunks, chunk = at % T::chunks;
    const bool ok = key < row.n_kv;
    long long from = 0;
    if (ok) {
      const int page = key / p.page_size;
      from = (__ldg(table + page) * view.batch + (key - page * p.page_size) * view.token) * kElementBytes +
             chunk * 16;
    }
    copy_async(tile + T::chunk_offset(at / T::chunks, chunk), data + from, ok);
  }
#else
  load_rows<rows, threads, loop>(tile, data + (row.b * view.batch + kv * view.token) * kElementBytes,
                                 view.token, row.n_kv - kv, thread);
#endif
}

// An accumulator times `factor` to a tile, as Element: rows row.., columns column...
template <int columns, int m_tiles, int n_tiles>
ATTENTION_DEVICE void store_tile(unsigned tile, const float (&acc)[m_tiles][n_tiles][4],
                                 const float (&factor)[m_tiles][2], int row, int column, int lane) {
  using T = Tile<columns>;
  if constexpr (kStoresMatrices && n_tiles % 2 == 0) {
    const typename T::Line line = T::line(tile, row + lane % 16, lane / 16);
#pragma unroll
    for (int m = 0; m < m_tiles; ++m)
#pragma unroll
      for (int n = 0; n < n_tiles; n += 2) {
        float x[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = acc[m][n + i / 4][i % 4] * factor[m][i % 4 / 2];
        store_matrix(line.at(16 * m, column / 8 + n), pack(x[0], x[1]));
      }
    return;
  }
  const typename T::Line line = T::lane_line(tile, row + lane / 4, lane);
#pragma unroll
  for (int m = 0; m < m_tiles; ++m)
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned to = line.at(16 * m + 8 * i, (column / 8 + n) * T::chunks_of_8);
        const float x = acc[m][n][2 * i] * factor[m][i], y = acc[m][n][2 * i + 1] * factor[m][i];
        if constexpr (kExact)
          store_shared(to, x, y);
        else
          store_shared(to, pack(x, y));
      }
}

// Rows row.. row + rows - 1 of a tile to global memory, as far as `valid` (counted from row 0 of the tile);
// done by `threads` threads, a warp or the block.
template <int rows, int threads>
ATTENTION_DEVICE void write_rows(unsigned tile, int row, void* data, long long stride, int valid,
                                 int thread) {
  using T = Tile<kHeadDim>;
  constexpr int total = rows * T::chunks;
#pragma unroll 4
  for (int i = 0; i < (total + threads - 1) / threads; ++i) {
    const int at = i * threads + thread, r = row + at / T::chunks, chunk = at % T::chunks;
    if (total % threads != 0 && at >= total) break;
    if (r < valid)
      *reinterpret_cast<float4*>(static_cast<char*>(data) + r * stride * kElementBytes + chunk * 16) =
          load_shared4(tile + T::chunk_offset(r, chunk));
  }
}

}  // namespace flexchat::cuda
