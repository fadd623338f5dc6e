#include "verify/golden.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/safetensors.h"
#include "models/gpt.h"
#include "optim/gradients.h"
#include "optim/optimizer.h"

namespace flexchat {
namespace {

// What is asked of each compute dtype. The goldens were computed in f32, so f32 and f64 must meet them to
// rounding; bf16 and f16 activations carry 8 and 11 bits.
struct Limits {
  double logits, loss, gradient, trajectory, final_parameters;
};
Limits limits_for(DType compute) {
  switch (compute) {
    case DType::bf16:
      return {0.25, 2e-2, 6e-2, 5e-2, 5e-2};
    case DType::f16:
      return {0.03, 2e-3, 1e-2, 2e-2, 3e-2};
    default:
      return {2e-5, 2e-6, 1e-4, 2e-3, 1e-2};
  }
}

class Golden {
 public:
  Golden(const std::filesystem::path& file, Backend& backend, const GoldenOptions& options)
      : file_(SafetensorsFile::open(file)),
        prefix_(file.stem().string() + " "),
        backend_(backend),
        options_(options),
        limits_(limits_for(options.compute)),
        config_(GptConfig::from_json(metadata("config"), file.string())),
        model_(config_, backend, options.compute) {
    options.attention.apply(model_);
    reset();
  }

  std::vector<Check> run() {
    forward_and_gradients();
    cached_logits();
    trajectory();
    return std::move(checks_);
  }
  Json attention() const { return attention_record(model_); }

 private:
  Json metadata(const std::string& key) const {
    const auto it = file_.metadata().find(key);
    check(it != file_.metadata().end(), "{}: no metadata '{}': not a golden file of a GPT", file_.name(),
          key);
    const Json value = Json::parse(it->second, nullptr, false);
    check(!value.is_discarded(), "{}: metadata '{}' is not JSON", file_.name(), key);
    return value;
  }

  std::vector<Parameter*> parameter_pointers() {
    std::vector<Parameter*> out;
    for (Parameter& p : model_.parameters()) out.push_back(&p);
    return out;
  }

  void reset() {
    model_.load([this](const std::string& name, const Shape& shape) {
      return file_.load("param." + name, shape, backend_.master_dtype());
    });
  }

  Tensor ids(const std::string& name) const {
    const Tensor t = file_.load(name);
    return file_.load(name, t.shape(), DType::i32);
  }

  // Columns [begin, begin + count) of ids (B, T).
  static Tensor columns(const Tensor& x, int64_t begin, int64_t count) {
    const Tensor out(host_arena(), {x.dim(0), count}, DType::i32);
    for (int64_t b = 0; b < x.dim(0); ++b) {
      for (int64_t t = 0; t < count; ++t) out.set(b * count + t, x.get(b * x.dim(1) + begin + t));
    }
    return out;
  }

  void add(const std::string& name, const Tensor& got, const Tensor& want, const char* measure,
           double limit) {
    checks_.push_back(compare(prefix_ + name, backend_.to_host(got), want, measure, limit));
  }

  DType muon_dtype() const {
    if (backend_.master_dtype() == DType::f64) return DType::f64;
    if (options_.muon_dtype) return *options_.muon_dtype;
    return options_.compute == DType::bf16 ? DType::bf16 : DType::f32;
  }

  // Mean loss over valid targets; leaves gradients in the model. f16 needs its loss scaled as in training.
  double loss_and_gradients(const Tensor& x, const Tensor& y) {
    int64_t valid = 0;
    for (int64_t i = 0; i < y.numel(); ++i) valid += y.get(i) >= 0 ? 1 : 0;
    model_.zero_grad();
    const LossScaler scaler(options_.compute == DType::f16 ? 65536 : 1);
    Tape tape(backend_, true);
    const Tensor nll =
        model_.nll(tape, x, y, scaler.scale() / static_cast<double>(std::max<int64_t>(valid, 1)));
    tape.backward();
    if (options_.compute == DType::f16) {
      check(scaler.unscale(backend_, parameter_pointers()), "{}: f16 gradients overflow", file_.name());
    }
    double sum = 0;
    const Tensor host = backend_.to_host(nll);
    for (int64_t i = 0; i < host.numel(); ++i) sum += host.get(i);
    return sum / static_cast<double>(std::max<int64_t>(valid, 1));
  }

  static Tensor scalar(double value) {
    return Tensor::from(std::span<const double>(&value, 1), {1}, DType::f64);
  }

  void forward_and_gradients() {
    const Tensor x = ids("idx"), y = ids("targets");
    add("logits", model_.logits(x), file_.load("logits"), "max_abs", limits_.logits);
    add("loss", scalar(loss_and_gradients(x, y)), file_.load("loss"), "max_abs", limits_.loss);
    for (const Parameter& p : model_.parameters()) {
      const std::string name = "grad." + p.name;
      if (file_.contains(name)) add(name, p.grad, file_.load(name), "max_rel", limits_.gradient);
    }
    const Json flops = metadata("flops_per_token");
    add("flops_per_token", scalar(flops_per_token(config_)), scalar(flops.get<double>()), "max_abs", 0);
  }

  void cached_logits() {
    const Tensor x = ids("idx");
    const auto split = metadata("split").get<std::vector<int64_t>>();
    check(split.size() == 3, "{}: metadata 'split' must have three numbers", file_.name());
    KvCache cache = model_.make_cache(x.dim(0), x.dim(1));
    const char* last = file_.contains("kv_chunk_logits") ? "kv_chunk_logits" : "kv_decode2_logits";
    int64_t begin = 0;
    for (const auto& [name, count] : {std::pair{"kv_prefill_logits", split[0]},
                                      std::pair{"kv_decode_logits", split[1]}, std::pair{last, split[2]}}) {
      add(name, model_.logits(columns(x, begin, count), &cache), file_.load(name), "max_abs", limits_.logits);
      begin += count;
    }
  }

  // The optimizer and rates that the golden files were made with: the library defaults of each architecture,
  // constant rates, and for the modern one Muon weight decay 0.1.
  void trajectory() {
    const bool modern = config_.arch == Arch::modern;
    OptimizerConfig config;
    config.arch = config_.arch;
    config.n_embd = config_.n_embd;
    config.muon_dtype = muon_dtype();
    reset();
    Optimizer optimizer(backend_, parameter_pointers(), config);
    const Tensor xs = ids("train_x"), ys = ids("train_y"), want = file_.load("train_loss");
    const Tensor got(host_arena(), want.shape(), DType::f64);
    for (int64_t step = 0; step < xs.dim(0); ++step) {
      const auto batch = [&](const Tensor& all) { return all.rows(step, 1).reshape({xs.dim(1), xs.dim(2)}); };
      got.set(step, loss_and_gradients(batch(xs), batch(ys)));
      optimizer.step(1.0, 0.95, modern ? 0.1 : 0.0);
    }
    add("train_loss", got, want, "max_abs", limits_.trajectory);
    if (options_.compute == DType::bf16 || options_.compute == DType::f16) return;
    // The classic trajectories were made with bf16 iterations, the modern ones with f32.
    const double limit = config_.arch == Arch::classic || muon_dtype() == DType::bf16 ? 1e-2 : 1e-3;
    for (const Parameter& p : model_.parameters()) {
      const std::string name = "final." + p.name;
      if (file_.contains(name)) add(name, p.value, file_.load(name), "max_rel", limit);
    }
  }

  SafetensorsFile file_;
  std::string prefix_;
  Backend& backend_;
  GoldenOptions options_;
  Limits limits_;
  GptConfig config_;
  Gpt model_;
  std::vector<Check> checks_;
};

}  // namespace

std::vector<Check> verify_golden(const std::filesystem::path& file, Backend& backend,
                                 const GoldenOptions& options, Json* attention) {
  Golden golden(file, backend, options);
  std::vector<Check> checks = golden.run();
  if (attention) *attention = golden.attention();
  return checks;
}

}  // namespace flexchat
