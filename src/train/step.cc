#include "train/step.h"

#include "base/error.h"

namespace flexchat {

TrainStep::TrainStep(Gpt& model, Optimizer& optimizer, int64_t batch, int64_t sequence_len,
                     int64_t micro_batches, bool graph)
    : model_(model),
      optimizer_(optimizer),
      backend_(model.backend()),
      batch_(batch),
      sequence_len_(sequence_len),
      micro_batches_(micro_batches),
      graph_(graph),
      ids_(backend_.empty({batch, sequence_len}, DType::i32)),
      targets_(backend_.empty({batch, sequence_len}, DType::i32)),
      loss_(backend_.zeros({1}, DType::f64)) {
  check(batch > 0 && sequence_len > 0 && micro_batches > 0,
        "a step of {} x {} tokens in {} micro batches is none", batch, sequence_len, micro_batches);
}

void TrainStep::begin() {
  optimizer_.zero_grad(micro_batches_ == 1);
  backend_.fill(loss_, 0);
}

void TrainStep::load(const Tensor& ids, const Tensor& targets, double loss_scale) {
  model_.check_ids(ids, targets);
  backend_.copy(ids, ids_);
  backend_.copy(targets, targets_);
  if (loss_scale != loss_scale_) {  // kernels take it by value: record them anew
    micro_.reset();
    last_.reset();
  }
  loss_scale_ = loss_scale;
}

void TrainStep::forward_backward() {
  const auto tokens = static_cast<double>(batch_ * sequence_len_ * micro_batches_);
  Tape tape(backend_, true);
  tape.set_fresh(micro_batches_ == 1);
  const Tensor nll = model_.nll(tape, ids_, targets_, loss_scale_ / tokens);
  tape.backward();
  backend_.add_sum(nll, loss_);
}

void TrainStep::run(std::unique_ptr<StepGraph>& graph, const std::function<void()>& work) {
  if (!graph_ || !warm_) return work();
  if (!graph) graph = backend_.capture(work);
  graph->replay();
}

void TrainStep::add(const Tensor& ids, const Tensor& targets, double loss_scale) {
  load(ids, targets, loss_scale);
  run(micro_, [this] { forward_backward(); });
}

void TrainStep::finish(const Tensor& ids, const Tensor& targets, const StepRates& rates) {
  load(ids, targets, rates.limits.loss_scale);
  optimizer_.set_rates(rates.lr_multiplier, rates.muon_momentum, rates.muon_weight_decay, rates.limits);
  run(last_, [this] {
    forward_backward();
    optimizer_.update();
  });
  if (!warm_) plans_ = model_.attention_plans();
  warm_ = true;
}

TrainStep::Result TrainStep::result() {
  const Optimizer::Result update = optimizer_.result();
  const double sum = backend_.to_host(loss_).item();
  return {sum / static_cast<double>(batch_ * sequence_len_ * micro_batches_), update.grad_norm,
          update.skipped};
}

}  // namespace flexchat
