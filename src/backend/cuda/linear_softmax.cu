// Softmax in the registers of the product that makes its logits: x (N, C) times w (V, C) transposed, bf16.
//   logit = sum_c x[n][c] w[v][c]
//   r = 1 / (e^{2 logit / cap} + 1);  z = cap tanh(logit / cap) = cap (1 - 2 r);  dz/dlogit = 4 r (1 - r)
// and of that
//   sums      sum_v e^{z - cap}, a float for each row and each tile of 256 columns
//   unscaled  the same, and e^{z - cap} dz/dlogit in bf16
//   gradient  weight (e^{z - lse} - [v = target]) dz/dlogit in bf16
// 2 N C V FLOPs; x and w are read from L2 once a tile of 128 x 256, and 2 N V bytes written where there is a
// gradient. Logits are not: 16384 x 1280 x 65536 multiply in 3.5 ms on an H200, and to write and read 4 N V
// bytes takes 2 ms. What softmax does to a tile takes 2.5 us after 14 us of products: 2.25 special functions
// an element at 16 a clock and multiprocessor.
//
// Hopper only. Clusters of two blocks, each on a tile: 128 rows by 256 columns in two warpgroups of 64 rows,
// 128 sums a thread. A third warpgroup has the copy engine bring 64 columns of x and w at a time to four
// buffers of 48 KiB. The two tiles lie side by side, and what both need each block fetches half of, for both.
//
// The order of w's rows in shared memory is such that a thread gets eight neighbouring columns: column
// 32 g + 8 q + 2 j + e of a tile, q < 4, j < 4, e < 2, lies in row 64 j + 8 g + 2 q + e, so that lane q of
// four has it as sum 4 (8 j + g) + e of its row. Sums have a fixed order.
#include <algorithm>
#include <climits>
#include <cmath>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/hopper.cuh"
#include "backend/cuda/reduce.cuh"
#include "backend/cuda/tensor_map.h"

namespace flexchat::cuda {
namespace {

constexpr int kRows = 128, kColumns = 256, kDepth = 64;  // of a tile; of K in a buffer
constexpr int kStages = 4;
constexpr int kThreads = 3 * 128;
constexpr uint32_t kBytesA = kRows * kDepth * 2, kBytesB = kColumns * kDepth * 2;
// Of what a warp has ready to be copied out, twice: 16 rows of 64 columns.
constexpr int kOutRows = 16, kOutColumns = 64;
constexpr uint32_t kBytesOut = kOutRows * kOutColumns * 2;
constexpr uint32_t kSharedBytes =
    kStages * (kBytesA + kBytesB) + 8 * 2 * kBytesOut + 2 * kStages * 8 + 1024;  // 1024: alignment

enum class Mode { sums, unscaled, gradient };

struct LinearSoftmax {
  int64_t rows;
  int columns, depth;             // of w; of both
  int tiles_m, tiles_n, pairs;    // tiles of rows and columns; pairs of tiles
  bool pair_columns;              // the tiles of a pair share rows of x, else rows of w
  float cap, weight;              // weight: gradient only
  const int32_t* targets;         // (rows)
  int64_t first;                  // column of the vocabulary that w begins with
  const float* lse;               // (rows), gradient only
  float *partial, *target_logit;  // (tiles_n, rows) and (rows), not with gradient
};

#ifdef FLEXCHAT_SM90A

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kGroupRows = kRows / 2;  // of a warpgroup

using hopper::barrier_arrive;
using hopper::barrier_wait;

struct Tile {
  int m, n;
};
__device__ inline Tile tile_of(const LinearSoftmax& a, int pair, int rank) {
  if (a.pair_columns) return {pair % a.tiles_m, pair / a.tiles_m * 2 + rank};
  const int across = (a.tiles_m + 1) / 2;
  return {pair % across * 2 + rank, pair / across};
}

// Which buffer comes next, and in which of its two phases.
struct Stage {
  uint32_t index = 0, phase = 0;
  __device__ void next() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// Shared memory, by address.
struct Buffers {
  uint32_t base;
  __device__ uint32_t a(uint32_t stage) const { return base + stage * kBytesA; }
  __device__ uint32_t b(uint32_t stage) const { return base + kStages * kBytesA + stage * kBytesB; }
  __device__ uint32_t out(uint32_t warp) const {
    return base + kStages * (kBytesA + kBytesB) + warp * 2 * kBytesOut;
  }
  __device__ uint32_t full(uint32_t stage) const { return out(8) + stage * 8; }
  __device__ uint32_t empty(uint32_t stage) const { return full(kStages + stage); }
};

__device__ void produce(const LinearSoftmax& a, const CUtensorMap& x, const CUtensorMap& w,
                        const Buffers& shared, int rank) {
  constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * kDepth * 2;  // of either map
  constexpr uint16_t kBoth = 3;
  Stage stage;
  for (int pair = static_cast<int>(blockIdx.x) / 2; pair < a.pairs; pair += static_cast<int>(gridDim.x) / 2) {
    const Tile tile = tile_of(a, pair, rank);
    const int row = tile.m * kRows, eighth = tile.n * (kColumns / 8);
    for (int k = 0; k < a.depth; k += kDepth, stage.next()) {
      const uint32_t full = shared.full(stage.index), to_a = shared.a(stage.index),
                     to_b = shared.b(stage.index);
      barrier_wait(shared.empty(stage.index), stage.phase ^ 1);
      hopper::barrier_expect(full, kBytesA + kBytesB);
      if (a.pair_columns) {
        hopper::copy_box(x, to_a + rank * kBoxBytes, full, k, row + rank * kBoxRows, kBoth);
#pragma unroll
        for (int j = 0; j < 4; ++j) hopper::copy_box(w, to_b + j * kBoxBytes, full, k, 2 * j, eighth);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) hopper::copy_box(x, to_a + i * kBoxBytes, full, k, row + i * kBoxRows);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int j = 2 * rank + i;
          hopper::copy_box(w, to_b + j * kBoxBytes, full, k, 2 * j, eighth, kBoth);
        }
      }
    }
  }
}

__device__ inline float fast_exp2(float x) {  // to 2 ulp; NaN stays NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_reciprocal(float x) {  // to 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// e^{2 x / cap} + 1 with k = 2 log2(e) / cap. Bounded so that the product of four is a number: r is then 1e-9
// where it should be less, too little to change z.
__device__ inline float inverse_r(float x, float k) {
  float exponent;
  asm("min.NaN.f32 %0, %1, 0f41F00000;" : "=f"(exponent) : "f"(x * k));  // 30
  return fast_exp2(exponent) + 1.0f;
}
// One reciprocal for four: special functions are what bounds the work on a tile.
__device__ inline void reciprocals(const float (&x)[4], float* r) {
  const float a = x[0] * x[1], b = x[2] * x[3], all = fast_reciprocal(a * b), c = all * b, d = all * a;
  r[0] = c * x[1];
  r[1] = c * x[0];
  r[2] = d * x[3];
  r[3] = d * x[2];
}

// A row as its four threads have it: thread q has columns 32 g + 8 q + 0..7 of the tile for g < 8.
struct Row {
  int64_t row;
  int32_t target;  // in the vocabulary; below 0: ignored, or no row
  float bias;      // e^{z - cap} = 2^(bias + factor * r), times 4; e^{z - lse}, gradient
  float lse;       // gradient
  int at;  // the target's place among this thread's columns, counted from its first; below 0: not there
  float at_target, sum;
};

template <Mode kMode>
__device__ Row make_row(const LinearSoftmax& a, int64_t row) {
  Row s = {row, -1, 2.0f, 0.0f, -1, 0.0f, 0.0f};
  if (row >= a.rows) return s;
  s.target = a.targets[row];
  if constexpr (kMode == Mode::gradient) {
    s.lse = a.lse[row];
    s.bias = (a.cap - s.lse) * kLog2E;
  }
  return s;
}

// Looks for the target among the sums of half h of a thread, first thing. Few warps have one.
template <Mode kMode, int h>
__device__ void take_target(const LinearSoftmax& a, const float (&d)[128], Row& s, int first) {
  const int64_t at = s.target - a.first - first;
  if (s.target >= 0 && at >= 0 && at < kColumns && at % 32 < 8) s.at = static_cast<int>(at);
  if (!__any_sync(0xFFFFFFFFu, s.at >= 0)) return;
  float x = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int g = i / 8, j = i % 8 / 2, e = i % 2;
    if (s.at == 32 * g + 2 * j + e) x = d[4 * (8 * j + g) + 2 * h + e];
  }
  const float r = fast_reciprocal(inverse_r(x, 2.0f * kLog2E / a.cap)), z = fmaf(-2.0f * a.cap, r, a.cap);
  if constexpr (kMode == Mode::gradient) {
    s.at_target = 4.0f * a.weight * expm1f(z - s.lse) * fmaf(-r, r, r);
  } else if (s.at >= 0) {
    a.target_logit[s.row] = z;
  }
}

// Columns 32 g + 8 q + 0..7 of half h. `to`: where their 16 bytes go in shared memory.
template <Mode kMode, int h, int g>
__device__ void finish_columns(const LinearSoftmax& a, const float (&d)[128], Row& s, bool there,
                               uint32_t to) {
  const float k = 2.0f * kLog2E / a.cap, factor = -2.0f * a.cap * kLog2E, scale = 4.0f * a.weight;
  float r[8], p[8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = inverse_r(d[4 * (8 * (2 * i + j / 2) + g) + 2 * h + j % 2], k);
    reciprocals(x, r + 4 * i);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = fast_exp2(fmaf(r[i], factor, s.bias));
  if constexpr (kMode != Mode::gradient) {
    const float part = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
    s.sum += there ? part : 0.0f;
  }
  if constexpr (kMode != Mode::sums) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      p[i] *= fmaf(-r[i], r[i], r[i]);
      if constexpr (kMode == Mode::gradient) p[i] *= scale;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Vec<bf16, 2> two = {from_float<bf16>(p[2 * j]), from_float<bf16>(p[2 * j + 1])};
      packed[j] = s.target < 0 ? 0 : reinterpret_cast<const uint32_t&>(two);
    }
    hopper::store_shared(to, packed[0], packed[1], packed[2], packed[3]);
    if constexpr (kMode == Mode::gradient) {
      if (s.at >> 5 == g) {
        hopper::store_shared(to + s.at % 8 * 2, __bfloat16_as_ushort(from_float<bf16>(s.at_target)));
      }
    }
  }
}

template <Mode kMode, int c>
__device__ void finish_quarter(const LinearSoftmax& a, const CUtensorMap& out, const float (&d)[128],
                               Row& upper, Row& lower, int first, int lane, uint32_t shared) {
  const int q = lane % 4, row = lane / 4;
  const uint32_t buffer = shared + c % 2 * kBytesOut;
  if constexpr (kMode != Mode::sums) {
    if (lane == 0) hopper::store_wait<1>();
    __syncwarp();
  }
  const int left = a.columns - first;  // from this thread's first column
  const uint32_t even = buffer + row * 128 + (q ^ row) * 16, odd = buffer + row * 128 + ((q + 4) ^ row) * 16;
  finish_columns<kMode, 0, 2 * c>(a, d, upper, 64 * c < left, even);
  finish_columns<kMode, 0, 2 * c + 1>(a, d, upper, 64 * c + 32 < left, odd);
  finish_columns<kMode, 1, 2 * c>(a, d, lower, 64 * c < left, even + 1024);
  finish_columns<kMode, 1, 2 * c + 1>(a, d, lower, 64 * c + 32 < left, odd + 1024);
  if constexpr (kMode != Mode::sums) {
    hopper::store_fence();
    __syncwarp();
    if (lane == 0) {
      hopper::store_box(out, buffer, first + 64 * c, static_cast<int>(upper.row));
      hopper::store_commit();
    }
  }
}

template <Mode kMode>
__device__ void finish_tile(const LinearSoftmax& a, const CUtensorMap& out, const float (&d)[128], Row& upper,
                            Row& lower, int tile_n, int lane, uint32_t shared) {
  const int first = tile_n * kColumns + lane % 4 * 8;
  take_target<kMode, 0>(a, d, upper, first);
  take_target<kMode, 1>(a, d, lower, first);
  finish_quarter<kMode, 0>(a, out, d, upper, lower, first, lane, shared);
  finish_quarter<kMode, 1>(a, out, d, upper, lower, first, lane, shared);
  finish_quarter<kMode, 2>(a, out, d, upper, lower, first, lane, shared);
  finish_quarter<kMode, 3>(a, out, d, upper, lower, first, lane, shared);
  if constexpr (kMode != Mode::gradient) {
    const float sums[2] = {warp_sum<4>(upper.sum), warp_sum<4>(lower.sum)};
    if (lane % 4 != 0) return;
    if (upper.row < a.rows) a.partial[tile_n * a.rows + upper.row] = 0.25f * sums[0];
    if (lower.row < a.rows) a.partial[tile_n * a.rows + lower.row] = 0.25f * sums[1];
  }
}

template <Mode kMode>
__device__ void consume(const LinearSoftmax& a, const CUtensorMap& out, const Buffers& shared, int rank,
                        int group) {
  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32;
  float d[128];
  Stage stage;
  for (int pair = static_cast<int>(blockIdx.x) / 2; pair < a.pairs; pair += static_cast<int>(gridDim.x) / 2) {
    const Tile tile = tile_of(a, pair, rank);
    const int64_t row = int64_t{1} * tile.m * kRows + group * kGroupRows + 16 * warp + lane / 4;
    Row upper = make_row<kMode>(a, row), lower = make_row<kMode>(a, row + 8);
    uint32_t before = 0;
    for (int k = 0; k < a.depth; k += kDepth, stage.next()) {
      barrier_wait(shared.full(stage.index), stage.phase);
      const uint64_t x = hopper::matrix_descriptor(shared.a(stage.index) + group * (kBytesA / 2)),
                     w = hopper::matrix_descriptor(shared.b(stage.index));
      hopper::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) {
        hopper::wgmma_64x256x16(d, x + 2 * i, w + 2 * i, k > 0 || i > 0);
      }
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();  // the products before: their buffer is free
      if (k > 0 && warp < 2 && lane == 0) barrier_arrive(shared.empty(before), warp);
      before = stage.index;
    }
    hopper::wgmma_wait<0>();
    if (warp < 2 && lane == 0) barrier_arrive(shared.empty(before), warp);
    if (tile.n >= a.tiles_n) continue;  // the second of a pair of columns when their number is odd
    finish_tile<kMode>(a, out, d, upper, lower, tile.n, lane, shared.out(4 * group + warp));
  }
  if (lane == 0) hopper::store_wait<0>();
}

#endif  // FLEXCHAT_SM90A

template <Mode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    linear_softmax_kernel(const LinearSoftmax a, const __grid_constant__ CUtensorMap x,
                          const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap out) {
#ifdef FLEXCHAT_SM90A
  extern __shared__ uint8_t memory[];
  const Buffers shared = {(hopper::shared_address(memory) + 1023) / 1024 * 1024};
  const int rank = static_cast<int>(hopper::cluster_rank()), group = static_cast<int>(threadIdx.x) / 128;
  if (threadIdx.x == 0) {
    hopper::prefetch_map(x);
    hopper::prefetch_map(w);
    for (uint32_t i = 0; i < kStages; ++i) {
      hopper::barrier_init(shared.full(i), 1);
      hopper::barrier_init(shared.empty(i), 4);  // two warpgroups of two blocks
    }
    hopper::barrier_init_fence();
  }
  hopper::cluster_sync();
  if (group == 2) {
    hopper::give_registers<40>();
    if (threadIdx.x == 256) produce(a, x, w, shared, rank);
  } else {
    hopper::take_registers<232>();
    consume<kMode>(a, out, shared, rank, group);
  }
  hopper::cluster_sync();  // shared memory stays until the other block is done with it
#endif
}

// ---- sums of a row's tiles --------------------------------------------------------------------------------
constexpr int kSumThreads = 256, kSumRows = 32, kSumParts = kSumThreads / kSumRows;

__global__ void __launch_bounds__(kSumThreads)
    row_sums_kernel(const float* partial, int64_t tiles, int64_t rows, const int32_t* targets, int64_t vocab,
                    float cap, float* shift, float* sum, float* target_logit) {
  __shared__ float parts[kSumParts][kSumRows];
  const int64_t row = int64_t{kSumRows} * blockIdx.x + threadIdx.x % kSumRows;
  const int part = static_cast<int>(threadIdx.x) / kSumRows;
  float s = 0;
  if (row < rows) {
#pragma unroll 8
    for (int64_t i = part; i < tiles; i += kSumParts) s += partial[i * rows + row];
  }
  parts[part][threadIdx.x % kSumRows] = s;
  __syncthreads();
  if (part > 0 || row >= rows) return;
  for (int i = 1; i < kSumParts; ++i) s += parts[i][threadIdx.x];
  shift[row] = cap;
  sum[row] = s;
  if (targets[row] < 0 || targets[row] >= vocab) target_logit[row] = 0;
}

// ---- launches ---------------------------------------------------------------------------------------------
template <Mode kMode>
void launch_linear_softmax(Context& context, const char* name, LinearSoftmax a, const Tensor& x,
                           const Tensor& w, const Tensor* out) {
  if (a.rows == 0) return;
  a.depth = static_cast<int>(x.dim(1));
  a.columns = static_cast<int>(w.dim(0));
  a.tiles_m = static_cast<int>(block_count(a.rows, kRows));
  a.tiles_n = static_cast<int>(block_count(a.columns, kColumns));
  a.pair_columns = a.tiles_m % 2 == 1;
  a.pairs = a.pair_columns ? a.tiles_m * ((a.tiles_n + 1) / 2) : a.tiles_m / 2 * a.tiles_n;
  const CUtensorMap map_x = make_tensor_map(DType::bf16, x.data(), {x.dim(1), a.rows}, {kDepth, 64});
  const CUtensorMap map_w =
      make_tensor_map(DType::bf16, w.data(), {w.dim(1), 8, w.dim(0) / 8}, {kDepth, 2, kColumns / 8});
  const CUtensorMap map_out =
      out ? make_tensor_map(DType::bf16, out->data(), {a.columns, a.rows}, {kOutColumns, kOutRows})
          : CUtensorMap();

  const auto kernel = linear_softmax_kernel<kMode>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(2 * std::min(a.pairs, context.device().sm_count / 2)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = context.stream();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const double logits = static_cast<double>(a.rows) * a.columns;
  const Work work = {static_cast<double>(x.bytes() + w.bytes()) + (kMode == Mode::sums ? 0 : 2 * logits),
                     2 * logits * a.depth};
  context.begin_launch(name, work, {config.gridDim.x, 1, 1, kThreads});
  check_cuda(cudaLaunchKernelEx(&config, kernel, a, map_x, map_w, map_out), name);
  context.end_launch(name);
}

// Was the kernel compiled for this very architecture? Otherwise its body is empty, and needs few registers.
bool compiled() {
  static const bool yes = [] {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, linear_softmax_kernel<Mode::unscaled>) == cudaSuccess &&
           attributes.numRegs >= 128;
  }();
  return yes;
}

}  // namespace

int64_t CudaBackend::linear_softmax_bytes(DType act, int64_t c, int64_t vocab, double cap) const {
  const DeviceInfo& device = context_.device();
  const bool can = device.major == 9 && device.shared_per_block >= kSharedBytes && compiled();
  const bool fits = act == DType::bf16 && c % 8 == 0 && vocab % 8 == 0 && vocab <= INT_MAX / 2 && cap > 0 &&
                    cap <= kShiftCap;
  return can && fits ? static_cast<int64_t>(sizeof(float)) * block_count(vocab, kColumns) : -1;
}

void CudaBackend::linear_softmax(const Tensor& x, const Tensor& w, const Tensor& targets, double cap,
                                 const SoftmaxRows& rows, const Tensor* unscaled) {
  const int64_t n = x.dim(0), vocab = w.dim(0), tiles = block_count(vocab, kColumns);
  check(linear_softmax_bytes(x.dtype(), x.dim(1), vocab, cap) >= 0 && !rows.argmax.defined() &&
            aligned16({x.data(), w.data(), unscaled ? unscaled->data() : nullptr}),
        "linear_softmax: not for {} x {} x {}, cap {}", n, x.dim(1), vocab, cap);
  const Tensor partial = empty({tiles, n}, DType::f32);
  LinearSoftmax a = {};
  a.rows = n;
  a.cap = static_cast<float>(cap);
  a.targets = targets.as<int32_t>();
  a.partial = partial.as<float>();
  a.target_logit = rows.target.as<float>();
  if (unscaled) {
    launch_linear_softmax<Mode::unscaled>(context_, "linear_softmax", a, x, w, unscaled);
  } else {
    launch_linear_softmax<Mode::sums>(context_, "linear_softmax_sums", a, x, w, nullptr);
  }
  const auto elements = static_cast<double>(partial.numel());
  launch(context_, "linear_softmax_rows", {4 * elements, elements}, row_sums_kernel,
         dim3(block_count(n, kSumRows)), dim3(kSumThreads), 0, partial.as<float>(), tiles, n, a.targets,
         vocab, a.cap, rows.shift.as<float>(), rows.sum.as<float>(), a.target_logit);
}

void CudaBackend::linear_softmax_gradient(const Tensor& x, const Tensor& w, const Tensor& targets,
                                          int64_t first, double cap, double weight, const Tensor& lse,
                                          const Tensor& grad) {
  check(linear_softmax_bytes(x.dtype(), x.dim(1), w.dim(0), cap) >= 0 &&
            aligned16({x.data(), w.data(), grad.data()}),
        "linear_softmax_gradient: not for {} x {} x {}, cap {}", x.dim(0), x.dim(1), w.dim(0), cap);
  LinearSoftmax a = {};
  a.rows = x.dim(0);
  a.cap = static_cast<float>(cap);
  a.weight = static_cast<float>(weight);
  a.targets = targets.as<int32_t>();
  a.first = first;
  a.lse = lse.as<float>();
  launch_linear_softmax<Mode::gradient>(context_, "linear_softmax_gradient", a, x, w, &grad);
}

}  // namespace flexchat::cuda
