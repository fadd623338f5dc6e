#include "cli/model_options.h"

namespace flexchat {

void ModelOptions::declare(Options& o) {
  o.add("--model", &model, "a run folder (newest checkpoint) or a checkpoint folder").required();
  o.add("--tokenizer", &tokenizer, "folder of a tokenizer, if not the run's own");
  compute.declare(o);
  attention.declare(o);
}

ModelOptions::Opened ModelOptions::open() const {
  auto backend = compute.open();
  LoadedModel loaded = load_model(model, tokenizer, *backend, compute.compute_dtype());
  attention.apply(*loaded.model);
  return {std::move(backend), std::move(loaded)};
}

}  // namespace flexchat
