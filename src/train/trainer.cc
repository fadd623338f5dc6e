#include "train/trainer.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/strings.h"
#include "engine/generate.h"
#include "report/html.h"
#include "report/table.h"
#include "train/signals.h"

namespace flexchat {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<Parameter*> pointers(Gpt& model) {
  std::vector<Parameter*> out;
  for (Parameter& p : model.parameters()) out.push_back(&p);
  return out;
}

LoaderConfig loader_config(const TrainOptions& o, const Tokenizer& tokenizer) {
  LoaderConfig c;
  c.data = o.data;
  c.val_data = o.val_data;
  c.packing = parse_packing(o.packing != "auto" ? o.packing : o.arch == "classic" ? "classic" : "bestfit");
  c.batch_size = o.device_batch_size;
  c.sequence_len = o.sequence_len;
  c.bos = tokenizer.bos();
  return c;
}

}  // namespace

Trainer::Trainer(const TrainOptions& options, const GptConfig& config, Tokenizer tokenizer,
                 const Json& record, RunFolder run)
    : options_(options),
      config_(config),
      tokenizer_(std::move(tokenizer)),
      record_(record),
      run_(std::move(run)),
      backend_(options.compute.open()),
      model_(config, *backend_, options.compute.compute_dtype()),
      parameters_(pointers(model_)),
      budget_(make_budget(config, options.budget_options(), {options.aspect_ratio, options.head_dim})),
      schedule_(options.base_schedule(config, budget_.num_iterations)),
      optimizer_(*backend_, parameters_, options.optimizer_config(config)),
      accumulation_(
          grad_accum_steps(budget_.total_batch_size, options.device_batch_size, options.sequence_len)),
      step_work_(model_, optimizer_, options.device_batch_size, options.sequence_len, accumulation_,
                 options.cuda_graph),
      token_bytes_(tokenizer_.token_bytes()) {
  model_.set_checkpoint_activations(options.checkpoint_activations);
  options.attention.apply(model_);
  options.loss.apply(model_);
  model_.plan_attention(options.device_batch_size, config.sequence_len);
  loss_plan_ = model_.loss_plan(options.device_batch_size * config.sequence_len, true);
  attention_ = attention_record(model_);
  for (OptimizerGroup& group : optimizer_.groups()) group.lr *= budget_.lr_factor;
  if (options.schedule == "ordinal") {
    ordinal_.emplace(options.ordinal);
    optimizer_.set_lr(ordinal_->lr());
  }
  if (model_.compute_dtype() == DType::f16) scaler_.emplace();
  if (options.resume) {
    resume_from_checkpoint();
  } else {
    model_.init_weights(static_cast<uint64_t>(options.seed));
    tokenizer_.save(run_.path() / "tokenizer");
    run_.write_json("config.json", record_);
  }
  const LoaderConfig data = loader_config(options, tokenizer_);
  // The prefetching thread encodes alone: the training threads keep the cores.
  const EncodeDocuments encode = [this](const std::vector<std::string>& docs,
                                        std::vector<std::vector<int32_t>>& ids) {
    ids.resize(docs.size());
    for (size_t i = 0; i < docs.size(); ++i) ids[i] = tokenizer_.encode(docs[i]);
  };
  loader_ = make_train_loader(data, encode, resume_position_ ? &*resume_position_ : nullptr);
  resume_position_.reset();
  val_loader_ = make_val_loader(data, encode);
}

// ---- the loop -------------------------------------------------------------------------------------------

int Trainer::run() {
  print_plan();
  const StopSignals signals;
  progress_ = std::make_unique<Progress>("train", budget_.num_iterations, "steps");
  first_step_ = step_;
  progress_->update(step_);
  const auto every = [this](int64_t n) { return n > 0 && step_ % n == 0; };
  int64_t saved = options_.resume ? step_ : -1, evaluated = options_.resume ? step_ : -1;
  for (;;) {
    const bool last = step_ >= budget_.num_iterations;
    const int signal = StopSignals::received();
    const bool stop =
        signal != 0 || (options_.stop_after && step_ - first_step_ >= *options_.stop_after && !last);
    // Save before anything else can fail or take long: an evaluation must never cost the run.
    if ((last || stop || (step_ > 0 && every(options_.save_every))) && saved != step_) {
      save();
      saved = step_;
    }
    if (stop) {
      progress_->finish();
      finish(fmt::format("stopped at step {}", step_));
      return signal != 0 ? 128 + signal : 0;
    }
    if ((last || every(options_.eval_every)) && evaluated != step_) {
      evaluate();
      evaluated = step_;
    }
    if (last || (step_ > first_step_ && every(options_.sample_every))) sample();
    if (last) break;

    const StepResult result = train_step();
    ++step_;
    apply_schedule(result.loss);
    log_step(result);
  }
  progress_->finish();
  finish("finished");
  return 0;
}

Trainer::StepResult Trainer::train_step() {
  const auto start = Clock::now();
  StepResult result;
  const double decay = options_.weight_decay.value_or(0.28) * budget_.weight_decay_factor;
  const StepRates rates = {lr_multiplier(),
                           schedule_.muon_momentum(step_),
                           schedule_.muon_weight_decay(step_, decay),
                           {options_.clip_norm(), scaler_ ? scaler_->scale() : 1.0}};
  step_work_.begin();
  for (int64_t i = 0; i < accumulation_; ++i) {
    const auto waiting = Clock::now();
    const Batch batch = loader_->next();
    result.data_seconds += seconds_since(waiting);
    source_stats_ = batch.stats.source;
    const Tensor ids = batch_tensor(batch.inputs, batch.batch_size, batch.sequence_len);
    const Tensor targets = batch_tensor(batch.targets, batch.batch_size, batch.sequence_len);
    if (i + 1 < accumulation_) {
      step_work_.add(ids, targets, rates.limits.loss_scale);
    } else {
      step_work_.finish(ids, targets, rates);
    }
  }
  const TrainStep::Result done = step_work_.result();
  result.loss = done.loss;
  result.grad_norm = done.grad_norm;
  result.skipped = done.skipped;
  if (!std::isfinite(done.loss) || (done.skipped && !scaler_)) stop_on_bad_numbers(done.loss, done.grad_norm);
  if (scaler_) scaler_->update(!done.skipped);
  result.seconds = seconds_since(start);
  return result;
}

double Trainer::lr_multiplier() const { return ordinal_ ? 1.0 : schedule_.lr_multiplier(step_); }

void Trainer::apply_schedule(double loss) {
  last_loss_ = loss;
  smooth_loss_ = average_.update(loss);
  if (!ordinal_) return;
  const OrdinalScheduler::Event event = ordinal_->step(loss);
  if (event == OrdinalScheduler::Event::none) return;
  optimizer_.set_lr(ordinal_->lr());
  if (event == OrdinalScheduler::Event::restart) optimizer_.clear_state();
  progress_->message(fmt::format("step {}: {}, rate {:.3g}", step_,
                                 event == OrdinalScheduler::Event::anneal ? "anneal" : "restart",
                                 ordinal_->lr()));
}

void Trainer::stop_on_bad_numbers(double loss, double grad_norm) {
  std::string culprit = "the loss itself";
  const auto look = [&](const char* what, const Parameter& p, const Tensor& t) {
    const int64_t at = backend_->first_nonfinite(t);
    if (at < 0) return false;
    culprit = fmt::format("the {} of {} at element {}", what, p.name, at);
    return true;
  };
  bool found = std::any_of(parameters_.begin(), parameters_.end(),
                           [&](const Parameter* p) { return look("value", *p, p->value); });
  found = found || std::any_of(parameters_.begin(), parameters_.end(),
                               [&](const Parameter* p) { return look("gradient", *p, p->grad); });
  progress_->finish();
  const auto latest = find_latest_checkpoint(run_.path());
  finish(fmt::format("broken at step {}", step_));
  fail_run("step {}: loss {}, gradient norm {}: first bad tensor: {}. The last good checkpoint is {}", step_,
           loss, grad_norm, culprit, latest ? latest->string() : "none (nothing saved yet)");
}

// ---- what a run leaves behind ---------------------------------------------------------------------------

void Trainer::print_plan() const {
  const ParamCounts counts = count_params(config_);
  Table table({"plan", ""});
  table.row({"run folder", run_.path().string()});
  table.row({"model", fmt::format("{} d{}, width {}, {} heads of {}, {} key heads, {} parameters",
                                  arch_name(config_.arch), config_.n_layer, config_.n_embd, config_.n_head,
                                  config_.head_dim(), config_.n_kv_head, format_count(counts.total()))});
  table.row(
      {"data", fmt::format("{}, vocabulary {}", join(options_.data), format_count(config_.vocab_size))});
  table.row({"step", fmt::format("{} tokens = {} rows x {} tokens x {} micro batches",
                                 format_count(budget_.total_batch_size), options_.device_batch_size,
                                 config_.sequence_len, accumulation_)});
  table.row({"horizon",
             fmt::format("{} steps from {}, {} tokens, {:.3g} FLOPs", format_count(budget_.num_iterations),
                         budget_.horizon, format_count(static_cast<int64_t>(budget_.tokens())),
                         budget_.tokens() * flops_per_token(config_))});
  table.row({"compute", fmt::format("{} in {}, {} threads", backend_->name(),
                                    dtype_name(model_.compute_dtype()), options_.compute.threads)});
  table.row({"attention", attention_line(model_)});
  table.row({"loss", loss_line(loss_plan_)});
  fmt::print(stderr, "{}", table.text());
}

void Trainer::log_step(const StepResult& r) {
  train_seconds_ += r.seconds;
  if (step_ > first_step_ + 1) process_seconds_ += r.seconds;  // the first step warms up
  const auto tokens = static_cast<double>(budget_.total_batch_size);
  const double rate = tokens / r.seconds;
  const auto memory = static_cast<double>(backend_->arena().stats().peak);
  Json line = {{"step", step_},
               {"loss", r.loss},
               {"smooth_loss", smooth_loss_},
               {"lr_mult",
                ordinal_ ? ordinal_->lr() / options_.ordinal.initial_lr : schedule_.lr_multiplier(step_ - 1)},
               {"tok_per_sec", rate},
               {"mfu", nullptr},
               {"dt_ms", r.seconds * 1e3},
               {"data_wait_ms", r.data_seconds * 1e3},
               {"grad_norm", r.skipped ? Json(nullptr) : Json(r.grad_norm)},
               {"tokens", static_cast<int64_t>(tokens) * step_},
               {"mem_mb", memory / 1e6}};
  if (scaler_) line["loss_scale"] = scaler_->scale();
  run_.append_metrics(line);
  rate_ = rate;
  show_progress();
}

void Trainer::show_progress() {
  std::string note = fmt::format("loss {:.4f}", smooth_loss_);
  if (last_bpb_) note += fmt::format("  bpb {:.4f}", *last_bpb_);
  note += fmt::format("  {} tok/s  {:.1f} GFLOP/s  {}", format_count(static_cast<int64_t>(rate_)),
                      rate_ * flops_per_token(config_) / 1e9,
                      format_bytes(static_cast<double>(backend_->arena().stats().peak)));
  progress_->update(step_, note);
}

void Trainer::evaluate() {
  const int64_t tokens = options_.eval_tokens.value_or(20 * budget_.total_batch_size);
  last_bpb_ = bits_per_byte(model_, *val_loader_, token_bytes_, tokens);
  if (!best_bpb_ || *last_bpb_ < *best_bpb_) best_bpb_ = last_bpb_;
  run_.append_metrics({{"step", step_}, {"val_bpb", *last_bpb_}});
  progress_->message(fmt::format("step {:>6}  validation bpb {:.4f}", step_, *last_bpb_));
  if (step_ > first_step_) show_progress();
}

void Trainer::sample() {
  for (const char* prompt : {"", "The ", "If you ", "This is "}) {
    std::vector<int32_t> ids = tokenizer_.encode(prompt, {tokenizer_.bos(), {}, nullptr}), out;
    const int64_t room = 10 * config_.sequence_len - std::ssize(ids);
    generate(model_, ids, std::min<int64_t>(48, room), {0.8, 50, static_cast<uint64_t>(options_.seed)},
             [&](int32_t id) {
               if (tokenizer_.is_special(id)) return false;
               out.push_back(id);
               return true;
             });
    const std::string text = tokenizer_.decode(out);
    run_.append_metrics({{"step", step_}, {"prompt", prompt}, {"sample", text}});
    std::string line = prompt + text;
    std::replace_if(
        line.begin(), line.end(), [](char c) { return c == '\n' || c == '\r' || c == '\t'; }, ' ');
    progress_->message(fmt::format("step {:>6}  sample: {}", step_, line));
  }
}

void Trainer::finish(const std::string& status) {
  const int64_t steps = step_ - first_step_ - 1;
  const bool timed = steps > 0 && process_seconds_ > 0;
  const double rate = timed ? static_cast<double>(steps * budget_.total_batch_size) / process_seconds_ : 0;
  const auto latest = find_latest_checkpoint(run_.path());
  const Json results = {{"steps", step_},
                        {"final_loss", smooth_loss_},
                        {"val_bpb", last_bpb_ ? Json(*last_bpb_) : Json(nullptr)},
                        {"best_val_bpb", best_bpb_ ? Json(*best_bpb_) : Json(nullptr)},
                        {"tok_per_sec", timed ? Json(rate) : Json(nullptr)},
                        {"tflops", timed ? Json(rate * flops_per_token(config_) / 1e12) : Json(nullptr)},
                        {"seconds", train_seconds_},
                        {"parameters", count_params(config_).total()},
                        {"flops", static_cast<double>(step_) * static_cast<double>(budget_.total_batch_size) *
                                      flops_per_token(config_)},
                        {"peak_memory_bytes", backend_->arena().stats().peak},
                        {"invalid_utf8_replaced", source_stats_.invalid_utf8},
                        {"checkpoint", latest ? Json(latest->string()) : Json(nullptr)}};
  run_.write_summary({{"status", status},
                      {"results", results},
                      {"device", backend_->name()},
                      {"attention", attention_},
                      {"loss", loss_record(loss_plan_)},
                      {"model_config", config_.to_json()},
                      {"horizon",
                       {{"num_iterations", budget_.num_iterations},
                        {"total_batch_size", budget_.total_batch_size},
                        {"from", std::string(budget_.horizon)}}}});
  const auto report = render_train_report(run_.path());
  if (source_stats_.invalid_utf8 > 0) {
    fmt::print(stderr, "{} invalid UTF-8 sequences in the data were replaced\n",
               format_count(source_stats_.invalid_utf8));
  }
  fmt::print("{}; checkpoint {}\nreport: {}\n", status, latest ? latest->string() : "none", report.string());
}

}  // namespace flexchat
