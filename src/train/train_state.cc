// Saving and resuming a training run: what goes into its checkpoint and how it comes back.
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/state_json.h"
#include "train/trainer.h"

namespace flexchat {
namespace {

Json optional_number(const std::optional<double>& x) { return x ? Json(*x) : Json(nullptr); }
std::optional<double> number_or_nothing(const Json& x) {
  return x.is_null() ? std::nullopt : std::optional(x.get<double>());
}

}  // namespace

std::vector<TensorGroup> Trainer::checkpoint_groups() const {
  NamedTensors weights;
  for (const Parameter* p : parameters_) weights.emplace_back(p->name, p->value);
  const std::vector<int32_t> tokens = buffered_tokens(loader_->state());
  const Tensor buffer(host_arena(), {std::ssize(tokens)}, DType::i32);
  if (!tokens.empty()) std::memcpy(buffer.data(), tokens.data(), tokens.size() * sizeof(int32_t));
  return {{"model", std::move(weights), {}},
          {"optimizer", optimizer_.state(), {}},
          {"loader", {{"tokens", buffer}}, {}}};
}

Json Trainer::checkpoint_state() const {
  Json state = {{"step", step_},
                {"model_config", config_.to_json()},
                {"options", record_},
                {"loader", to_json(loader_->state())},
                {"loss_average", average_.state()},
                {"smooth_loss", smooth_loss_},
                {"last_loss", last_loss_},
                {"train_seconds", train_seconds_},
                {"best_val_bpb", optional_number(best_bpb_)},
                {"val_bpb", optional_number(last_bpb_)}};
  if (scaler_) state["loss_scaler"] = scaler_->state();
  if (ordinal_) state["ordinal"] = ordinal_->state();
  return state;
}

void Trainer::save() {
  const auto path =
      save_checkpoint(run_.path(), step_, checkpoint_groups(), checkpoint_state(), options_.keep);
  progress_->message("saved " + path.string());
}

void Trainer::resume_from_checkpoint() {
  const auto latest = find_latest_checkpoint(run_.path());
  check(latest.has_value(), "{} has no finished checkpoint to resume from", run_.path().string());
  const Checkpoint saved = load_checkpoint(*latest);
  const std::string source = saved.state_source();
  const StateReader state(saved.state(), source);
  const GptConfig config = GptConfig::from_json(state.value("model_config"), source);
  check(config == config_, "{} holds another model ({}) than the options ask for ({})",
        saved.directory().string(), config.to_json().dump(), config_.to_json().dump());

  // Everything is read and checked before the first parameter changes.
  const SafetensorsFile& weights = saved.group("model");
  std::vector<std::pair<std::string, Shape>> expected;
  for (const Parameter* p : parameters_) expected.emplace_back(p->name, p->value.shape());
  weights.require(expected);
  const SafetensorsFile& loader = saved.group("loader");
  const Tensor tokens = loader.load("tokens");
  check(tokens.dtype() == DType::i32, "{}: 'tokens' must be i32", loader.name());
  const LoaderState position = loader_state_from(
      state.value("loader"), {tokens.as<int32_t>(), tokens.as<int32_t>() + tokens.numel()}, source);
  const SafetensorsFile& moments = saved.group("optimizer");
  optimizer_.load_state(
      [&](const std::string& name) { return moments.contains(name) ? moments.load(name) : Tensor(); });
  model_.load([&](const std::string& name, const Shape& shape) {
    return weights.load(name, shape, backend_->master_dtype());
  });
  if (scaler_) scaler_->load_state(state.value("loss_scaler"), source);
  if (ordinal_) {
    ordinal_->load_state(state.value("ordinal"), source);
    optimizer_.set_lr(ordinal_->lr());
  }
  average_.load_state(state.value("loss_average"), source);
  step_ = state.integer("step");
  smooth_loss_ = state.number("smooth_loss");
  last_loss_ = state.number("last_loss");
  train_seconds_ = state.number("train_seconds");
  best_bpb_ = number_or_nothing(state.value("best_val_bpb"));
  last_bpb_ = number_or_nothing(state.value("val_bpb"));
  run_.truncate_metrics(step_);
  resume_position_ = position;
}

}  // namespace flexchat
