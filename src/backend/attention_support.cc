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

std::array<AttentionSupport, 3> make_table() {
  AttentionSupport mma = everything("cuda", "cuda_mma", "f32, bf16, f16");
  mma.head_dims = kMmaHeadDims;
  mma.splits_keys = true;
  return {everything("reference", "reference", "f64"), everything("cpu", "cpu", "f32, bf16, f16"), mma};
}

}  // namespace

std::string AttentionSupport::head_dims_text() const {
  std::vector<std::string> words;
  for (const int64_t d : head_dims) words.push_back(std::to_string(d));
  return words.empty() ? "any" : join(words);
}

std::span<const AttentionSupport> attention_support() {
  static const std::array<AttentionSupport, 3> table = make_table();
  return table;
}

void check_attention_support(std::string_view kernel, const AttentionShape& shape,
                             const AttentionSpec& spec) {
  const auto table = attention_support();
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const AttentionSupport& s) { return s.kernel == kernel; });
  check(found != table.end(), "attention kernel {} is in no table", kernel);
  const AttentionSupport& can = *found;
  check(can.head_dims.empty() ||
            std::find(can.head_dims.begin(), can.head_dims.end(), shape.head_dim) != can.head_dims.end(),
        "attention kernel {}: head dim {}; allowed are {}", kernel, shape.head_dim, can.head_dims_text());
  const auto need = [&](bool needed, bool has, const char* what) {
    check(!needed || has, "attention kernel {} does not do {}", kernel, what);
  };
  need(shape.n_head != shape.n_kv_head, can.grouped_heads, "fewer key heads than query heads");
  need(spec.mask.has_value(), can.mask, "masks by expression");
  need(spec.score_mod.has_value(), can.score_mod, "score mods");
  need(!shape.q_lens.empty() || !shape.kv_lens.empty() || !shape.q_offsets.empty(), can.ragged,
       "lengths or offsets by row");
  need(spec.dropout > 0, can.dropout, "dropout");
  need(spec.page_size > 0, can.pages, "pages");
}

}  // namespace flexchat
