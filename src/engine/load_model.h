// From a folder on disk to something that can run.
#pragma once

#include <filesystem>
#include <memory>

#include "models/gpt.h"
#include "tokenizer/tokenizer.h"

namespace flexchat {

struct LoadedModel {
  std::unique_ptr<Gpt> model;
  Tokenizer tokenizer;
  int64_t step = 0;
  std::filesystem::path checkpoint;
};

// `directory`: a training run's folder (its newest checkpoint counts) or one checkpoint folder. The tokenizer
// is the run's own unless `tokenizer` names another; its vocabulary must be the model's. Errors name file and
// tensor; nothing is half-loaded.
LoadedModel load_model(const std::filesystem::path& directory, const std::filesystem::path& tokenizer,
                       Backend& backend, DType compute);

}  // namespace flexchat
