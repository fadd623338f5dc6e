// What benchmarks of whole models share: weights and tokens that are real data in every product.
#pragma once

#include <string>
#include <vector>

#include "backend/device_options.h"
#include "base/options.h"
#include "base/rng.h"
#include "cli/bench_output.h"
#include "models/gpt.h"

namespace flexchat {

// Every parameter normal with deviation 0.02: none is zero, as some initial values are.
void draw_weights(Gpt& model, Rng& rng);
// (rows, columns) i32 in host memory.
Tensor draw_ids(Rng& rng, int64_t rows, int64_t columns, int64_t vocab_size);

// `bench attention --model`: the paths of attention beside each other in a whole model.
struct AttentionModelBench {
  GptConfig config;
  int64_t batch = 8;

  void declare(Options& o);
  // paths: of "sdpa" and "flex". Errors: another path, a config that is no model.
  int run(Backend& backend, DType dtype, const std::vector<std::string>& paths, const std::string& kernel,
          int repeats, Json summary, const BenchOutput& output) const;
};

}  // namespace flexchat
