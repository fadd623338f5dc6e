// The weights of a GPT: names, shapes, initial values, compute copies, rotary tables.
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/rng.h"
#include "base/strings.h"
#include "models/gpt.h"

namespace flexchat {
namespace {

std::string layer_name(int64_t layer, const char* rest) {
  return fmt::format("transformer.h.{}.{}", layer, rest);
}

bool ends_with(const std::string& name, std::string_view suffix) {
  return name.size() >= suffix.size() &&
         name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// Is the weight read by one linear product and nothing else?
bool is_linear(const std::string& name) {
  return name == "lm_head.weight" ||
         (name.find(".attn.c_") != std::string::npos || name.find(".mlp.c_") != std::string::npos);
}

Distribution classic_init(const std::string& name, const Shape& shape) {
  if (ends_with(name, "wte.weight")) return {Distribution::normal, 0, 1};
  if (ends_with(name, "c_proj.weight") || name == "lm_head.weight") return {};
  const auto out = static_cast<double>(shape[0]), in = static_cast<double>(shape[1]);
  return {Distribution::normal, 0, std::min(1.0, std::sqrt(out / in)) / std::sqrt(in)};
}

Distribution modern_init(const std::string& name, int64_t n_embd) {
  const double s = std::sqrt(3.0) / std::sqrt(static_cast<double>(n_embd));
  if (ends_with(name, "wte.weight")) return {Distribution::normal, 0, 0.8};
  if (name == "lm_head.weight") return {Distribution::normal, 0, 0.001};
  if (ends_with(name, "c_proj.weight") || name == "smear_lambda") return {};
  if (name == "backout_lambda") return {Distribution::constant, 0.2, 0};
  if (ends_with(name, "gate.weight")) return {Distribution::uniform, 0, 0.02};
  if (ends_with(name, "c_fc.weight")) return {Distribution::uniform, -0.4 * s, 0.4 * s};
  return {Distribution::uniform, -s, s};  // c_q, c_k, c_v, value_embeds
}

}  // namespace

void Gpt::add_parameter(const std::string& name, const Weight& weight, int64_t row, int64_t rows) {
  const bool copied = weight.compute.data() != weight.value.data();
  parameters_.push_back({name, weight.value.rows(row, rows), weight.grad.rows(row, rows),
                         copied ? weight.compute.rows(row, rows) : Tensor(), is_linear(name)});
}

Weight Gpt::make_weight(const std::string& name, Shape shape) {
  Weight w;
  w.value = backend_.zeros(shape, backend_.master_dtype());
  w.grad = backend_.zeros(shape, backend_.master_dtype());
  w.compute = compute_ == backend_.master_dtype() ? w.value : backend_.zeros(shape, compute_);
  if (!name.empty()) add_parameter(name, w, 0, w.value.dim(0));
  return w;
}

void Gpt::build_parameters() {
  const int64_t c = config_.n_embd, d = config_.head_dim(), vp = config_.padded_vocab();
  const int64_t q_rows = config_.n_head * d, kv_rows = config_.n_kv_head * d;
  const bool modern = config_.arch == Arch::modern;
  if (modern) {
    resid_lambdas_ = make_weight("resid_lambdas", {config_.n_layer});
    x0_lambdas_ = make_weight("x0_lambdas", {config_.n_layer});
    smear_lambda_ = make_weight("smear_lambda", {1});
    backout_lambda_ = make_weight("backout_lambda", {1});
  }
  wte_ = make_weight("transformer.wte.weight", {vp, c});
  blocks_.resize(static_cast<size_t>(config_.n_layer));
  for (int64_t i = 0; i < config_.n_layer; ++i) {
    Block& block = blocks_[static_cast<size_t>(i)];
    block.qkv = make_weight("", {q_rows + 2 * kv_rows, c});
    int64_t row = 0;
    for (const auto& [name, rows] :
         {std::pair{"attn.c_q.weight", q_rows}, std::pair{"attn.c_k.weight", kv_rows},
          std::pair{"attn.c_v.weight", kv_rows}}) {
      add_parameter(layer_name(i, name), block.qkv, row, rows);
      row += rows;
    }
    block.c_proj = make_weight(layer_name(i, "attn.c_proj.weight"), {c, q_rows});
    if (config_.has_value_embedding(i)) {
      block.ve_gate =
          make_weight(layer_name(i, "attn.ve_gate.weight"), {config_.n_kv_head, kValueGateChannels});
    }
    block.c_fc = make_weight(layer_name(i, "mlp.c_fc.weight"), {4 * c, c});
    block.mlp_c_proj = make_weight(layer_name(i, "mlp.c_proj.weight"), {c, 4 * c});
  }
  lm_head_ = make_weight("lm_head.weight", {vp, c});
  if (modern) smear_gate_ = make_weight("smear_gate.weight", {1, kSmearChannels});
  for (int64_t i = 0; i < config_.n_layer; ++i) {
    if (!config_.has_value_embedding(i)) continue;
    blocks_[static_cast<size_t>(i)].value_embeds =
        make_weight(fmt::format("value_embeds.{}.weight", i), {vp, kv_rows});
  }
}

void Gpt::for_each_weight(const std::function<void(Weight&)>& fn) {
  for (Weight* w :
       {&wte_, &lm_head_, &resid_lambdas_, &x0_lambdas_, &smear_lambda_, &backout_lambda_, &smear_gate_}) {
    if (w->value.defined()) fn(*w);
  }
  for (Block& b : blocks_) {
    for (Weight* w : {&b.qkv, &b.c_proj, &b.c_fc, &b.mlp_c_proj, &b.value_embeds, &b.ve_gate}) {
      if (w->value.defined()) fn(*w);
    }
  }
}

void Gpt::weights_changed() {
  for_each_weight([this](Weight& w) {
    if (w.compute.data() != w.value.data()) backend_.copy(w.value, w.compute);
  });
}

void Gpt::zero_grad() {
  for_each_weight([this](Weight& w) { backend_.fill(w.grad, 0); });
}

const Parameter& Gpt::parameter(const std::string& name) const {
  std::vector<std::string> names;
  for (const Parameter& p : parameters_) {
    if (p.name == name) return p;
    names.push_back(p.name);
  }
  fail("no parameter '{}'{}", name, did_you_mean(name, names));
}

// theta(t, j) = t * base^(-2j/D), computed in f32; the classic tables are rounded to bf16 whatever the
// compute dtype, the modern ones to the compute dtype, as the reference systems keep them.
void Gpt::build_rope_tables() {
  const int64_t half = config_.head_dim() / 2, length = 10 * config_.sequence_len;
  const bool modern = config_.arch == Arch::modern;
  const float base = modern ? 100000.0f : 10000.0f;
  const DType rounding = !modern ? DType::bf16 : compute_ == DType::f64 ? DType::f32 : compute_;
  Tensor cosine(host_arena(), {length, half}, rounding), sine(host_arena(), {length, half}, rounding);
  for (int64_t j = 0; j < half; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(config_.head_dim());
    const float frequency = 1.0f / std::pow(base, exponent);
    for (int64_t t = 0; t < length; ++t) {
      const float theta = static_cast<float>(t) * frequency;
      cosine.set(t * half + j, static_cast<double>(std::cos(theta)));
      sine.set(t * half + j, static_cast<double>(std::sin(theta)));
    }
  }
  rope_.cos = backend_.empty({length, half}, backend_.master_dtype());
  rope_.sin = backend_.empty({length, half}, backend_.master_dtype());
  backend_.copy(cosine, rope_.cos);
  backend_.copy(sine, rope_.sin);
}

void Gpt::init_weights(uint64_t seed) {
  uint64_t stream = 0;
  const auto last = static_cast<double>(std::max<int64_t>(config_.n_layer - 1, 1));
  for (Parameter& p : parameters_) {
    if (p.name == "resid_lambdas" || p.name == "x0_lambdas") {
      const bool resid = p.name[0] == 'r';
      const Tensor host(host_arena(), p.value.shape(), DType::f64);
      for (int64_t i = 0; i < host.numel(); ++i) {
        host.set(i, resid ? 1.15 - 0.10 * static_cast<double>(i) / last
                          : 0.20 - 0.15 * static_cast<double>(i) / last);
      }
      backend_.copy(host, p.value);
    } else {
      const Distribution init = config_.arch == Arch::modern ? modern_init(p.name, config_.n_embd)
                                                             : classic_init(p.name, p.value.shape());
      backend_.draw(init, seed, stream, p.value);
    }
    ++stream;
  }
  weights_changed();
}

void Gpt::load(const std::function<Tensor(const std::string&, const Shape&)>& lookup) {
  std::vector<Tensor> values;  // all of them first: a missing one must leave the model as it was
  values.reserve(parameters_.size());
  for (const Parameter& p : parameters_) values.push_back(lookup(p.name, p.value.shape()));
  for (size_t i = 0; i < values.size(); ++i) backend_.copy(values[i], parameters_[i].value);
  weights_changed();
}

}  // namespace flexchat
