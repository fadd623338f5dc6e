#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

namespace flexchat {

Tensor batch_tensor(const std::vector<int32_t>& ids, int64_t batch, int64_t sequence_len) {
  const Tensor t(host_arena(), {batch, sequence_len}, DType::i32);
  std::memcpy(t.data(), ids.data(), static_cast<size_t>(t.bytes()));
  return t;
}

double bits_per_byte(Gpt& model, ValLoader& loader, const std::vector<int32_t>& token_bytes, int64_t tokens) {
  loader.restart();
  double nats = 0;
  int64_t bytes = 0, seen = 0, batch_tokens = 0;
  do {
    const Batch& batch = loader.next();
    Tape tape(model.backend(), false);
    const Tensor nll = model.backend().to_host(
        model.nll(tape, batch_tensor(batch.inputs, batch.batch_size, batch.sequence_len),
                  batch_tensor(batch.targets, batch.batch_size, batch.sequence_len), 1.0));
    batch_tokens = nll.numel();
    for (int64_t i = 0; i < batch_tokens; ++i) {
      const int32_t target = batch.targets[static_cast<size_t>(i)];
      const int32_t size = target < 0 ? 0 : token_bytes[static_cast<size_t>(target)];
      if (size > 0) nats += nll.get(i);
      bytes += size;
    }
    seen += batch_tokens;
  } while (seen + batch_tokens <= tokens);
  return bytes > 0 ? nats / (std::numbers::ln2 * static_cast<double>(bytes))
                   : std::numeric_limits<double>::infinity();
}

}  // namespace flexchat
