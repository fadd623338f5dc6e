// Continuing one prompt: prefill, then one token at a time through the KV cache.
#pragma once

#include <functional>
#include <vector>

#include "engine/sampler.h"
#include "models/gpt.h"

namespace flexchat {

// Calls on_token for every new token, at most max_tokens times, until it returns false. The prompt must not
// be empty; prompt and new tokens must fit the model's rotary table of 10 * sequence_len positions.
void generate(Gpt& model, const std::vector<int32_t>& prompt, int64_t max_tokens,
              const SamplingOptions& sampling, const std::function<bool(int32_t)>& on_token);

}  // namespace flexchat
