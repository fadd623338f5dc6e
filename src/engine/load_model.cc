#include "engine/load_model.h"

#include "base/error.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/state_json.h"

namespace flexchat {

LoadedModel load_model(const std::filesystem::path& directory, const std::filesystem::path& tokenizer,
                       Backend& backend, DType compute) {
  namespace fs = std::filesystem;
  check(fs::is_directory(directory), "no model at {}: give a run folder or a checkpoint folder",
        directory.string());
  fs::path checkpoint_dir = fs::absolute(directory).lexically_normal(), run_dir;
  if (!checkpoint_dir.has_filename()) checkpoint_dir = checkpoint_dir.parent_path();  // a trailing slash
  if (fs::exists(checkpoint_dir / "manifest.json")) {
    run_dir = checkpoint_dir.parent_path().parent_path();
  } else {
    run_dir = checkpoint_dir;
    const auto latest = find_latest_checkpoint(run_dir);
    check(latest.has_value(), "{} holds no finished checkpoint", directory.string());
    checkpoint_dir = *latest;
  }
  const Checkpoint saved = load_checkpoint(checkpoint_dir);
  const StateReader state(saved.state(), saved.state_source());
  const GptConfig config = GptConfig::from_json(state.value("model_config"), saved.state_source());
  Tokenizer loaded_tokenizer = Tokenizer::load(tokenizer.empty() ? run_dir / "tokenizer" : tokenizer);
  check(loaded_tokenizer.vocab_size() == config.vocab_size,
        "the tokenizer has {} tokens but the model in {} has {}", loaded_tokenizer.vocab_size(),
        checkpoint_dir.string(), config.vocab_size);

  const SafetensorsFile& weights = saved.group("model");
  auto model = std::make_unique<Gpt>(config, backend, compute);
  std::vector<std::pair<std::string, Shape>> expected;
  for (const Parameter& p : model->parameters()) expected.emplace_back(p.name, p.value.shape());
  weights.require(expected);
  model->load([&](const std::string& name, const Shape& shape) {
    return weights.load(name, shape, backend.master_dtype());
  });
  return {std::move(model), std::move(loaded_tokenizer), saved.step(), checkpoint_dir};
}

}  // namespace flexchat
