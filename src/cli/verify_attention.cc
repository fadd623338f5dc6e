// flexchat verify attention: the certificate, or any expression against double.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "backend/attention_support.h"
#include "backend/device_options.h"
#include "base/error.h"
#include "base/options.h"
#include "base/progress.h"
#include "checkpoint/safetensors.h"
#include "cli/command.h"
#include "flex/parse.h"
#include "flex/tensor_text.h"
#include "report/devices.h"
#include "report/environment.h"
#include "report/run_folder.h"
#include "verify/attention_suite.h"

namespace flexchat {
namespace {

struct VerifyAttention {
  DeviceOptions compute;
  bool suite = false;
  std::optional<std::string> mask, score_mod;
  std::vector<std::string> tensors, differentiable;
  int64_t batch = 2, n_head = 4, n_kv_head = 2, q_len = 70, head_dim = 64;
  std::optional<int64_t> kv_len;
  int64_t q_offset = 0, random = 0, forms = 0, seed = 1, repeats = 20;
  std::string kernel = "all", run_id, runs = "runs";
  std::optional<std::string> save;
  bool json = false;

  void declare(Options& o) {
    o.add("--suite", &suite, "every case of the certificate; the default unless a mod is given");
    o.add("--mask", &mask, "check this mask, e.g. \"causal && window(256)\"").group("Your own mod");
    o.add("--score-mod", &score_mod, "check this score mod, e.g. \"score - slope[h]*(q - kv)\"")
        .group("Your own mod");
    o.add("--tensor", &tensors, "a captured tensor, e.g. \"slope[h]=0.5,0.25,0.1,0.05\"; may repeat")
        .group("Your own mod");
    o.add("--differentiable", &differentiable, "names of captured tensors whose gradients are checked too")
        .group("Your own mod");
    const auto size = [&](const char* name, Option::Target target, const char* help, int64_t least) {
      o.add(name, target, help).at_least(static_cast<double>(least)).at_most(4096).group("Your own mod");
    };
    size("--batch", &batch, "batch rows", 1);
    size("--n-head", &n_head, "query heads", 1);
    size("--n-kv-head", &n_kv_head, "key heads", 1);
    size("--q-len", &q_len, "queries", 0);
    size("--kv-len", &kv_len, "keys (default: as far as the queries reach)", 0);
    size("--q-offset", &q_offset, "position of the first query", 0);
    size("--head-dim", &head_dim, "channels of a head", 1);
    o.add("--save", &save, "only write q, k, v, dout and out, dq, dk, dv to this .safetensors file")
        .group("Your own mod")
        .not_recorded();
    o.add("--random", &random, "random cases on top").at_least(0).group("Random cases");
    o.add("--forms", &forms, "share so many expressions and head dims, and so kernels; 0: each has its own")
        .at_least(0)
        .group("Random cases");
    o.add("--seed", &seed, "of the first random case, and of the tensors of your own mod")
        .at_least(0)
        .group("Random cases");
    o.add("--repeats", &repeats, "backwards that must give the same bits").at_least(2);
    o.add("--kernel", &kernel, "attention kernel, or all that can run here");
    compute.declare(o);
    o.add("--run-id", &run_id, "name of the run folder (default: time and a random word)");
    o.add("--runs", &runs, "folder that holds run folders").not_recorded();
    o.add("--json", &json, "print the summary as JSON instead of the table").not_recorded();
  }

  // The one that was named, or all that can run here.
  std::vector<std::string> kernels_on(Backend& backend, DType dtype) const {
    if (kernel != "all") {
      const AttentionShape one{
          .batch = 1, .q_len = 1, .kv_len = 1, .n_head = 1, .n_kv_head = 1, .head_dim = 64};
      return {std::string(backend.plan_attention(one, {}, kernel)->kernel())};
    }
    std::vector<std::string> kernels;
    for (std::string& name : backend.attention_kernels()) {
      const AttentionSupport& can = attention_support(name);
      if (can.takes(dtype) && runs_here(can)) kernels.push_back(std::move(name));
    }
    return kernels;
  }

  std::vector<AttentionCase> own_cases() const {
    AttentionShape shape;
    shape.batch = batch;
    shape.n_head = n_head;
    shape.n_kv_head = n_kv_head;
    shape.q_len = q_len;
    shape.kv_len = kv_len.value_or(q_offset + q_len);
    shape.head_dim = head_dim;
    if (q_offset > 0) shape.q_offsets.assign(static_cast<size_t>(batch), q_offset);
    shape.check();
    AttentionSpec spec;
    std::vector<flex::Capture> captures;
    for (const std::string& text : tensors) {
      const flex::Capture c = flex::bind_tensor_text(text, shape.extent(), spec.bindings);
      const bool wanted =
          std::find(differentiable.begin(), differentiable.end(), c.name()) != differentiable.end();
      captures.emplace_back(c.name(), c.axes(), c.type(), wanted);
    }
    try {
      if (mask) spec.mask = flex::parse_mask(*mask, captures);
      if (score_mod) spec.score_mod = flex::parse_score_mod(*score_mod, captures);
    } catch (const flex::ParseError& e) {
      fail("{}", e.what());
    }
    return attention_cases_of(spec, shape);
  }
};

// For comparisons with other systems on the very same numbers: (B, T, heads * D) each.
void save_results(const AttentionCase& c, Backend& backend, DType dtype, const std::string& kernel,
                  const std::string& file) {
  const AttentionResults r = run_attention(c, backend, dtype, kernel);
  write_safetensors(file,
                    {{"q", r.q},
                     {"k", r.k},
                     {"v", r.v},
                     {"dout", r.dout},
                     {"out", r.out},
                     {"dq", r.dq},
                     {"dk", r.dk},
                     {"dv", r.dv}},
                    {});
}

void print_result(const std::vector<Check>& checks, bool own) {
  // A long table hides what matters: of the certificate, the worst of each measure per case would still be
  // hundreds of lines, so passing checks are shown only when there are few.
  std::vector<Check> shown;
  for (const Check& c : checks) {
    if (own || checks.size() <= 80 || !c.pass) shown.push_back(c);
  }
  if (!shown.empty()) fmt::print("{}", checks_table(shown));
}

}  // namespace

int verify_attention_command(const Words& words) {
  VerifyAttention c;
  Options options(
      "flexchat verify attention",
      "Check programmable attention against double: every feature, forward and backward, or your own mod.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  const bool own = c.mask || c.score_mod;
  const auto backend = c.compute.open();
  const DType dtype = c.compute.compute_dtype();
  const std::vector<std::string> kernels = c.kernels_on(*backend, dtype);

  std::vector<AttentionCase> cases;
  if (own) cases = c.own_cases();
  for (AttentionCase& one : cases) one.seed = static_cast<uint64_t>(c.seed);
  if (own && c.kernel != "all") check_attention_support(kernels[0], cases[0].shape, cases[0].spec);
  if (c.suite || !own) {
    const std::vector<AttentionCase> suite = attention_suite();
    cases.insert(cases.end(), suite.begin(), suite.end());
  }
  for (int64_t i = 0; i < c.random; ++i)
    cases.push_back(random_attention_case(static_cast<uint64_t>(c.seed + i), static_cast<uint64_t>(c.forms)));

  check(!c.save || own, "--save needs --mask or --score-mod");
  if (c.save) {
    save_results(cases[0], *backend, dtype, kernels[0], *c.save);
    return 0;
  }
  std::vector<Check> checks;
  Progress progress("verify", static_cast<int64_t>(cases.size() * kernels.size()), "cases");
  int64_t done = 0;
  Json beyond = Json::object();  // cases that a kernel does not do, by its name
  for (const std::string& kernel : kernels) {
    const AttentionSupport& can = attention_support(kernel);
    beyond[kernel] = 0;
    for (const AttentionCase& one : cases) {
      progress.update(++done);
      if (!does_case(can, one)) {
        beyond[kernel] = beyond[kernel].get<int64_t>() + 1;
        continue;
      }
      for (Check k : check_attention(one, *backend, dtype, kernel)) {
        if (kernels.size() > 1) k.name = kernel + ": " + k.name;
        checks.push_back(std::move(k));
      }
    }
    if (own && !c.suite) continue;
    if (can.pages) checks.push_back(check_pages_bit_for_bit(*backend, dtype, kernel));
    if (can.deterministic)
      checks.push_back(check_backward_repeats(*backend, dtype, kernel, static_cast<int>(c.repeats)));
  }
  if (c.suite || !own) {
    for (Check k : check_models(*backend, dtype)) checks.push_back(std::move(k));
  }
  progress.finish();

  const bool pass = all_pass(checks);
  int64_t failed = 0;
  for (const Check& k : checks) failed += k.pass ? 0 : 1;
  const RunFolder run = RunFolder::create("verify", c.run_id, RunMode::fresh, c.runs);
  Json summary = {{"result", pass ? "pass" : "fail"},
                  {"repro", command_line()},
                  {"device", backend->name()},
                  {"kernels", kernels},
                  {"cases", cases.size()},
                  {"cases_beyond_the_kernel", beyond},
                  {"checks_run", checks.size()},
                  {"checks_failed", failed},
                  {"options", options.to_json()},
                  {"checks", checks_to_json(checks)}};
  run.write_summary(summary);
  if (c.json) {
    summary["run"] = run.path().string();
    fmt::print("{}\n", summary.dump(2));
  } else {
    print_result(checks, own);
    for (const auto& [kernel, count] : beyond.items()) {
      if (count > 0) fmt::print("{} does not do {} of the cases (flexchat info)\n", kernel, count.dump());
    }
    fmt::print("{} checks of {} cases, {} failed; run folder {}\n", checks.size(), cases.size(), failed,
               run.path().string());
  }
  return pass ? 0 : 1;
}

}  // namespace flexchat
