// Lists of tiles that a mask visits (AttentionBlocks), built on the device: a thread classifies a tile of keys
// for its block's tile of queries (flex/flat_mask.h), and the block packs what is visited into a list.
//
// Work is one classification a tile, some 10 operations an instruction; captured tensors are read once for
// each tile that terms without them leave open. Writes 4 bytes a tile.
#include "backend/cuda/attention.h"
#include "backend/cuda/runtime.h"

namespace flexchat::cuda {
namespace {

constexpr int kListThreads = 256, kListWarps = kListThreads / 32;

struct ListSizes {
  int n_batch, n_head;  // 1: the same lists for every batch row, or head
  int n_q_tiles, n_kv_tiles, block_q, block_kv;
};

template <class T>
struct MinMax {
  T lo, hi;
  bool nan = false;
  __device__ void add(T x) {
    nan = nan || x != x;
    lo = min(lo, x);
    hi = max(hi, x);
  }
  __device__ flex::Interval interval() const {
    if (nan) return flex::bounds::unbounded(true);
    return {static_cast<double>(lo), static_cast<double>(hi)};
  }
};

// The range of elements first, first + step, ... up to last.
template <class T>
__device__ MinMax<T> scan(const T* data, long long stride, int first, int last, int step) {
  MinMax<T> range{__ldg(data + first * stride), __ldg(data + first * stride)};
  int i = first;
  if constexpr (sizeof(T) == 4) {
    if (step == 1 && stride == 1 && reinterpret_cast<uintptr_t>(data + first) % 16 == 0) {
#pragma unroll 4
      for (; i + 3 <= last; i += 4) {
        const int4 four = __ldg(reinterpret_cast<const int4*>(data + i));
        const int bits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          T x;
          memcpy(&x, &bits[k], 4);
          range.add(x);
        }
      }
    }
  }
#pragma unroll 4
  for (; i <= last; i += step) range.add(__ldg(data + i * stride));
  return range;
}

// The range of elements first..last, found by a warp together.
template <class T>
__device__ MinMax<T> scan_by_warp(const T* data, long long stride, int first, int last) {
  const int mine = min(first + static_cast<int>(threadIdx.x % 32), last);
  MinMax<T> range = scan(data, stride, mine, last, 32);
  for (int other = 16; other > 0; other /= 2) {
    range.lo = min(range.lo, __shfl_xor_sync(~0u, range.lo, other));
    range.hi = max(range.hi, __shfl_xor_sync(~0u, range.hi, other));
  }
  range.nan = __any_sync(~0u, range.nan);
  return range;
}

// The interval of an access over a box; `together`: every thread of the warp asks for the same.
__device__ flex::Interval access_range(const AttentionParams& p, const flex::FlatAccess& access,
                                       const flex::FlatRow& row, const flex::Box& box, bool together) {
  const AttentionCapture& capture = p.captures[access.capture];
  long long offset = 0, stride = 0;
  int first = 0, last = 0;
  for (int axis = 0; axis < access.n_axes; ++axis) {
    const flex::Var var = access.index[axis];
    if (var == flex::Var::b) offset += row.b * capture.stride[axis];
    if (var == flex::Var::h) offset += row.h * capture.stride[axis];
    if (var != flex::Var::q && var != flex::Var::kv) continue;
    stride = capture.stride[axis];
    first = static_cast<int>(var == flex::Var::q ? box.q_first : box.kv_first);
    last = static_cast<int>(var == flex::Var::q ? box.q_last : box.kv_last);
  }
  const auto range = [&](const auto* data) {
    return together ? scan_by_warp(data, stride, first, last).interval()
                    : scan(data, stride, first, last, 1).interval();
  };
  if (access.integers) return range(static_cast<const int*>(capture.data) + offset);
  return range(static_cast<const float*>(capture.data) + offset);
}

// Positions in order: how many threads before this one have `mine`, and how many have it in all. For the whole
// block, twice in a row only with a barrier between (there is one inside).
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
    query_lists_kernel(const __grid_constant__ flex::FlatMask mask, const __grid_constant__ AttentionParams p,
                       const __grid_constant__ ListSizes sizes, int* begin, int* entry, int* dense) {
  __shared__ int counts[kListWarps], first[2];
  __shared__ __align__(16) unsigned char outer_bytes[flex::max_flat_code * sizeof(flex::Bound)];
  auto* const outer = reinterpret_cast<flex::Bound*>(outer_bytes);  // Bound has initializers, shared memory none
  const int r = static_cast<int>(blockIdx.x), bh = r / sizes.n_q_tiles, i = r % sizes.n_q_tiles;
  const int b = bh / sizes.n_head;
  const int n_q = p.q_lens ? p.q_lens[b] : p.q_len, n_kv = p.kv_lens ? p.kv_lens[b] : p.kv_len;
  const int offset = p.q_offsets ? p.q_offsets[b] : 0;
  const flex::FlatRow row{b, bh % sizes.n_head, n_q, n_kv};
  flex::Box box{offset + i * sizes.block_q, offset + min(n_q, (i + 1) * sizes.block_q) - 1, 0, 0};
  const bool exists = i * sizes.block_q < n_q;
  if (exists && threadIdx.x < 32) {
    flex::Bound mine[flex::max_flat_code];
    flex::flat_begin(mask, row, box, mine, [&](const flex::FlatAccess& access) {
      return access_range(p, access, row, box, true);
    });
    for (int k = static_cast<int>(threadIdx.x); k < mask.n_code; k += 32)
      if (mask.code[k].scope <= flex::Scope::queries) outer[k] = mine[k];
  }
  __syncthreads();
  const int at = r * sizes.n_kv_tiles;
  int count = 0;
  for (int j0 = 0; j0 < sizes.n_kv_tiles; j0 += kListThreads) {
    const int j = j0 + static_cast<int>(threadIdx.x);
    flex::Truth truth = flex::Truth::never;
    if (exists && j < sizes.n_kv_tiles && j * sizes.block_kv < n_kv) {
      box.kv_first = j * sizes.block_kv;
      box.kv_last = min(n_kv, (j + 1) * sizes.block_kv) - 1;
      truth = flex::flat_truth(mask, row, box, outer, [&](const flex::FlatAccess& access) {
        return access_range(p, access, row, box, false);
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

void build_tile_lists(Context& context, const flex::FlatMask& mask, const AttentionParams& params,
                      const TileGrid& grid, const TileListBuffers& to) {
  const ListSizes sizes{static_cast<int>(grid.n_batch),    static_cast<int>(grid.n_head),
                        static_cast<int>(grid.n_q_tiles),  static_cast<int>(grid.n_kv_tiles),
                        static_cast<int>(grid.block_q),    static_cast<int>(grid.block_kv)};
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
