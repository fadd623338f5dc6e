// Whole models: the expression path against the built-in one, and both against double.
#include "base/error.h"
#include "base/rng.h"
#include "models/gpt.h"
#include "verify/attention_suite.h"

namespace flexchat {
namespace {

constexpr int64_t kBatch = 2, kLength = 64;

GptConfig tiny(int64_t n_kv_head) {
  GptConfig config;
  config.sequence_len = kLength;
  config.vocab_size = 256;
  config.n_layer = 3;
  config.n_head = 4;
  config.n_kv_head = n_kv_head;
  config.n_embd = 128;
  return config;
}

// Columns [begin, end) of ids (B, T).
Tensor part(const Tensor& ids, int64_t begin, int64_t end) {
  const Tensor out(host_arena(), {kBatch, end - begin}, DType::i32);
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t t = begin; t < end; ++t) out.set(b * (end - begin) + t - begin, ids.get(b * kLength + t));
  }
  return out;
}

// Logits of the last `count` positions: all at once (cached 0), or those positions in one piece after a
// prefill.
Tensor logits(Gpt& model, const Tensor& ids, int64_t cached) {
  if (cached == 0) return model.backend().to_host(model.logits(ids));
  KvCache cache = model.make_cache(kBatch, kLength);
  model.logits(part(ids, 0, kLength - cached), &cache);
  return model.backend().to_host(model.logits(part(ids, kLength - cached, kLength), &cache));
}

}  // namespace

std::vector<Check> check_models(Backend& backend, DType dtype) {
  struct Mode {
    const char* name;
    int64_t cached;
  };
  // f32: what the reference system's own two paths differ by.
  const bool exact = dtype == DType::f32 || dtype == DType::f64;
  const double between_paths = exact ? 7.2e-7 : dtype == DType::bf16 ? 6e-2 : 8e-3;
  const double to_double = exact ? 4e-6 : dtype == DType::bf16 ? 0.12 : 1.6e-2;
  const auto reference = make_reference_backend();
  std::vector<Check> checks;
  for (const auto& [heads, kv_heads] : {std::pair{"mqa", 1}, std::pair{"gqa", 2}, std::pair{"mha", 4}}) {
    Gpt model(tiny(kv_heads), backend, dtype), exact_model(tiny(kv_heads), *reference, DType::f64);
    // As the golden files were made: the usual initial weights, with noise for matrices that begin as zero,
    // so that every path carries signal.
    model.init_weights(5);
    uint64_t stream = 100;
    for (Parameter& p : model.parameters()) {
      if (p.name.find("c_proj") == std::string::npos && p.name != "lm_head.weight") continue;
      backend.draw({Distribution::normal, 0, 0.035}, 5, stream++, p.value);
    }
    model.weights_changed();
    exact_model.load(
        [&](const std::string& name, const Shape&) { return backend.to_host(model.parameter(name).value); });
    Rng rng(6);
    const Tensor ids(host_arena(), {kBatch, kLength}, DType::i32);
    for (int64_t i = 0; i < ids.numel(); ++i) ids.set(i, static_cast<double>(rng.below(256)));
    for (const auto& [mode, cached] :
         {Mode{"full_forward", 0}, Mode{"kv_decode_last", 1}, Mode{"kv_chunk_decode", 7}}) {
      const std::string name = fmt::format("{}/{}", heads, mode);
      model.set_attention(AttentionPath::sdpa);
      const Tensor sdpa = logits(model, ids, cached);
      model.set_attention(AttentionPath::flex);
      const Tensor flex = logits(model, ids, cached);
      const Tensor want = logits(exact_model, ids, cached);
      checks.push_back(compare(name + " flex = sdpa", flex, sdpa, "max_abs", between_paths));
      checks.push_back(compare(name + " sdpa = double", sdpa, want, "max_abs", to_double));
      checks.push_back(compare(name + " flex = double", flex, want, "max_abs", to_double));
    }
  }
  return checks;
}

}  // namespace flexchat
