// The one list of operators, variables and axes.
#include "flex/language.h"

#include <algorithm>
#include <array>

namespace flexchat::flex {
namespace {

struct OpInfo {
  Op op;
  const char* name;
  size_t arity;
  int precedence;
  enum Form { leaf, infix, prefix, function } form;
};

// In the order of enum Op.
constexpr std::array ops = {
    OpInfo{Op::constant, "constant", 0, primary_precedence, OpInfo::leaf},
    OpInfo{Op::variable, "variable", 0, primary_precedence, OpInfo::leaf},
    OpInfo{Op::capture, "capture", 0, primary_precedence, OpInfo::leaf},
    OpInfo{Op::add, "+", 2, 4, OpInfo::infix},
    OpInfo{Op::sub, "-", 2, 4, OpInfo::infix},
    OpInfo{Op::mul, "*", 2, 5, OpInfo::infix},
    OpInfo{Op::div, "/", 2, 5, OpInfo::infix},
    OpInfo{Op::floor_div, "//", 2, 5, OpInfo::infix},
    OpInfo{Op::mod, "%", 2, 5, OpInfo::infix},
    OpInfo{Op::neg, "-", 1, unary_precedence, OpInfo::prefix},
    OpInfo{Op::lt, "<", 2, 3, OpInfo::infix},
    OpInfo{Op::le, "<=", 2, 3, OpInfo::infix},
    OpInfo{Op::eq, "==", 2, 3, OpInfo::infix},
    OpInfo{Op::ne, "!=", 2, 3, OpInfo::infix},
    OpInfo{Op::logical_and, "&&", 2, 2, OpInfo::infix},
    OpInfo{Op::logical_or, "||", 2, 1, OpInfo::infix},
    OpInfo{Op::logical_not, "!", 1, unary_precedence, OpInfo::prefix},
    OpInfo{Op::min, "min", 2, primary_precedence, OpInfo::function},
    OpInfo{Op::max, "max", 2, primary_precedence, OpInfo::function},
    OpInfo{Op::abs, "abs", 1, primary_precedence, OpInfo::function},
    OpInfo{Op::where, "where", 3, primary_precedence, OpInfo::function},
    OpInfo{Op::exp, "exp", 1, primary_precedence, OpInfo::function},
    OpInfo{Op::log, "log", 1, primary_precedence, OpInfo::function},
    OpInfo{Op::tanh, "tanh", 1, primary_precedence, OpInfo::function},
    OpInfo{Op::sigmoid, "sigmoid", 1, primary_precedence, OpInfo::function},
    OpInfo{Op::softplus, "softplus", 1, primary_precedence, OpInfo::function},
    OpInfo{Op::pow, "pow", 2, primary_precedence, OpInfo::function},
    OpInfo{Op::sqrt, "sqrt", 1, primary_precedence, OpInfo::function},
};

constexpr bool in_enum_order() {
  for (size_t i = 0; i < ops.size(); ++i) {
    if (static_cast<size_t>(ops[i].op) != i) return false;
  }
  return true;
}
static_assert(in_enum_order() && ops.size() == static_cast<size_t>(Op::sqrt) + 1);

constexpr std::array<const char*, n_vars> vars = {"score", "b", "h", "q", "kv", "n_q", "n_kv"};
constexpr std::array axes = {"b", "h", "q", "kv", "pos", "any"};
constexpr std::array literals = {"true", "false", "inf"};

const OpInfo& info(Op op) { return ops[static_cast<size_t>(op)]; }

std::optional<Op> find(std::string_view name, OpInfo::Form form) {
  for (const OpInfo& o : ops) {
    if (o.form == form && name == o.name) return o.op;
  }
  return std::nullopt;
}

template <class Enum, size_t n>
std::optional<Enum> find(std::string_view name, const std::array<const char*, n>& names) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) return std::nullopt;
  return static_cast<Enum>(found - names.begin());
}

}  // namespace

const char* type_name(Type type) {
  constexpr std::array names = {"boolean", "integer", "number"};
  return names[static_cast<size_t>(type)];
}
const char* var_name(Var var) { return vars[static_cast<size_t>(var)]; }
const char* axis_name(Axis axis) { return axes[static_cast<size_t>(axis)]; }
const char* op_name(Op op) { return info(op).name; }

size_t op_arity(Op op) { return info(op).arity; }
bool is_infix(Op op) { return info(op).form == OpInfo::infix; }
int op_precedence(Op op) { return info(op).precedence; }

std::optional<Op> find_infix(std::string_view symbol) { return find(symbol, OpInfo::infix); }
std::optional<Op> find_function(std::string_view name) { return find(name, OpInfo::function); }
std::optional<Var> find_variable(std::string_view name) { return find<Var>(name, vars); }
std::optional<Axis> find_axis(std::string_view name) { return find<Axis>(name, axes); }

std::vector<std::string> function_names() {
  std::vector<std::string> names;
  for (const OpInfo& o : ops) {
    if (o.form == OpInfo::function) names.emplace_back(o.name);
  }
  return names;
}

std::vector<std::string> variable_names() { return {vars.begin(), vars.end()}; }

bool is_reserved(std::string_view name) {
  return find_variable(name) || find_function(name) ||
         std::find(literals.begin(), literals.end(), name) != literals.end();
}

}  // namespace flexchat::flex
