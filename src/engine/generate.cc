#include "engine/generate.h"

#include <cstring>

#include "base/error.h"

namespace flexchat {

void generate(Gpt& model, const std::vector<int32_t>& prompt, int64_t max_tokens,
              const SamplingOptions& sampling, const std::function<bool(int32_t)>& on_token) {
  check(!prompt.empty(), "cannot continue an empty prompt");
  const int64_t length = std::ssize(prompt), limit = 10 * model.config().sequence_len;
  check(max_tokens <= limit - length,
        "a prompt of {} tokens and {} new ones do not fit the model's {} positions", length, max_tokens,
        limit);
  Backend& backend = model.backend();
  Sampler sampler(sampling);
  KvCache cache = model.make_cache(1, length + max_tokens);
  Tensor ids(host_arena(), {1, length}, DType::i32);
  std::memcpy(ids.data(), prompt.data(), prompt.size() * sizeof(int32_t));
  const Tensor best = backend.empty({1}, DType::i32);
  Tensor host;  // logits as f32
  for (int64_t i = 0; i < max_tokens; ++i) {
    const Tensor logits = model.logits(ids, &cache, /*last_only=*/true);
    int32_t next = 0;
    if (sampling.temperature == 0) {
      backend.argmax(logits.reshape({1, logits.numel()}), best);
      next = static_cast<int32_t>(backend.to_host(best).item());
    } else {
      if (!host.defined()) host = Tensor(host_arena(), {logits.numel()}, DType::f32);
      backend.copy(logits, host);
      next = sampler.sample({host.as<float>(), static_cast<size_t>(host.numel())});
    }
    if (next < 0) fail_run("the model's logits are not numbers: its weights are broken");
    if (!on_token(next)) return;
    ids = Tensor(host_arena(), {1, 1}, DType::i32);
    ids.as<int32_t>()[0] = next;
  }
}

}  // namespace flexchat
