// Lists of tiles that a mask visits (AttentionBlocks), built on the device: a thread classifies a tile of
// keys for its block's tile of queries (flex/linear_mask.h), and the block packs what is visited into a list.
//
// Work is some 20 integer operations an atom and tile; captured tensors are read for tiles that clauses
// without them leave open. Writes 4 bytes a tile.
#include "backend/cuda/attention.h"
#include "backend/cuda/runtime.h"

namespace flexchat::cuda {
namespace {

constexpr int kListThreads = 256, kListWarps = kListThreads / 32;

struct ListSizes {
  int n_batch, n_head;  // 1: the same lists for every batch row, or head
  int n_q_tiles, n_kv_tiles, block_q, block_kv;
};

// Where the elements of a read lie: data + offset + i * stride, i in first..last.
struct Stretch {
  const int* data;
  long long stride;
  int first, last;
  bool of_queries;  // the same for all tiles of keys
};
__device__ Stretch stretch(const AttentionParams& p, const flex::LinearRead& read, const flex::LinearRow& row,
                           const flex::Box& box) {
  const AttentionCapture& capture = p.captures[read.capture];
  Stretch x{static_cast<const int*>(capture.data), 0, 0, 0, true};
  for (int axis = 0; axis < read.n_axes; ++axis) {
    const flex::Var var = read.index[axis];
    const long long stride = capture.stride[axis];
    if (var == flex::Var::b) x.data += row.b * stride;
    if (var == flex::Var::h) x.data += row.h * stride;
    if (var != flex::Var::q && var != flex::Var::kv) continue;
    x.of_queries = var == flex::Var::q;
    x.stride = stride;
    x.first = static_cast<int>(x.of_queries ? box.q_first : box.kv_first);
    x.last = static_cast<int>(x.of_queries ? box.q_last : box.kv_last);
  }
  return x;
}

// The range of its elements, every `step`-th from the `begin`-th on.
struct MinMax {
  int lo, hi;
  __device__ void add(int x) {
    lo = min(lo, x);
    hi = max(hi, x);
  }
};
__device__ MinMax scan(const Stretch& x, int begin, int step) {
  const int first = min(x.first + begin, x.last);
  const int start = __ldg(x.data + first * x.stride);
  MinMax range{start, start};
  int i = first;
  if (step == 1 && x.stride == 1 && reinterpret_cast<uintptr_t>(x.data + first) % 16 == 0) {
#pragma unroll 8
    for (; i + 3 <= x.last; i += 4) {
      const int4 four = __ldg(reinterpret_cast<const int4*>(x.data + i));
      range.add(four.x);
      range.add(four.y);
      range.add(four.z);
      range.add(four.w);
    }
  }
#pragma unroll 4
  for (; i <= x.last; i += step) range.add(__ldg(x.data + i * x.stride));
  return range;
}

// Positions in order: how many threads before this one have `mine`, and how many have it in all. For the
// whole block.
struct Place {
  int before, all;
};
__device__ Place place(bool mine, int (&counts)[kListWarps]) {
  const unsigned ballot = __ballot_sync(~0u, mine);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  __syncthreads();
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  Place result{__popc(ballot & ((1u << lane) - 1)), 0};
  for (int w = 0; w < kListWarps; ++w) {
    if (w < warp) result.before += counts[w];
    result.all += counts[w];
  }
  return result;
}

// Writes the head of list `r` (AttentionBlocks::begin). first: its first two entries.
__device__ void write_head(int* begin, long long r, int at, int count, const int (&first)[2]) {
  __syncthreads();
  if (threadIdx.x == 0)
    reinterpret_cast<int4*>(begin)[r] = {at, count, count > 0 ? first[0] : 0, count > 1 ? first[1] : 0};
}

// One block a tile of queries. dense: instead of lists, for each tile of keys -1 or 2*(place in the list) +
// partial.
__global__ void __launch_bounds__(kListThreads)
    query_lists_kernel(const __grid_constant__ flex::LinearMask mask,
                       const __grid_constant__ AttentionParams p, const __grid_constant__ ListSizes sizes,
                       int* begin, int* entry, int* dense) {
  __shared__ int counts[kListWarps], first[2];
  __shared__ MinMax of_queries[flex::max_mask_reads];
  const int r = static_cast<int>(blockIdx.x), bh = r / sizes.n_q_tiles, i = r % sizes.n_q_tiles;
  const int b = bh / sizes.n_head;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int n_q = p.q_lens ? p.q_lens[b] : p.q_len, n_kv = p.kv_lens ? p.kv_lens[b] : p.kv_len;
  const int offset = p.q_offsets ? p.q_offsets[b] : 0;
  const flex::LinearRow row{b, bh % sizes.n_head, n_q, n_kv};
  flex::Box box{offset + i * sizes.block_q, offset + min(n_q, (i + 1) * sizes.block_q) - 1, 0, 0};
  const bool exists = i * sizes.block_q < n_q;
  // What tiles of keys share is read once, a warp for each read.
  if (exists) {
    for (int c = 0; c < mask.n_clauses; ++c)
      for (int a = 0; a < mask.n_atoms[c]; ++a)
        for (int k = 0; k < mask.atoms[c][a].n_reads; ++k) {
          const flex::LinearRead& read = mask.atoms[c][a].reads[k];
          const Stretch x = stretch(p, read, row, box);
          if (!x.of_queries || read.number % kListWarps != warp) continue;
          MinMax range = scan(x, lane, 32);
          range.lo = __reduce_min_sync(~0u, range.lo);
          range.hi = __reduce_max_sync(~0u, range.hi);
          if (lane == 0) of_queries[read.number] = range;
        }
  }
  __syncthreads();
  const int at = r * sizes.n_kv_tiles;
  int count = 0;
  for (int j0 = 0; j0 < sizes.n_kv_tiles; j0 += kListThreads) {
    const int j = j0 + static_cast<int>(threadIdx.x);
    auto truth = flex::Truth::never;
    if (exists && j < sizes.n_kv_tiles && j * sizes.block_kv < n_kv) {
      box.kv_first = j * sizes.block_kv;
      box.kv_last = min(n_kv, (j + 1) * sizes.block_kv) - 1;
      truth = flex::mask_truth(mask, row, box, [&](const flex::LinearRead& read) {
        const Stretch x = stretch(p, read, row, box);
        const MinMax range = x.of_queries ? of_queries[read.number] : scan(x, 0, 1);
        return flex::IntegerRange{range.lo, range.hi};
      });
    }
    const bool visited = truth != flex::Truth::never;
    const Place here = place(visited, counts);
    const int to = count + here.before, partial = truth == flex::Truth::mixed;
    count += here.all;
    if (dense && j < sizes.n_kv_tiles) dense[at + j] = visited ? 2 * to + partial : -1;
    if (dense || !visited) continue;
    entry[at + to] = 2 * j + partial;
    if (to < 2) first[to] = 2 * j + partial;
  }
  if (!dense) write_head(begin, r, at, count, first);
}

// One block a tile of keys, from the dense form.
__global__ void __launch_bounds__(kListThreads)
    key_lists_kernel(const int* dense, const __grid_constant__ ListSizes sizes, int* begin, int* entry,
                     int* rank) {
  __shared__ int counts[kListWarps], first[2];
  const int r = static_cast<int>(blockIdx.x), bh = r / sizes.n_kv_tiles, j = r % sizes.n_kv_tiles;
  const int at = r * sizes.n_q_tiles;
  int count = 0;
  for (int i0 = 0; i0 < sizes.n_q_tiles; i0 += kListThreads) {
    const int i = i0 + static_cast<int>(threadIdx.x);
    const int found = i < sizes.n_q_tiles ? dense[(bh * sizes.n_q_tiles + i) * sizes.n_kv_tiles + j] : -1;
    const Place here = place(found >= 0, counts);
    const int to = count + here.before, value = 2 * i + (found & 1);
    count += here.all;
    if (found < 0) continue;
    entry[at + to] = value;
    rank[at + to] = found >> 1;
    if (to < 2) first[to] = value;
  }
  write_head(begin, r, at, count, first);
}

}  // namespace

void build_tile_lists(Context& context, const flex::LinearMask& mask, const AttentionParams& params,
                      const TileGrid& grid, const TileListBuffers& to) {
  const ListSizes sizes{static_cast<int>(grid.n_batch),   static_cast<int>(grid.n_head),
                        static_cast<int>(grid.n_q_tiles), static_cast<int>(grid.n_kv_tiles),
                        static_cast<int>(grid.block_q),   static_cast<int>(grid.block_kv)};
  const auto heads = static_cast<unsigned>(grid.n_batch * grid.n_head);
  const double bytes = 4.0 * static_cast<double>(grid.tiles());
  launch(context, "attention_query_lists", {bytes, 0}, query_lists_kernel,
         dim3(heads * static_cast<unsigned>(grid.n_q_tiles)), dim3(kListThreads), 0, mask, params, sizes,
         to.begin, to.entry, to.dense);
  if (to.dense)
    launch(context, "attention_key_lists", {3 * bytes, 0}, key_lists_kernel,
           dim3(heads * static_cast<unsigned>(grid.n_kv_tiles)), dim3(kListThreads), 0, to.dense, sizes,
           to.begin, to.entry, to.rank);
}

}  // namespace flexchat::cuda
