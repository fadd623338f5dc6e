#include "optim/budget.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace flexchat {
namespace {

constexpr int64_t kReferenceBatch = int64_t{1} << 19;
constexpr int64_t kReferenceDepth = 12;
constexpr double kClassicRatio = 20, kModernRatio = 12;
constexpr double kBatchExponent = 0.383;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The parameters that a modern budget counts: those every token is multiplied with.
double scaling_params(const GptConfig& config) {
  const ParamCounts n = count_params(config);
  return static_cast<double>(n.transformer_matrices + n.lm_head);
}

int64_t to_steps(double steps) {
  check(steps < 0x1p53, "the budget asks for {:.3g} steps; at most 2^53", steps);
  return static_cast<int64_t>(steps);
}

template <class T>
void check_positive(const std::optional<T>& value, std::string_view name) {
  if (!value) return;
  check(*value > 0 && std::isfinite(static_cast<double>(*value)), "--{} is {}; it must be above 0", name,
        *value);
}

}  // namespace

GptConfig config_for_depth(Arch arch, int64_t depth, int64_t sequence_len, int64_t vocab_size,
                           const DepthDial& dial) {
  check(depth >= 1 && depth <= 1024, "depth is {}; allowed: 1 to 1024", depth);
  check(dial.aspect_ratio >= 1 && dial.aspect_ratio <= 1024 && dial.head_dim >= 1 && dial.head_dim <= 1024,
        "aspect ratio {} and head dimension {}: allowed are 1 to 1024", dial.aspect_ratio, dial.head_dim);
  GptConfig config;
  config.arch = arch;
  config.sequence_len = sequence_len;
  config.vocab_size = vocab_size;
  config.n_layer = depth;
  if (arch == Arch::classic) {
    config.n_embd = 64 * depth;
    config.n_head = (config.n_embd + 127) / 128;
  } else {
    config.n_embd = round_up(dial.aspect_ratio * depth, dial.head_dim);
    config.n_head = config.n_embd / dial.head_dim;
  }
  config.n_kv_head = config.n_head;
  try {
    config.validate();
  } catch (const Error& e) {
    fail("no {} model of depth {}: {}", arch_name(arch), depth, e.what());
  }
  return config;
}

Budget make_budget(const GptConfig& config, const BudgetOptions& options, const DepthDial& dial) {
  check_positive(options.num_iterations, "num-iterations");
  check_positive(options.target_flops, "target-flops");
  check_positive(options.target_param_data_ratio, "target-param-data-ratio");
  check_positive(options.total_batch_size, "total-batch-size");
  const bool modern = config.arch == Arch::modern;
  const double ratio = options.target_param_data_ratio.value_or(modern ? kModernRatio : kClassicRatio);
  const double params = modern ? scaling_params(config) : static_cast<double>(count_params(config).total());
  const double tokens = modern ? std::floor(ratio * params) : ratio * params;

  Budget budget;
  budget.total_batch_size = options.total_batch_size.value_or(kReferenceBatch);
  if (modern) {
    check(tokens >= 1, "{} tokens per parameter is less than one token for this model", ratio);
    const GptConfig twelve =
        config_for_depth(Arch::modern, kReferenceDepth, config.sequence_len, config.vocab_size, dial);
    const double relative = tokens / (ratio * scaling_params(twelve));
    if (!options.total_batch_size) {
      const double ideal = static_cast<double>(kReferenceBatch) * std::pow(relative, kBatchExponent);
      const double exponent = std::clamp(std::nearbyint(std::log2(ideal)), 0.0, 62.0);
      budget.total_batch_size = int64_t{1} << static_cast<int>(exponent);
    }
    const double batch = static_cast<double>(budget.total_batch_size) / static_cast<double>(kReferenceBatch);
    budget.lr_factor = std::sqrt(batch);
    budget.weight_decay_factor = std::sqrt(batch) / relative;
  }

  const auto batch_tokens = static_cast<double>(budget.total_batch_size);
  if (options.num_iterations) {
    budget.horizon = "num_iterations";
    budget.num_iterations = *options.num_iterations;
  } else if (options.target_flops) {
    budget.horizon = "target_flops";
    budget.num_iterations =
        to_steps(std::nearbyint(*options.target_flops / (flops_per_token(config) * batch_tokens)));
  } else {
    budget.horizon = "target_param_data_ratio";
    budget.num_iterations = to_steps(std::floor(tokens / batch_tokens));
  }
  check(budget.num_iterations >= 1,
        "{} asks for less than one step of {} tokens; raise it, lower the total batch size, or set the "
        "number of "
        "iterations",
        budget.horizon, budget.total_batch_size);
  return budget;
}

int64_t grad_accum_steps(int64_t total_batch_size, int64_t device_batch_size, int64_t sequence_len,
                         int64_t world_size) {
  check(device_batch_size >= 1 && sequence_len >= 1 && world_size >= 1,
        "device batch size {}, sequence length {} and world size {} must be at least 1", device_batch_size,
        sequence_len, world_size);
  const int64_t micro = device_batch_size * sequence_len * world_size;
  check(total_batch_size >= micro && total_batch_size % micro == 0,
        "total batch size {} must be a multiple of device batch size * sequence length * world size = {} * "
        "{} * {} "
        "= {}",
        total_batch_size, device_batch_size, sequence_len, world_size, micro);
  return total_batch_size / micro;
}

}  // namespace flexchat
