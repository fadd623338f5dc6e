// Plans: which tiles the mask visits, lengths and captured tensors on the device, kernels by name.
#include <algorithm>

#include "backend/attention_support.h"
#include "backend/cuda/attention.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cudnn_attention.h"
#include "backend/cuda/kernels/tiles.cuh"
#include "base/error.h"
#include "base/strings.h"
#include "flex/mods.h"

namespace flexchat::cuda {
namespace {

constexpr int64_t kDecodeQueries = 16;  // the split-key pass reads the keys once for every 16 rows of a group

Tensor upload_i32(Backend& backend, const std::vector<int64_t>& values) {
  if (values.empty()) return {};
  const Shape shape = {static_cast<int64_t>(values.size())};
  return backend.to_device(Tensor::from<int64_t>(values, shape, DType::i32));
}

// A captured tensor as kernels read it. One that lies there already is used as it is, so that its values may
// change between the plan and the launch.
Tensor upload_capture(Backend& backend, const flex::Capture& capture, const Tensor& values) {
  const DType dtype = capture.type() == flex::Type::integer ? DType::i32 : DType::f32;
  if (&values.arena() == &backend.arena() && values.dtype() == dtype) return values;
  Tensor copy = backend.empty(values.shape(), dtype);
  backend.copy(values, copy);
  return copy;
}

// The built-in mask and the expression as one.
flex::Expr whole_mask(const AttentionSpec& spec) {
  flex::Expr mask = *spec.mask;
  if (spec.causal) mask = flex::causal() && mask;
  if (spec.causal && spec.window >= 0) mask = flex::window(spec.window + 1) && mask;
  return mask;
}

// Expressions are the same exactly when their nodes are, and nodes live as long as the program.
const PreparedMod* prepare(const AttentionSpec& spec) {
  using Key = std::array<const flex::Node*, 3>;
  static std::mutex mutex;
  static auto* const prepared = new std::map<Key, std::unique_ptr<const PreparedMod>>;
  const auto node = [](const std::optional<flex::Expr>& e) { return e ? &e->node() : nullptr; };
  std::optional<flex::Expr> whole;
  if (spec.mask) whole = whole_mask(spec);
  const std::lock_guard lock(mutex);
  auto& place = (*prepared)[{node(whole), node(spec.mask), node(spec.score_mod)}];
  if (place == nullptr) {
    auto made = std::make_unique<PreparedMod>();
    made->emitted = flex::emit_mod(spec.mask, spec.score_mod);
    if (whole) made->mask = flex::linear_mask(*whole, made->emitted.captures);
    place = std::move(made);
  }
  return place.get();
}

constexpr int64_t kMostDeviceTiles = int64_t{1} << 25;  // lists on the device have a place for every tile

// Calls visit(block, partial) for the blocks of one list, ascending.
template <class Visit>
void for_each_block(const flex::BlockMask& mask, int64_t row, const Visit& visit) {
  const auto full = mask.full.row(row), partial = mask.partial.row(row);
  size_t f = 0, p = 0;
  while (f < full.size() || p < partial.size()) {
    const bool take_full = p == partial.size() || (f < full.size() && full[f] < partial[p]);
    visit(take_full ? full[f++] : partial[p++], !take_full);
  }
}

// Entries begin.. end - 1 are a list.
void append_row(TileLists& lists, size_t begin, size_t end) {
  const auto entry = [&](size_t i) { return begin + i < end ? lists.entry[begin + i] : 0; };
  lists.begin.insert(lists.begin.end(),
                     {static_cast<int32_t>(begin), static_cast<int32_t>(end - begin), entry(0), entry(1)});
}

}  // namespace

TileLists query_tile_lists(const flex::BlockMask& mask) {
  const int64_t rows = mask.n_batch * mask.n_head * mask.n_q_blocks;
  TileLists lists;
  lists.batch_rows = mask.n_batch;
  lists.head_rows = mask.n_head;
  lists.begin.reserve(static_cast<size_t>(4 * rows));
  lists.entry.reserve(static_cast<size_t>(mask.full.count() + mask.partial.count()));
  for (int64_t row = 0; row < rows; ++row) {
    const size_t begin = lists.entry.size();
    for_each_block(mask, row,
                   [&](int32_t block, bool partial) { lists.entry.push_back(2 * block + partial); });
    append_row(lists, begin, lists.entry.size());
  }
  return lists;
}

TileLists key_tile_lists(const flex::BlockMask& mask) {
  TileLists lists;
  lists.batch_rows = mask.n_batch;
  lists.head_rows = mask.n_head;
  const auto n_kv = static_cast<size_t>(mask.n_kv_blocks);
  lists.begin.reserve(4 * static_cast<size_t>(mask.n_batch * mask.n_head) * n_kv);
  lists.entry.resize(static_cast<size_t>(mask.full.count() + mask.partial.count()));
  lists.rank.resize(lists.entry.size());
  // Counted first, so that every list has its place; query tiles then come in ascending order.
  std::vector<size_t> place(n_kv + 1);
  size_t end = 0;
  for (int64_t bh = 0; bh < mask.n_batch * mask.n_head; ++bh) {
    const auto for_each_row = [&](const auto& visit) {
      for (int64_t i = 0; i < mask.n_q_blocks; ++i) visit(i, bh * mask.n_q_blocks + i);
    };
    std::fill(place.begin(), place.end(), 0);
    for_each_row([&](int64_t, int64_t row) {
      for (const int32_t block : mask.full.row(row)) ++place[static_cast<size_t>(block) + 1];
      for (const int32_t block : mask.partial.row(row)) ++place[static_cast<size_t>(block) + 1];
    });
    place[0] = end;
    for (size_t j = 0; j < n_kv; ++j) place[j + 1] += place[j];
    const std::vector<size_t> begin = place;
    end = place[n_kv];
    for_each_row([&](int64_t i, int64_t row) {
      int32_t rank = 0;
      for_each_block(mask, row, [&](int32_t block, bool partial) {
        const size_t at = place[static_cast<size_t>(block)]++;
        lists.entry[at] = static_cast<int32_t>(2 * i + partial);
        lists.rank[at] = rank++;
      });
    });
    for (size_t j = 0; j < n_kv; ++j) append_row(lists, begin[j], begin[j + 1]);
  }
  return lists;
}

CudaAttentionPlan::CudaAttentionPlan(CudaBackend& backend, const AttentionShape& shape,
                                     const AttentionSpec& spec)
    : AttentionPlan(shape, spec), backend_(backend) {
  check_attention_support("cuda_mma", shape, spec);
  mod_ = prepare(spec);
  static_assert(kMaxCaptures == flex::max_emitted_captures && kMaxConstants == flex::max_emitted_constants);
  for (const flex::Capture& capture : mod().captures)
    captures_.push_back(upload_capture(backend, capture, spec.bindings.at(capture)));
  q_lens_ = upload_i32(backend, shape.q_lens);
  kv_lens_ = upload_i32(backend, shape.kv_lens);
  q_offsets_ = upload_i32(backend, shape.q_offsets);
  const bool hopper =
      backend.context().device().major == 9 && wgmma_tiles(kAttentionBf16, static_cast<int>(shape.head_dim));
  reason_ = decodes() ? "few queries a row: keys split over blocks"
            : hopper  ? "tiles of wgmma, FFMA in f32"
                      : "tiles of mma.sync, FFMA in f32";
}

bool CudaAttentionPlan::decodes() const { return shape().q_len <= kDecodeQueries; }

AttentionParams CudaAttentionPlan::params() const {
  const AttentionShape& s = shape();
  AttentionParams p{};
  p.batch = static_cast<int>(s.batch);
  p.n_head = static_cast<int>(s.n_head);
  p.n_kv_head = static_cast<int>(s.n_kv_head);
  p.q_len = static_cast<int>(s.q_len);
  p.kv_len = static_cast<int>(s.kv_len);
  if (q_lens_.defined()) p.q_lens = q_lens_.as<int>();
  if (kv_lens_.defined()) p.kv_lens = kv_lens_.as<int>();
  if (q_offsets_.defined()) p.q_offsets = q_offsets_.as<int>();
  p.scale = static_cast<float>(spec().scale);
  p.causal = spec().causal;
  p.window = static_cast<int>(std::min<int64_t>(spec().window, 1 << 30));
  for (size_t i = 0; i < captures_.size(); ++i) {
    const Tensor& x = captures_[i];
    p.captures[i].data = x.data();
    int64_t stride = 1;
    for (int axis = x.rank() - 1; axis >= 0; --axis) {
      p.captures[i].stride[axis] = stride;
      stride *= x.dim(axis);
    }
  }
  std::copy(mod().numbers.begin(), mod().numbers.end(), p.numbers);
  std::copy(mod().integers.begin(), mod().integers.end(), p.integers);
  if (spec().dropout > 0) {
    p.dropout_threshold = static_cast<unsigned>(spec().dropout * 0x1p32);
    // As the definition has it: dropped iff bits < dropout * 2^32, a number that need not be whole.
    if (static_cast<double>(p.dropout_threshold) < spec().dropout * 0x1p32) ++p.dropout_threshold;
    p.dropout_scale = static_cast<float>(1 / (1 - spec().dropout));
    p.dropout_seed = spec().dropout_seed;
  }
  p.page_size = static_cast<int>(spec().page_size);
  return p;
}

const JitKernel& CudaAttentionPlan::kernel(const Context& context, const char* pass, DType dtype, bool paged,
                                           const char* entry, bool training) const {
  const bool dropout = spec().dropout > 0;
  const std::lock_guard lock(mod_->mutex);
  const JitKernel*& kernel =
      mod_->kernels[{entry, context.device().ordinal, dtype, shape().head_dim, paged, dropout}];
  if (kernel == nullptr) {
    const auto source = [&](const char* of_pass) {
      AttentionKernel wanted;
      wanted.pass = of_pass;
      wanted.dtype = dtype;
      wanted.head_dim = shape().head_dim;
      wanted.paged = paged;
      wanted.dropout = dropout;
      return attention_source(wanted, mod());
    };
    std::vector<JitEntry> others;
    if (training) others.push_back({source("backward"), "attention_backward", true});
    // Which of the two forward kernels runs is a matter of lengths, which change from call to call.
    if (std::string_view(pass) != "backward") {
      others.push_back({source("forward"), "attention_forward"});
      others.push_back({source("decode"), "attention_decode"});
      others.push_back({source("decode"), "attention_decode_combine"});
    }
    kernel = &Jit::of(context).get(context, source(pass), entry, others);
  }
  return *kernel;
}

DeviceBlocks CudaAttentionPlan::lists_by_device(const TileGrid& grid, bool transposed) const {
  const int64_t heads = grid.n_batch * grid.n_head;
  DeviceBlocks made;
  made.entry = 4 * heads * (transposed ? grid.n_kv_tiles : grid.n_q_tiles);
  if (transposed) made.rank = made.entry + grid.tiles();
  made.batch_rows = grid.n_batch;
  made.head_rows = grid.n_head;
  made.numbers = backend_.empty({made.entry + (transposed ? 2 : 1) * grid.tiles() + 1}, DType::i32);
  Tensor dense;
  if (transposed) dense = backend_.empty({grid.tiles()}, DType::i32);
  int* const numbers = made.numbers.as<int>();
  build_tile_lists(backend_.context(), *mod_->mask, params(), grid,
                   {numbers, numbers + made.entry, transposed ? numbers + made.rank : nullptr,
                    transposed ? dense.as<int>() : nullptr});
  return made;
}

DeviceBlocks CudaAttentionPlan::lists_by_host(const TileGrid& grid, bool transposed) const {
  const flex::BlockMask mask = flex::build_block_mask(whole_mask(spec()), spec().bindings, shape().extent(),
                                                      grid.block_q, grid.block_kv);
  check(mask.full.count() + mask.partial.count() < (int64_t{1} << 30),
        "attention: the mask visits {} tiles; at most 2^30 are allowed",
        mask.full.count() + mask.partial.count());
  const TileLists lists = transposed ? key_tile_lists(mask) : query_tile_lists(mask);
  const auto size = [](const std::vector<int32_t>& list) { return static_cast<int64_t>(list.size()); };
  DeviceBlocks made;
  made.entry = size(lists.begin);
  if (transposed) made.rank = made.entry + size(lists.entry);
  made.batch_rows = lists.batch_rows;
  made.head_rows = lists.head_rows;
  const Tensor host(host_arena(), {made.entry + size(lists.entry) + size(lists.rank) + 1}, DType::i32);
  int32_t* to = host.as<int32_t>();
  for (const std::vector<int32_t>* list : {&lists.begin, &lists.entry, &lists.rank})
    to = std::copy(list->begin(), list->end(), to);
  made.numbers = backend_.to_device(host);
  return made;
}

AttentionBlocks CudaAttentionPlan::blocks(int64_t block_q, int64_t block_kv, bool transposed) const {
  if (!spec().mask) return {};
  const std::lock_guard lock(mutex_);
  DeviceBlocks& device = blocks_[{block_q, block_kv, transposed ? 1 : 0}];
  if (!device.numbers.defined()) {
    backend_.context().forbid_in_capture("building the lists of blocks of a mask");
    const AttentionShape& s = shape();
    const bool uniform = s.extent().uniform();
    const TileGrid grid = {spec().mask->uses(flex::Var::b) || !uniform ? s.batch : 1,
                           spec().mask->uses(flex::Var::h) ? s.n_head : 1,
                           (s.q_len + block_q - 1) / block_q,
                           (s.kv_len + block_kv - 1) / block_kv,
                           block_q,
                           block_kv};
    device = mod_->mask && grid.tiles() <= kMostDeviceTiles ? lists_by_device(grid, transposed)
                                                            : lists_by_host(grid, transposed);
  }
  const int* numbers = device.numbers.as<int>();
  return {numbers, numbers + device.entry, device.rank < 0 ? nullptr : numbers + device.rank,
          static_cast<int>(device.batch_rows), static_cast<int>(device.head_rows)};
}

std::vector<std::string> CudaBackend::attention_kernels() const { return {"cuda_mma", "cudnn"}; }

std::shared_ptr<const AttentionPlan> CudaBackend::plan_attention(const AttentionShape& shape,
                                                                 const AttentionSpec& spec,
                                                                 std::string_view kernel) {
  if (kernel != "auto" && kernel != "cuda_mma" && kernel != "cudnn") {
    fail("the cuda backend has no attention kernel '{}'{}; allowed: auto, {}", kernel,
         did_you_mean(kernel, attention_kernels()), join(attention_kernels()));
  }
  spec.check(shape);
  if (kernel == "cudnn") return plan_cudnn_attention(*this, shape, spec);
  return std::make_shared<CudaAttentionPlan>(*this, shape, spec);
}

}  // namespace flexchat::cuda
