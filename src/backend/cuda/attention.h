// The plan of an attention on the GPU: what kernels/attention_params.cuh asks for, kept on the device for as
// long as the batch lives. One kernel, `cuda_mma`, serves every case: forward and backward tiles with
// mma.sync (on Hopper wgmma at head dims 64 and 128, FFMA in f32), and a split-key pass for few queries a
// row.
//
// Lists of tiles depend on tile sizes, which depend on dtype and GPU (kernels/tiles.cuh); each is built at
// its first use, which must therefore not be inside a captured step: on the device (block_lists.cu) if the
// mask is made of linear comparisons (flex/linear_mask.h), otherwise on the host.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/aot_source.h"
#include "backend/cuda/jit.h"
#include "backend/cuda/kernels/attention_params.cuh"
#include "flex/emit.h"
#include "flex/linear_mask.h"

namespace flexchat::cuda {

class CudaBackend;

// Tiles to visit, on the device: AttentionBlocks. An undefined tensor: there is no mask.
struct DeviceBlocks {
  Tensor numbers;                // i32: begin, entry, rank
  int64_t entry = 0, rank = -1;  // where they begin; -1: none
  int64_t batch_rows = 1, head_rows = 1;
};

// The tiles of one attention; n_batch, n_head 1: the lists are the same for every batch row, or head.
struct TileGrid {
  int64_t n_batch, n_head, n_q_tiles, n_kv_tiles, block_q, block_kv;
  int64_t tiles() const { return n_batch * n_head * n_q_tiles * n_kv_tiles; }
};
// Where build_tile_lists writes: AttentionBlocks of query tiles, with n_kv_tiles places for each list; or
// with `dense`, scratch of (tiles) i32, those of key tiles, with n_q_tiles places each.
struct TileListBuffers {
  int *begin, *entry, *rank, *dense;
};
void build_tile_lists(Context& context, const flex::LinearMask& mask, const AttentionParams& params,
                      const TileGrid& grid, const TileListBuffers& to);

// The same made on the host: which tiles of keys each tile of queries visits, and the reverse.
struct TileLists {
  std::vector<int32_t> begin, entry, rank;
  int64_t batch_rows = 1, head_rows = 1;
};
// Full and partial blocks of each query tile as one list, in the form of AttentionBlocks.
TileLists query_tile_lists(const flex::BlockMask& mask);
// The same of each key tile, with the rank that a key tile has in the list of its query tile.
TileLists key_tile_lists(const flex::BlockMask& mask);

// What a mask and a score mod become, whatever the batch: kept for as long as the program runs.
struct PreparedMod {
  flex::EmittedMod emitted;
  std::optional<flex::LinearMask> mask;  // the whole mask, if it is linear
  mutable std::mutex mutex;              // of what follows
  // By entry, device, dtype, head dim, pages and dropout.
  using KernelKey = std::tuple<std::string, int, DType, int64_t, bool, bool>;
  mutable std::map<KernelKey, const JitKernel*> kernels;
};

class CudaAttentionPlan final : public AttentionPlan {
 public:
  // Errors: a head dim without kernel, more captured tensors than kernels take, as Bindings::at.
  CudaAttentionPlan(CudaBackend& backend, const AttentionShape& shape, const AttentionSpec& spec);

  std::string_view kernel() const override { return "cuda_mma"; }
  std::string_view reason() const override { return reason_; }

  // What all passes share: sizes, mask, captured tensors, dropout. `batch` etc. hold no tensors yet.
  AttentionParams params() const;
  const flex::EmittedMod& mod() const { return mod_->emitted; }
  const Tensor& capture(size_t i) const { return captures_[i]; }

  // Is this call one for the split-key pass?
  bool decodes() const;
  // The kernel `entry` of a pass, for keys in pages or contiguous ones. training: a backward will follow.
  const JitKernel& kernel(const Context& context, const char* pass, DType dtype, bool paged,
                          const char* entry, bool training = false) const;
  // Lists for tiles of these sizes, of queries or (transposed) of keys.
  AttentionBlocks blocks(int64_t block_q, int64_t block_kv, bool transposed) const;

 private:
  using BlocksKey = std::array<int64_t, 3>;  // block_q, block_kv, transposed
  DeviceBlocks lists_by_device(const TileGrid& grid, bool transposed) const;
  DeviceBlocks lists_by_host(const TileGrid& grid, bool transposed) const;

  CudaBackend& backend_;
  const PreparedMod* mod_;
  std::string reason_;
  Tensor q_lens_, kv_lens_, q_offsets_;  // i32 or undefined
  std::vector<Tensor> captures_;         // f32 or i32
  mutable std::mutex mutex_;             // of what follows
  mutable std::map<BlocksKey, DeviceBlocks> blocks_;
};

// What a pass moves and computes at least: `tensors` of the size of q and out, or k and v, and `products` of
// queries with keys. The built-in causal mask counts as half the square.
Work attention_work(const AttentionPlan& plan, DType dtype, double products, double tensors);

// out[i] = sums[2*i] * 2^-20 + sums[2*i + 1] * 2^-56: the fixed-point sums of attention_backward.cuh;
// NaN where one is beyond 2^60.
void convert_fixed_point(Context& context, const Tensor& sums, const Tensor& out);

// out (B, T, heads*D) = the rows that `table` (B, pages) sends keys to, for pools whose rows lie at addresses
// that kernels cannot copy from. Keys past kv_lens (or null: T) are left as they are.
void gather_pages(Context& context, const HeadsView& pool, const Tensor& table, int64_t page_size,
                  int64_t head_dim, const int* kv_lens, const Tensor& out);

}  // namespace flexchat::cuda
