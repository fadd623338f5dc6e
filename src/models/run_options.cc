#include "models/run_options.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

Option& in_group(Option& option, const char* group) { return group ? option.group(group) : option; }

const char* path_name(AttentionPath path) { return path == AttentionPath::sdpa ? "sdpa" : "flex"; }

// What `say` tells about the model's plans, each once.
template <class Say>
std::string of_plans(const Gpt& model, const Say& say) {
  std::vector<std::string> said;
  for (const AttentionPlanPtr& plan : model.attention_plans()) {
    std::string text(say(*plan));
    if (std::find(said.begin(), said.end(), text) == said.end()) said.push_back(std::move(text));
  }
  return join(said, "; ");
}

}  // namespace

void AttentionOptions::declare(Options& o, const char* group) {
  in_group(o.add("--attention", &attention,
                 "sdpa (built-in causal mask), flex (the same mask as an expression), a kernel (auto, cpu, "
                 "cuda_mma, cudnn, reference), or both as in flex:cpu"),
           group);
}

void AttentionOptions::apply(Gpt& model) const {
  std::vector<std::string> kernels = model.backend().attention_kernels();
  kernels.insert(kernels.begin(), "auto");
  const size_t colon = attention.find(':');
  const std::string first = attention.substr(0, colon);
  const bool path_given = first == "sdpa" || first == "flex";
  const std::string kernel = colon != std::string::npos ? attention.substr(colon + 1)
                             : path_given               ? "auto"
                                                        : first;
  const bool known = std::find(kernels.begin(), kernels.end(), kernel) != kernels.end();
  if (!known || (colon != std::string::npos && !path_given)) {
    std::vector<std::string> words = {"sdpa", "flex"};
    words.insert(words.end(), kernels.begin(), kernels.end());
    fail("--attention: unknown '{}'{}; allowed on {}: {}, or both as in flex:{}", attention,
         did_you_mean(attention, words), model.backend().name(), join(words), kernels.back());
  }
  model.set_attention(first == "flex" ? AttentionPath::flex : AttentionPath::sdpa, kernel);
}

void HeadLossOptions::declare(Options& o, const char* group) {
  in_group(
      o.add("--loss", &loss,
            "how logits are kept from filling the memory: full (= current), chunked (= liger), cce; auto: "
            "what fits --loss-memory"),
      group)
      .choices({"auto", "full", "current", "chunked", "liger", "cce"});
  in_group(o.add("--loss-memory", &loss_memory, "bytes of temporary memory of the loss; 0: its own choice"),
           group)
      .at_least(0);
}

void HeadLossOptions::apply(Gpt& model) const {
  model.set_loss({.backend = parse_loss_backend(loss), .memory_budget = loss_memory});
}

Json attention_record(const Gpt& model) {
  return {{"path", path_name(model.attention_path())},
          {"kernel", of_plans(model, [](const AttentionPlan& plan) { return plan.kernel(); })},
          {"reason", of_plans(model, [](const AttentionPlan& plan) { return plan.reason(); })}};
}

std::string attention_line(const Gpt& model) {
  return fmt::format("{} by {}", path_name(model.attention_path()),
                     of_plans(model, [](const AttentionPlan& plan) {
                       return fmt::format("{} ({})", plan.kernel(), plan.reason());
                     }));
}

Json loss_record(const LossPlan& plan) {
  return {{"backend", loss_backend_name(plan.backend)},
          {"reason", plan.reason},
          {"panel_rows", plan.rows},
          {"panel_columns", plan.columns},
          {"one_pass", plan.one_pass},
          {"fused", plan.fused},
          {"memory_bytes", plan.bytes}};
}

std::string loss_line(const LossPlan& plan) {
  return fmt::format("{}, {} of logits ({} x {}) at a time ({})", loss_backend_name(plan.backend),
                     format_bytes(static_cast<double>(plan.bytes)), plan.rows, plan.columns, plan.reason);
}

}  // namespace flexchat
