#include "backend/attention_support.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

// Head dims that tiles of the GPU kernels are laid out for (backend/cuda/kernels/tiles.cuh).
constexpr std::array<int64_t, 8> kMmaHeadDims = {16, 32, 64, 80, 96, 128, 192, 256};

AttentionSupport everything(std::string_view device, std::string_view kernel, std::string_view dtypes) {
  AttentionSupport s{.device = device, .kernel = kernel, .dtypes = dtypes};
  s.grouped_heads = s.mask = s.score_mod = s.ragged = s.dropout = s.pages = true;
  s.backward = s.capture_gradients = s.lse_gradient = s.deterministic = true;
  return s;
}

std::array<AttentionSupport, 4> make_table() {
  AttentionSupport mma = everything("cuda", "cuda_mma", "f32, bf16, f16");
  mma.head_dims = kMmaHeadDims;
  mma.splits_keys = true;
  AttentionSupport cudnn{.device = "cuda", .kernel = "cudnn", .dtypes = "bf16, f16"};
  cudnn.head_dims = kMmaHeadDims;
  cudnn.grouped_heads = cudnn.backward = cudnn.deterministic = true;
  return {everything("reference", "reference", "f64"), everything("cpu", "cpu", "f32, bf16, f16"), mma,
          cudnn};
}

bool all_offsets_are(const AttentionShape& shape, int64_t position) {
  return std::all_of(shape.q_offsets.begin(), shape.q_offsets.end(),
                     [&](int64_t offset) { return offset == position; });
}

}  // namespace

std::string AttentionSupport::head_dims_text() const {
  std::vector<std::string> words;
  for (const int64_t d : head_dims) words.push_back(std::to_string(d));
  return words.empty() ? "any" : join(words);
}

bool AttentionSupport::takes(DType dtype) const {
  return fmt::format(", {},", dtypes).find(fmt::format(", {},", dtype_name(dtype))) != std::string::npos;
}

std::span<const AttentionSupport> attention_support() {
  static const std::array<AttentionSupport, 4> table = make_table();
  return table;
}

const AttentionSupport& attention_support(std::string_view kernel) {
  const auto table = attention_support();
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const AttentionSupport& s) { return s.kernel == kernel; });
  check(found != table.end(), "attention kernel {} is in no table", kernel);
  return *found;
}

bool rows_begin_at_zero(const AttentionShape& shape) { return all_offsets_are(shape, 0); }

bool rows_end_together(const AttentionShape& shape) {
  return !shape.q_offsets.empty() && all_offsets_are(shape, shape.kv_len - shape.q_len);
}

std::string attention_refusal(std::string_view kernel, const AttentionShape& shape,
                              const AttentionSpec& spec) {
  const AttentionSupport& can = attention_support(kernel);
  if (!can.head_dims.empty() &&
      std::find(can.head_dims.begin(), can.head_dims.end(), shape.head_dim) == can.head_dims.end()) {
    return fmt::format("attention kernel {}: head dim {}; allowed are {}", kernel, shape.head_dim,
                       can.head_dims_text());
  }
  struct Need {
    bool needed, has;
    const char* what;
  };
  const bool ragged = !shape.q_lens.empty() || !shape.kv_lens.empty() ||
                      !(rows_begin_at_zero(shape) || rows_end_together(shape));
  for (const Need& need :
       {Need{shape.n_head != shape.n_kv_head, can.grouped_heads, "fewer key heads than query heads"},
        {spec.mask.has_value(), can.mask, "masks by expression"},
        {spec.score_mod.has_value(), can.score_mod, "score mods"},
        {ragged, can.ragged, "lengths or offsets by row"},
        {spec.dropout > 0, can.dropout, "dropout"},
        {spec.page_size > 0, can.pages, "pages"}}) {
    if (need.needed && !need.has) return fmt::format("attention kernel {} does not do {}", kernel, need.what);
  }
  return "";
}

void check_attention_support(std::string_view kernel, const AttentionShape& shape,
                             const AttentionSpec& spec) {
  const std::string refusal = attention_refusal(kernel, shape, spec);
  check(refusal.empty(), "{}", refusal);
}

}  // namespace flexchat
