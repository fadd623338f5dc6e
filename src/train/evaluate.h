// Bits per byte: the loss in nats over the bytes it had to predict, so that tokenizers can be compared.
#pragma once

#include <cstdint>
#include <vector>

#include "data/loader.h"
#include "models/gpt.h"

namespace flexchat {

// sum(nll) / (ln 2 * bytes) over `tokens` tokens (rounded down to whole batches, at least one) from the start
// of the validation data. Targets whose token_bytes are 0 (special tokens) count in neither sum.
double bits_per_byte(Gpt& model, ValLoader& loader, const std::vector<int32_t>& token_bytes, int64_t tokens);

// ids of a batch as a tensor (B, T) i32.
Tensor batch_tensor(const std::vector<int32_t>& ids, int64_t batch, int64_t sequence_len);

}  // namespace flexchat
