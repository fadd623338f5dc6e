#include "models/config.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

int64_t round_up_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The maxima keep every product of sizes below 2^62.
struct IntKey {
  const char* name;
  int64_t GptConfig::*member;
  int64_t maximum;
};
constexpr IntKey kIntKeys[] = {
    {"sequence_len", &GptConfig::sequence_len, int64_t{1} << 30},
    {"vocab_size", &GptConfig::vocab_size, int64_t{1} << 24},
    {"n_layer", &GptConfig::n_layer, int64_t{1} << 16},
    {"n_head", &GptConfig::n_head, int64_t{1} << 20},
    {"n_kv_head", &GptConfig::n_kv_head, int64_t{1} << 20},
    {"n_embd", &GptConfig::n_embd, int64_t{1} << 20},
};
constexpr const char* kWindowKey = "window_pattern";

// Parameters that every token is multiplied with: the weights of all linear layers.
double linear_weights(const GptConfig& config) {
  const ParamCounts n = count_params(config);
  const int64_t smear = config.arch == Arch::modern ? kSmearChannels : 0;
  return static_cast<double>(n.transformer_matrices + n.lm_head + smear);
}

// The window of a layer, clamped to what `tokens` tokens can use.
int64_t visible(const GptConfig& config, int64_t layer, int64_t tokens) {
  const int64_t w = config.window(layer);
  return w < 0 ? tokens : std::min(w, tokens);
}

}  // namespace

std::string_view arch_name(Arch arch) { return arch == Arch::classic ? "classic" : "modern"; }

Arch parse_arch(std::string_view name) {
  if (name == "classic") return Arch::classic;
  if (name == "modern") return Arch::modern;
  fail("unknown architecture '{}'; allowed: classic, modern{}", name,
       did_you_mean(name, {"classic", "modern"}));
}

bool GptConfig::has_value_embedding(int64_t layer) const {
  return arch == Arch::modern && layer % 2 == (n_layer - 1) % 2;
}

int64_t GptConfig::window(int64_t layer) const {
  if (arch == Arch::classic) return -1;
  const char letter = window_pattern[static_cast<size_t>(layer) % window_pattern.size()];
  // The last layer always sees the whole sequence.
  if (layer == n_layer - 1 || letter == 'L' || letter == 'l') return sequence_len;
  return round_up_div(round_up_div(sequence_len, 4), 128) * 128;
}

void GptConfig::validate() const {
  for (const IntKey& key : kIntKeys) {
    const int64_t value = this->*key.member;
    check(value >= 1 && value <= key.maximum, "{} is {}; allowed: 1 to {}", key.name, value, key.maximum);
  }
  check(n_embd % n_head == 0, "n_head {} must divide n_embd {}", n_head, n_embd);
  check(n_kv_head <= n_head && n_head % n_kv_head == 0, "n_kv_head {} must divide n_head {}", n_kv_head,
        n_head);
  check(head_dim() % 2 == 0, "the head dimension n_embd / n_head = {} / {} = {} must be even", n_embd, n_head,
        head_dim());
  if (arch == Arch::classic) return;
  check(n_embd >= kSmearChannels, "n_embd {} is too small for the modern architecture; at least {}", n_embd,
        kSmearChannels);
  check(!window_pattern.empty() && window_pattern.find_first_not_of("SsLl") == std::string::npos,
        "window_pattern '{}' must be one or more of the letters S (short) and L (long)", window_pattern);
}

Json GptConfig::to_json() const {
  Json object = Json::object();
  for (const IntKey& key : kIntKeys) object[key.name] = this->*key.member;
  if (arch == Arch::modern) object[kWindowKey] = window_pattern;
  return object;
}

GptConfig GptConfig::from_json(const Json& object, const std::string& source) {
  check(object.is_object(), "{}: the model configuration must be a JSON object", source);
  GptConfig config;
  std::vector<std::string> known = {kWindowKey};
  for (const IntKey& key : kIntKeys) {
    known.emplace_back(key.name);
    const auto it = object.find(key.name);
    check(it != object.end(), "{}: the model configuration lacks '{}'", source, key.name);
    check(it->is_number_integer(), "{}: '{}' must be an integer, not {}", source, key.name, it->dump());
    config.*key.member = it->get<int64_t>();
  }
  for (const auto& item : object.items()) {
    check(std::find(known.begin(), known.end(), item.key()) != known.end(),
          "{}: unknown model configuration key '{}'{}", source, item.key(), did_you_mean(item.key(), known));
  }
  if (const auto it = object.find(kWindowKey); it != object.end()) {
    check(it->is_string(), "{}: '{}' must be a string, not {}", source, kWindowKey, it->dump());
    config.arch = Arch::modern;
    config.window_pattern = it->get<std::string>();
  }
  try {
    config.validate();
  } catch (const Error& e) {
    fail("{}: {}", source, e.what());
  }
  return config;
}

ParamCounts count_params(const GptConfig& c) {
  const int64_t d = c.head_dim(), kv = c.n_kv_head * d, table = c.padded_vocab() * c.n_embd;
  ParamCounts n;
  n.wte = table;
  n.lm_head = table;
  // c_q and c_proj (C, C), c_k and c_v (G*D, C), c_fc and mlp.c_proj (4C, C).
  n.transformer_matrices = c.n_layer * c.n_embd * (2 * c.n_embd + 2 * kv + 8 * c.n_embd);
  if (c.arch == Arch::classic) return n;
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    if (!c.has_value_embedding(layer)) continue;
    n.value_embeds += c.padded_vocab() * kv;
    n.transformer_matrices += c.n_kv_head * kValueGateChannels;
  }
  n.scalars = 2 * c.n_layer + kSmearChannels + 2;
  return n;
}

double flops_per_token(const GptConfig& c) {
  double attention = 0;
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    attention +=
        12.0 * static_cast<double>(c.n_embd) * static_cast<double>(visible(c, layer, c.sequence_len));
  }
  return 6.0 * linear_weights(c) + attention;
}

double decode_flops_per_token(const GptConfig& c, int64_t context) {
  double attention = 0;
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    attention += 4.0 * static_cast<double>(c.n_embd) * static_cast<double>(visible(c, layer, context));
  }
  return 2.0 * linear_weights(c) + attention;
}

double prefill_flops(const GptConfig& c, int64_t tokens) {
  const auto n = static_cast<double>(tokens);
  double attention = 0;
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    const auto w = static_cast<double>(visible(c, layer, tokens));
    attention += 4.0 * static_cast<double>(c.n_embd) * (w * (w + 1) / 2 + (n - w) * w);
  }
  return 2.0 * linear_weights(c) * n + attention;
}

int64_t kv_bytes_per_token(const GptConfig& c, DType dtype) {
  return c.n_layer * 2 * c.n_kv_head * c.head_dim() * dtype_size(dtype);
}

int64_t kv_bytes_read(const GptConfig& c, int64_t context, DType dtype) {
  int64_t tokens = 0;
  for (int64_t layer = 0; layer < c.n_layer; ++layer) tokens += visible(c, layer, context);
  return 2 * c.n_kv_head * c.head_dim() * dtype_size(dtype) * tokens;
}

}  // namespace flexchat
