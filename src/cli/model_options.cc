#include "cli/model_options.h"

#include "base/parallel.h"

namespace flexchat {

ModelOptions::ModelOptions() : threads(num_threads()) {}

void ModelOptions::declare(Options& o) {
  o.add("--model", &model, "a run folder (newest checkpoint) or a checkpoint folder").required();
  o.add("--tokenizer", &tokenizer, "folder of a tokenizer, if not the run's own");
  o.add("--device", &device, "where to compute").choices({"cpu", "reference"});
  o.add("--dtype", &dtype, "compute dtype").choices({"f32", "bf16", "f16"});
  o.add("--threads", &threads, "CPU threads").at_least(1);
}

ModelOptions::Opened ModelOptions::open() const {
  set_num_threads(static_cast<int>(threads));
  auto backend = make_backend(device);
  LoadedModel loaded =
      load_model(model, tokenizer, *backend, device == "reference" ? DType::f64 : parse_dtype(dtype));
  return {std::move(backend), std::move(loaded)};
}

}  // namespace flexchat
