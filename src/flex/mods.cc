// Named mods.
#include "flex/mods.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace flexchat::flex {
namespace {

struct NamedMod {
  const char* name;
  size_t n_args;
  Expr (*build)(const std::vector<Expr>& args);
};

using Args = std::vector<Expr>;
const std::array<NamedMod, 4> named_mods = {{
    {"causal", 0, [](const Args&) { return causal(); }},
    {"window", 1, [](const Args& args) { return window(args[0]); }},
    {"sink", 1, [](const Args& args) { return sink(args[0]); }},
    {"softcap", 1, [](const Args& args) { return softcap(args[0]); }},
}};

const NamedMod* find(std::string_view name) {
  const auto* const found = std::find_if(named_mods.begin(), named_mods.end(),
                                         [&](const NamedMod& mod) { return name == mod.name; });
  return found == named_mods.end() ? nullptr : found;
}

// Tensors of positions may have a batch axis or be shared by all rows.
Expr at_position(const Capture& capture, const Expr& position) {
  return capture.axes().size() == 1 ? capture(position) : capture(variables().b, position);
}

}  // namespace

Expr causal() {
  const Variables v = variables();
  return v.kv <= v.q;
}

Expr window(const Expr& w) {
  const Variables v = variables();
  return v.q - v.kv < w;
}

Expr sink(const Expr& n) { return variables().kv < n; }

Expr document(const Capture& ids) {
  const Variables v = variables();
  return at_position(ids, v.q) == at_position(ids, v.kv);
}

Expr prefix_lm(const Capture& length) {
  const Variables v = variables();
  return v.kv <= v.q || v.kv < length(v.b);
}

Expr padding(const Capture& length) {
  const Variables v = variables();
  return v.kv < length(v.b);
}

Expr alibi(const Capture& slope, const Expr& score) {
  const Variables v = variables();
  return score - slope(v.h) * (v.q - v.kv);
}

Expr softcap(const Expr& cap, const Expr& score) { return cap * tanh(score / cap); }

Expr relative_position(const Capture& table, int64_t max_distance, const Expr& score) {
  check(max_distance >= 0, "max_distance {} must be at least 0", max_distance);
  const Variables v = variables();
  return score + table(v.h, max(min(v.q - v.kv, max_distance), -max_distance) + max_distance);
}

bool is_named_mod(std::string_view name) { return find(name) != nullptr; }

std::vector<std::string> named_mod_names() {
  std::vector<std::string> names;
  for (const NamedMod& mod : named_mods) names.emplace_back(mod.name);
  return names;
}

Expr make_named_mod(std::string_view name, const std::vector<Expr>& args) {
  const NamedMod* const mod = find(name);
  check(mod != nullptr, "there is no mod named '{}'", name);
  check(args.size() == mod->n_args, "'{}' takes {} argument{}, not {}", name, mod->n_args,
        mod->n_args == 1 ? "" : "s", args.size());
  return mod->build(args);
}

}  // namespace flexchat::flex
