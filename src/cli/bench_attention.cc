// flexchat bench attention: time and memory of attention, forward and backward, by shape, mod and kernel.
#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "backend/device_options.h"
#include "backend/jit_compiler.h"
#include "backend/timing.h"
#include "base/error.h"
#include "base/options.h"
#include "base/strings.h"
#include "cli/bench_model.h"
#include "cli/bench_output.h"
#include "cli/command.h"
#include "flex/mods.h"
#include "report/environment.h"
#include "report/table.h"

namespace flexchat {
namespace {

using flex::Axis;
using flex::Capture;

// "8x10x10x2048x128": batch, query heads, key heads, tokens, head dim; with a sixth number,
// "64x16x4x1x4096x128", queries and keys.
AttentionShape parse_shape(const std::string& text) {
  std::vector<int64_t> n;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, 'x');) {
    int64_t value = 0;
    const auto [rest, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    const bool whole = error == std::errc() && rest == word.data() + word.size();
    n.push_back(whole ? value : 0);
  }
  const bool positive = std::all_of(n.begin(), n.end(), [](int64_t x) { return x > 0; });
  check(positive && (n.size() == 5 || n.size() == 6),
        "--shapes: '{}' is not of the form BxHxGxTxD or BxHxGxTqxTkvxD", text);
  AttentionShape s;
  s.batch = n[0];
  s.n_head = n[1];
  s.n_kv_head = n[2];
  s.q_len = n[3];
  s.kv_len = n[n.size() - 2];
  s.head_dim = n.back();
  if (s.kv_len != s.q_len) s.q_offsets.assign(static_cast<size_t>(s.batch), s.kv_len - s.q_len);
  s.check();
  return s;
}

Tensor uniform(Backend& backend, Shape shape, DType dtype, double low, double high, uint64_t stream) {
  const Tensor wide = backend.empty(shape, backend.master_dtype());
  backend.draw({Distribution::uniform, low, high}, 1, stream, wide);
  if (dtype == wide.dtype()) return wide;
  const Tensor t = backend.empty(std::move(shape), dtype);
  backend.copy(wide, t);
  return t;
}

const std::vector<std::string>& mod_names() {
  static const std::vector<std::string> names = {"sdpa",  "flex",    "window",   "documents", "packed",
                                                 "alibi", "softcap", "synaptic", "none"};
  return names;
}

// All are causal, but "none"; "packed" has documents and a window.
AttentionSpec spec_of(const std::string& mod, const AttentionShape& s, Backend& backend) {
  AttentionSpec spec;
  spec.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  const auto v = flex::variables();
  if (mod == "none") return spec;
  if (mod == "flex" || mod == "window" || mod == "documents" || mod == "packed") {
    spec.mask = flex::causal();
    if (mod == "window" || mod == "packed") spec.mask = *spec.mask && flex::window(1024);
    if (mod == "documents" || mod == "packed") {
      const Tensor ids(host_arena(), {s.kv_len}, DType::i32);
      for (int64_t i = 0; i < s.kv_len; ++i)
        ids.set(i, static_cast<double>(i / std::max<int64_t>(s.kv_len / 8, 1)));
      spec.mask = *spec.mask && flex::document(Capture("doc", {Axis::pos}, flex::Type::integer));
      spec.bindings.set("doc", ids);
    }
    return spec;
  }
  spec.causal = true;
  if (mod == "alibi") {
    spec.score_mod = flex::alibi(Capture("slope", {Axis::h}));
    spec.bindings.set("slope", uniform(backend, {s.n_head}, DType::f32, 0.01, 0.5, 50));
  } else if (mod == "softcap") {
    spec.score_mod = flex::softcap(30);
  } else if (mod == "synaptic") {  // release probability and distance penalty of the Synaptic GPT
    const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}), amp("amp", {Axis::b, Axis::h, Axis::kv});
    const flex::Expr release = kf(v.b, v.h, v.kv) * flex::sigmoid(v.score) * amp(v.b, v.h, v.kv) / 1.01;
    spec.score_mod = v.score + flex::log(release + 1e-6) - 0.1 * flex::abs(v.q - v.kv) / v.n_kv;
    spec.bindings.set("kf", uniform(backend, {s.batch, s.n_head, s.kv_len}, DType::f32, 0.5, 1.5, 51));
    spec.bindings.set("amp", uniform(backend, {s.batch, s.n_head, s.kv_len}, DType::f32, 0.5, 1.5, 52));
  }
  return spec;
}

struct Row {
  std::string kernel, reason;
  double plan_ms = 0, forward_ms = 0, backward_ms = 0;
  double forward_flops = 0;  // products only; of the visible half where causal
  double mask_ms = 0;        // what building the forward's lists of blocks adds to it; 0: no mask
  double bytes = 0;          // q, k, v and out once
  double extra_mb = 0;       // memory above inputs and outputs
};

// Causal attention counts half of the square, as the field does; the other masks are timed but not counted.
double product_flops(const std::string& mod, const AttentionShape& s) {
  if (mod == "window" || mod == "documents" || mod == "packed") return 0;
  const auto q = static_cast<double>(s.q_len), kv = static_cast<double>(s.kv_len);
  const double visible = mod == "none" ? q * kv : q * (kv - q) + q * q / 2;
  return 4 * static_cast<double>(s.batch * s.n_head * s.head_dim) * visible;
}

// What one call reads and writes.
struct Operands {
  Tensor q, k, v, dout, out, dq, dk, dv, lse;

  Operands(Backend& backend, const AttentionShape& s, DType dtype) {
    const int64_t q_width = s.n_head * s.head_dim, kv_width = s.n_kv_head * s.head_dim;
    const auto random = [&](int64_t tokens, int64_t width, uint64_t stream) {
      return uniform(backend, {s.batch, tokens, width}, dtype, -1.7, 1.7, stream);
    };
    q = random(s.q_len, q_width, 1);
    k = random(s.kv_len, kv_width, 2);
    v = random(s.kv_len, kv_width, 3);
    dout = random(s.q_len, q_width, 4);
    out = backend.empty(q.shape(), dtype);
    dq = backend.empty(q.shape(), dtype);
    dk = backend.empty(k.shape(), dtype);
    dv = backend.empty(v.shape(), dtype);
    lse = backend.empty({s.batch, s.n_head, s.q_len}, backend.master_dtype());
    backend.synchronize();
  }
  // With `training` a backward may follow.
  AttentionTensors tensors(bool training) const {
    return {heads_view(q), heads_view(k), heads_view(v), heads_view(out), training ? &lse : nullptr, nullptr};
  }
  AttentionGradients gradients() const {
    return {heads_view(dout), nullptr, heads_view(dq), heads_view(dk), heads_view(dv), {}};
  }
};

// One mod at one shape, to be timed beside others: with results of its own, which its backward starts from.
struct Subject {
  AttentionSpec spec;
  std::shared_ptr<const AttentionPlan> plan;
  Tensor out, lse;
  AttentionTensors io;
  Row row;
};

// The mod's first run: compiles what it needs, and tells what ran and what memory it took.
Subject make_subject(Backend& backend, const AttentionShape& s, const std::string& mod,
                     const Operands& operands, const std::string& kernel, bool backward) {
  Subject x;
  x.spec = spec_of(mod, s, backend);
  x.out = backend.empty(operands.q.shape(), operands.q.dtype());
  x.lse = backend.empty(operands.lse.shape(), operands.lse.dtype());
  x.io = operands.tensors(false);
  x.io.out = heads_view(x.out);
  const size_t before = backend.arena().stats().in_use;
  backend.arena().reset_peak();
  x.plan = backend.plan_attention(s, x.spec, kernel);
  AttentionTensors io = x.io;
  if (backward) io.lse = &x.lse;
  backend.attention(*x.plan, io);
  if (backward) backend.attention_backward(*x.plan, io, operands.gradients());
  x.row.extra_mb = static_cast<double>(backend.arena().stats().peak - before) / 1e6;
  x.row.kernel = x.plan->kernel();
  x.row.reason = x.plan->reason();
  x.row.forward_flops = product_flops(mod, s);
  x.row.bytes = static_cast<double>(2 * operands.q.bytes() + operands.k.bytes() + operands.v.bytes());
  return x;
}

// A plan builds its lists of blocks when they are first needed: what that adds to a forward.
double time_lists(Backend& backend, const AttentionShape& s, Subject& x, const std::string& kernel,
                  int repeats) {
  const auto forward = [&](std::shared_ptr<const AttentionPlan> fresh, bool use_it) {
    if (use_it) x.plan = std::move(fresh);
    backend.synchronize();
    backend.attention(*x.plan, x.io);
  };
  const std::vector<double> seconds =
      median_seconds_in_turn(backend,
                             {[&] { forward(backend.plan_attention(s, x.spec, kernel), true); },
                              [&] { forward(backend.plan_attention(s, x.spec, kernel), false); }},
                             4 * repeats + 1, 0);
  return std::max(0.0, seconds[0] - seconds[1]);
}

// All mods at one shape, sampled in turn.
std::vector<Row> time_attention(Backend& backend, const AttentionShape& s,
                                const std::vector<std::string>& mods, DType dtype, const std::string& kernel,
                                bool backward, int repeats) {
  const Operands operands(backend, s, dtype);
  const AttentionGradients grads = operands.gradients();
  std::vector<Subject> subjects;
  for (const std::string& mod : mods)
    subjects.push_back(make_subject(backend, s, mod, operands, kernel, backward));

  std::vector<std::function<void()>> plans, forwards, backwards;
  for (Subject& x : subjects) {
    if (backward) x.io.lse = &x.lse;
    plans.emplace_back([&] { x.plan = backend.plan_attention(s, x.spec, kernel); });
    forwards.emplace_back([&] { backend.attention(*x.plan, x.io); });
    backwards.emplace_back([&] { backend.attention_backward(*x.plan, x.io, grads); });
  }
  const auto record = [&](const std::vector<std::function<void()>>& works, double Row::*to) {
    const std::vector<double> seconds = median_seconds_in_turn(backend, works, repeats);
    for (size_t i = 0; i < seconds.size(); ++i) subjects[i].row.*to = 1e3 * seconds[i];
  };
  record(plans, &Row::plan_ms);
  record(forwards, &Row::forward_ms);
  if (backward) record(backwards, &Row::backward_ms);

  std::vector<Row> rows;
  for (Subject& x : subjects) {
    if (x.spec.mask) x.row.mask_ms = 1e3 * time_lists(backend, s, x, kernel, repeats);
    rows.push_back(x.row);
  }
  return rows;
}

// ---- first use ------------------------------------------------------------------------------------------

// Causal with a window, and the score mod of the Synaptic GPT without its captured tensors. Every `form` is
// an expression that no cache has seen, for it has a factor of its own; that is a number for each head made
// of additions and the like, so that all forms cost the same to compile, and their factor little. `constants`
// change numbers and nothing else.
AttentionSpec fresh_spec(const AttentionShape& s, uint64_t form, int64_t constants) {
  const auto v = flex::variables();
  flex::Expr own = 1.0 * v.h;
  for (int digit = 0; digit < 12; ++digit, form /= 4) {
    own = form % 4 == 0   ? own + v.h
          : form % 4 == 1 ? v.n_q - own
          : form % 4 == 2 ? flex::abs(own - v.n_kv)
                          : flex::min(own, 1.0 * v.n_q) - v.h;
  }
  const double k = 0.1 + 1e-3 * static_cast<double>(constants);
  AttentionSpec spec;
  spec.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  spec.mask = flex::causal() && flex::window(512 + constants);
  spec.score_mod = v.score + flex::log(4 * k * flex::sigmoid(v.score) + 1e-6) -
                   k * flex::tanh(own) * flex::abs(v.q - v.kv) / v.n_kv;
  return spec;
}

struct FirstUse {
  double forward_ms = 0, training_ms = 0, constants_ms = 0;  // medians over expressions
  JitCounters from;
};

// From an expression to its first result on the device: a forward alone, forward and backward, and a forward
// of an expression that differs from one before in its constants.
FirstUse time_first_use(Backend& backend, const AttentionShape& s, DType dtype, const std::string& kernel,
                        uint64_t seed, int64_t expressions) {
  const Operands operands(backend, s, dtype);
  const auto once = [&](uint64_t form, bool training, int64_t constants) {
    wait_for_jit();  // what the last expression may need later is of no concern to this one
    const auto start = std::chrono::steady_clock::now();
    const auto plan = backend.plan_attention(s, fresh_spec(s, form, constants), kernel);
    backend.attention(*plan, operands.tensors(training));
    if (training) backend.attention_backward(*plan, operands.tensors(true), operands.gradients());
    backend.synchronize();
    return 1e3 * std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const auto median = [](std::vector<double> ms) {
    std::nth_element(ms.begin(), ms.begin() + static_cast<int64_t>(ms.size() / 2), ms.end());
    return ms[ms.size() / 2];
  };
  const JitCounters before = jit_counters();
  std::vector<double> forward, training, constants;
  for (int64_t i = 0; i < expressions; ++i) {
    const uint64_t form = seed + static_cast<uint64_t>(2 * i);
    forward.push_back(once(form, false, 0));
    constants.push_back(once(form, false, 1));
    training.push_back(once(form + 1, true, 0));
  }
  const JitCounters after = jit_counters();
  return {median(forward),
          median(training),
          median(constants),
          {after.compiles - before.compiles, after.disk_hits - before.disk_hits,
           after.embedded_hits - before.embedded_hits, after.memory_hits - before.memory_hits}};
}

struct AttentionBench {
  DeviceOptions compute;
  BenchOutput output;
  std::vector<std::string> shapes, mods = {"sdpa", "flex", "synaptic"};
  std::string kernel = "auto";
  int64_t repeats = 15, first_use = 0;
  std::optional<int64_t> first_use_seed;
  bool no_backward = false, model = false;
  AttentionModelBench whole;

  void declare(Options& o) {
    o.add("--shapes", &shapes,
          "BxHxGxTxD (G key heads), or BxHxGxTqxTkvxD (default: one that fits the device)");
    o.add("--mods", &mods,
          "of " + join(mod_names()) + "; sdpa: built-in causal, flex: the same as an expression");
    o.add("--kernel", &kernel, "attention kernel");
    o.add("--repeats", &repeats, "samples; the median counts").at_least(1);
    o.add("--no-backward", &no_backward, "forward only");
    o.add("--first-use", &first_use,
          "instead, time the first use of so many new expressions for each shape: from expression to result")
        .at_least(0);
    o.add("--first-use-seed", &first_use_seed,
          "which expressions; those of an earlier run are found in the cache on disk (default: new ones)")
        .at_least(0);
    o.add("--model", &model, "instead, the mods sdpa and flex in a whole model: forward, and with backward")
        .group("Whole model");
    whole.declare(o);
    compute.declare(o);
    output.declare(o);
  }

  int run_first_use(Backend& backend, Json summary) const;
};

int AttentionBench::run_first_use(Backend& backend, Json summary) const {
  const uint64_t seed = first_use_seed ? static_cast<uint64_t>(*first_use_seed) : std::random_device{}();
  Json rows = Json::array();
  Table table({"shape", "dtype", "forward ms", "training ms", "new constants ms", "compiled", "from disk"});
  for (const std::string& text : shapes) {
    const AttentionShape shape = parse_shape(text);
    check(shape.q_len == shape.kv_len, "--first-use trains as well: '{}' must have as many queries as keys",
          text);
    const FirstUse r = time_first_use(backend, shape, compute.compute_dtype(), kernel, seed, first_use);
    const std::string dtype(dtype_name(compute.compute_dtype()));
    table.row({text, dtype, fmt::format("{:.1f}", r.forward_ms), fmt::format("{:.1f}", r.training_ms),
               fmt::format("{:.1f}", r.constants_ms), fmt::format("{}", r.from.compiles),
               fmt::format("{}", r.from.disk_hits)});
    rows.push_back({{"shape", text},
                    {"dtype", dtype},
                    {"expressions", first_use},
                    {"first_forward_ms", r.forward_ms},
                    {"first_training_ms", r.training_ms},
                    {"new_constants_ms", r.constants_ms},
                    {"compiles", r.from.compiles},
                    {"disk_hits", r.from.disk_hits}});
  }
  summary["first_use_seed"] = seed;
  summary["rows"] = rows;
  return output.finish(summary, table);
}

}  // namespace

int bench_attention(const Words& words) {
  AttentionBench c;
  Options options("flexchat bench attention", "Time and memory of attention, forward and backward.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  for (const std::string& mod : c.mods) {
    check(std::find(mod_names().begin(), mod_names().end(), mod) != mod_names().end(),
          "--mods: unknown '{}'{}; allowed: {}", mod, did_you_mean(mod, mod_names()), join(mod_names()));
  }
  const auto backend = c.compute.open();
  if (c.shapes.empty()) c.shapes = {backend->arena().host() ? "1x8x8x1024x64" : "8x10x10x2048x128"};
  Json summary = {{"result", "done"},
                  {"repro", command_line()},
                  {"device", backend->name()},
                  {"options", options.to_json()}};
  if (c.first_use > 0) return c.run_first_use(*backend, std::move(summary));
  if (c.model) {
    const std::vector<std::string> paths =
        options.given("--mods") ? c.mods : std::vector<std::string>{"sdpa", "flex"};
    return c.whole.run(*backend, c.compute.compute_dtype(), paths, c.kernel, static_cast<int>(c.repeats),
                       std::move(summary), c.output);
  }
  Json rows = Json::array();
  Table table({"shape", "mod", "kernel", "plan ms", "mask ms", "forward ms", "TFLOP/s", "backward ms",
               "TFLOP/s", "extra MB"});
  for (const std::string& text : c.shapes) {
    const AttentionShape shape = parse_shape(text);
    const bool backward = !c.no_backward && shape.q_len == shape.kv_len;
    const std::vector<Row> timed = time_attention(*backend, shape, c.mods, c.compute.compute_dtype(),
                                                  c.kernel, backward, static_cast<int>(c.repeats));
    for (size_t i = 0; i < timed.size(); ++i) {
      const Row& r = timed[i];
      const std::string& mod = c.mods[i];
      const double forward = r.forward_flops / r.forward_ms / 1e9;
      const double back = backward ? 2.5 * r.forward_flops / r.backward_ms / 1e9 : 0;
      const auto number = [](double x, const char* format) {
        return x > 0 ? fmt::format(fmt::runtime(format), x) : std::string("-");
      };
      table.row({text, mod, r.kernel, number(r.plan_ms, "{:.3f}"), number(r.mask_ms, "{:.3f}"),
                 number(r.forward_ms, "{:.3f}"), number(forward, "{:.3g}"), number(r.backward_ms, "{:.3f}"),
                 number(back, "{:.3g}"), number(r.extra_mb, "{:.1f}")});
      rows.push_back({{"shape", text},
                      {"mod", mod},
                      {"kernel", r.kernel},
                      {"reason", r.reason},
                      {"plan_ms", r.plan_ms},
                      {"mask_ms", r.mask_ms},
                      {"forward_ms", r.forward_ms},
                      {"forward_tflops", forward},
                      {"forward_tb_s", r.bytes / r.forward_ms / 1e9},
                      {"backward_ms", backward ? Json(r.backward_ms) : Json(nullptr)},
                      {"backward_tflops", backward ? Json(back) : Json(nullptr)},
                      {"extra_mb", r.extra_mb}});
    }
  }
  summary["rows"] = rows;
  return c.output.finish(summary, table);
}

}  // namespace flexchat
