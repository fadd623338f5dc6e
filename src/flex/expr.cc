// Building expressions: type checks, folding, simplification and the pool of live nodes.
#include "flex/expr.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <mutex>
#include <unordered_set>

#include "base/error.h"
#include "base/strings.h"
#include "flex/language.h"

namespace flexchat::flex {
namespace {

constexpr double max_integer = 2147483647;  // kernels hold integers in 32 bits
constexpr int max_depth = 2000;             // keeps every recursion over a graph within an ordinary stack

bool same_node(const Node& x, const Node& y) {
  if (x.hash != y.hash || x.op != y.op || x.type != y.type || x.args.size() != y.args.size()) return false;
  if (x.var != y.var || std::bit_cast<uint64_t>(x.value) != std::bit_cast<uint64_t>(y.value)) return false;
  if ((x.capture == nullptr) != (y.capture == nullptr)) return false;
  if (x.capture && !(*x.capture == *y.capture)) return false;
  return std::equal(x.args.begin(), x.args.end(), y.args.begin(),
                    [](const Expr& a, const Expr& b) { return same(a, b); });
}

struct HashNode {
  size_t operator()(const std::shared_ptr<const Node>& node) const { return node->hash; }
};
struct SameNode {
  bool operator()(const std::shared_ptr<const Node>& x, const std::shared_ptr<const Node>& y) const {
    return same_node(*x, *y);
  }
};

// Every node ever made, one of each kind. Nodes are small and expressions few, so they live as long as the
// program: nothing is released under the lock, or ever.
struct Pool {
  std::mutex mutex;
  std::unordered_set<std::shared_ptr<const Node>, HashNode, SameNode> nodes;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: expressions with static lifetime outlive it
  return *instance;
}

size_t hash_of(const Node& node) {
  uint64_t h = 0x9E3779B97F4A7C15u;
  const auto mix = [&h](uint64_t x) {
    h = (h ^ x) * 0xBF58476D1CE4E5B9u;
    h ^= h >> 29;
  };
  mix(static_cast<uint64_t>(node.op) << 16 | static_cast<uint64_t>(node.type) << 8 |
      static_cast<uint64_t>(node.var));
  mix(std::bit_cast<uint64_t>(node.value));
  if (node.capture) mix(std::hash<std::string>{}(node.capture->name()));
  for (const Expr& arg : node.args) mix(reinterpret_cast<uintptr_t>(&arg.node()));
  return static_cast<size_t>(h);
}

}  // namespace

Expr make_node(Node node) {
  for (const Expr& arg : node.args) {
    node.vars |= arg.node().vars;
    node.depth = std::max(node.depth, arg.node().depth + 1);
  }
  if (node.op == Op::variable) node.vars = 1u << static_cast<int>(node.var);
  check(node.depth <= max_depth, "the expression is nested more than {} levels deep", max_depth);
  node.hash = hash_of(node);

  const auto fresh = std::make_shared<const Node>(std::move(node));
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  return Expr(*p.nodes.insert(fresh).first);
}

namespace {

Expr constant_node(Type type, double value) {
  return make_node(Node{.op = Op::constant, .type = type, .value = value, .capture = {}, .args = {}});
}

bool is_numeric(Type type) { return type != Type::boolean; }

const char* with_article(Type type) {
  return type == Type::integer ? "an integer" : type == Type::number ? "a number" : "a boolean";
}

// The operand's place in words: "left side" for infix operators, "argument 2" for functions.
std::string place(Op op, size_t i, size_t n) {
  if (!is_infix(op)) return n == 1 ? "operand" : fmt::format("argument {}", i + 1);
  return i == 0 ? "left side" : "right side";
}

void need(Op op, const std::vector<Expr>& args, size_t i, bool ok, const char* wanted) {
  if (ok) return;  // text is made for failures only: operands may be large
  fail("'{}' needs {}, but its {} `{}` is {}", op_name(op), wanted, place(op, i, args.size()),
       to_text(args[i]), with_article(args[i].type()));
}

// The type of op(args), after checking each operand.
Type result_type(Op op, const std::vector<Expr>& args) {
  const size_t arity = op_arity(op);
  check(args.size() == arity, "'{}' takes {} argument{}, not {}", op_name(op), arity, arity == 1 ? "" : "s",
        args.size());
  const auto promote = [&](size_t i, size_t j) {
    return args[i].type() == Type::integer && args[j].type() == Type::integer ? Type::integer : Type::number;
  };
  const auto all_numeric = [&] {
    for (size_t i = 0; i < arity; ++i) need(op, args, i, is_numeric(args[i].type()), "numbers");
  };
  switch (op) {
    case Op::add:
    case Op::sub:
    case Op::mul:
    case Op::min:
    case Op::max:
      all_numeric();
      return promote(0, 1);
    case Op::neg:
    case Op::abs:
      all_numeric();
      return args[0].type();
    case Op::floor_div:
    case Op::mod:
      for (size_t i = 0; i < 2; ++i) need(op, args, i, args[i].type() == Type::integer, "integers");
      check(!args[1].is_constant(0), "'{}' divides by zero", op_name(op));
      return Type::integer;
    case Op::lt:
    case Op::le:
    case Op::eq:
    case Op::ne:
      all_numeric();
      return Type::boolean;
    case Op::logical_and:
    case Op::logical_or:
    case Op::logical_not:
      for (size_t i = 0; i < arity; ++i) need(op, args, i, args[i].type() == Type::boolean, "booleans");
      return Type::boolean;
    case Op::where:
      need(op, args, 0, args[0].type() == Type::boolean, "a boolean condition");
      if (args[1].type() == Type::boolean && args[2].type() == Type::boolean) return Type::boolean;
      for (size_t i = 1; i < 3; ++i) {
        need(op, args, i, is_numeric(args[i].type()), "two numbers or two booleans to choose from");
      }
      return promote(1, 2);
    default:
      all_numeric();
      return Type::number;
  }
}

// An equal expression that needs no new node, or nothing. x == x and the like hold for integers only: a
// number may be NaN.
const Expr* operand_that_remains(Op op, Type type, const std::vector<Expr>& args) {
  const auto keep = [&](size_t i) { return args[i].type() == type ? &args[i] : nullptr; };
  switch (op) {
    case Op::add:
      if (args[0].is_constant(0)) return keep(1);
      return args[1].is_constant(0) ? keep(0) : nullptr;
    case Op::sub:
      return args[1].is_constant(0) ? keep(0) : nullptr;
    case Op::mul:
      if (args[0].is_constant(1)) return keep(1);
      return args[1].is_constant(1) ? keep(0) : nullptr;
    case Op::div:
    case Op::floor_div:
    case Op::pow:
      return args[1].is_constant(1) ? keep(0) : nullptr;
    case Op::neg:
    case Op::logical_not:
      return args[0].node().op == op ? &args[0].node().args[0] : nullptr;
    case Op::logical_and:
      if (args[0].is_constant()) return &args[args[0].is_constant(1) ? 1 : 0];
      if (args[1].is_constant()) return &args[args[1].is_constant(1) ? 0 : 1];
      return same(args[0], args[1]) ? &args[0] : nullptr;
    case Op::logical_or:
      if (args[0].is_constant()) return &args[args[0].is_constant(0) ? 1 : 0];
      if (args[1].is_constant()) return &args[args[1].is_constant(0) ? 0 : 1];
      return same(args[0], args[1]) ? &args[0] : nullptr;
    case Op::min:
    case Op::max:
      return same(args[0], args[1]) ? &args[0] : nullptr;
    case Op::where:
      if (args[0].is_constant()) return keep(args[0].is_constant(1) ? 1 : 2);
      return same(args[1], args[2]) ? &args[1] : nullptr;
    default:
      return nullptr;
  }
}

// x - x, x * 0, x == x ... of integers.
const double* value_of_equal_integers(Op op, const std::vector<Expr>& args) {
  static constexpr double zero = 0, one = 1;
  if (args.size() != 2 || args[0].type() != Type::integer || args[1].type() != Type::integer) return nullptr;
  if (op == Op::mul) return args[0].is_constant(0) || args[1].is_constant(0) ? &zero : nullptr;
  if (!same(args[0], args[1])) return nullptr;
  switch (op) {
    case Op::sub:
    case Op::lt:
    case Op::ne:
      return &zero;
    case Op::le:
    case Op::eq:
      return &one;
    default:
      return nullptr;
  }
}

}  // namespace

Expr make(Op op, std::vector<Expr> args) {
  const Type type = result_type(op, args);
  if (std::all_of(args.begin(), args.end(), [](const Expr& arg) { return arg.is_constant(); })) {
    const auto value = [&](size_t i) { return i < args.size() ? args[i].node().value : 0; };
    const double folded = apply_op(op, value(0), value(1), value(2));
    const bool fits = type == Type::integer ? std::abs(folded) <= max_integer : !std::isnan(folded);
    if (fits)
      return constant_node(type,
                           type == Type::integer ? folded + 0.0 : folded);  // + 0.0: integers have no -0
  }
  if (const Expr* remains = operand_that_remains(op, type, args)) return *remains;
  if (const double* value = value_of_equal_integers(op, args)) return constant_node(type, *value);
  return make_node(Node{.op = op, .type = type, .capture = {}, .args = std::move(args)});
}

double apply_op(Op op, double a, double b, double c) {
  switch (op) {
    case Op::add:
      return a + b;
    case Op::sub:
      return a - b;
    case Op::mul:
      return a * b;
    case Op::div:
      return a / b;
    case Op::floor_div:
      return b == 0 ? 0 : std::floor(a / b);
    case Op::mod:
      return b == 0 ? a : a - b * std::floor(a / b);
    case Op::neg:
      return -a;
    case Op::lt:
      return a < b;
    case Op::le:
      return a <= b;
    case Op::eq:
      return a == b;
    case Op::ne:
      return a != b;
    case Op::logical_and:
      return a != 0 && b != 0;
    case Op::logical_or:
      return a != 0 || b != 0;
    case Op::logical_not:
      return a == 0;
    case Op::min:
      return std::fmin(a, b);
    case Op::max:
      return std::fmax(a, b);
    case Op::abs:
      return std::abs(a);
    case Op::where:
      return a != 0 ? b : c;
    case Op::exp:
      return std::exp(a);
    case Op::log:
      return std::log(a);
    case Op::tanh:
      return std::tanh(a);
    case Op::sigmoid:
      return a >= 0 ? 1 / (1 + std::exp(-a)) : std::exp(a) / (1 + std::exp(a));
    case Op::softplus:
      return std::isnan(a) ? a : std::fmax(a, 0) + std::log1p(std::exp(-std::abs(a)));
    case Op::pow:
      return std::pow(a, b);
    case Op::sqrt:
      return std::sqrt(a);
    case Op::constant:
    case Op::variable:
    case Op::capture:
      break;
  }
  fail("'{}' is a leaf, not an operator", op_name(op));
}

Expr Expr::constant(Type type, double value) {
  check(!std::isnan(value), "a constant must not be NaN");
  check(type != Type::integer || std::abs(value) <= max_integer,
        "the integer {:.0f} does not fit 32 bits; write a number ({:.0f}.0)", value, value);
  return constant_node(type, value);
}

Expr Expr::variable(Var var) {
  return make_node(Node{.op = Op::variable,
                        .type = var == Var::score ? Type::number : Type::integer,
                        .var = var,
                        .capture = {},
                        .args = {}});
}

Type Expr::type() const { return node_->type; }
bool Expr::is_constant() const { return node_->op == Op::constant; }
bool Expr::is_constant(double value) const { return is_constant() && node_->value == value; }
bool Expr::uses(Var var) const { return (node_->vars >> static_cast<int>(var) & 1u) != 0; }

Variables variables() {
  const auto v = [](Var var) { return Expr::variable(var); };
  return {v(Var::score), v(Var::b), v(Var::h), v(Var::q), v(Var::kv), v(Var::n_q), v(Var::n_kv)};
}

Capture::Capture(std::string name, std::vector<Axis> axes, Type type, bool differentiable) {
  const bool identifier =
      !name.empty() && (std::isalpha(static_cast<unsigned char>(name[0])) || name[0] == '_') &&
      std::all_of(name.begin(), name.end(),
                  [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; });
  check(identifier, "captured tensor '{}': a name is letters, digits and '_', and starts with no digit",
        name);
  check(!is_reserved(name), "captured tensor '{}': the name already means something in expressions", name);
  check(!axes.empty() && axes.size() <= 4, "captured tensor '{}' has {} axes; 1 to 4 are allowed", name,
        axes.size());
  check(type != Type::boolean, "captured tensor '{}' must hold numbers or integers", name);
  check(!differentiable || type == Type::number,
        "captured tensor '{}' holds integers and cannot be differentiable", name);
  info_ = std::make_shared<const Info>(Info{std::move(name), std::move(axes), type, differentiable});
}

std::string Capture::signature() const {
  std::vector<std::string> names;
  for (const Axis axis : axes()) names.emplace_back(axis_name(axis));
  return fmt::format("{}[{}]", name(), join(names, ","));
}

Expr Capture::at(std::vector<Expr> index) const {
  check(index.size() == axes().size(), "{} has {} axis index{}, not {}", signature(), axes().size(),
        axes().size() == 1 ? "" : "es", index.size());
  for (size_t i = 0; i < index.size(); ++i) {
    const Axis axis = axes()[i];
    const Expr& x = index[i];
    if (x.type() != Type::integer)
      fail("index {} of {} must be an integer, not `{}`, which is {}", i + 1, signature(), to_text(x),
           with_article(x.type()));
    if (axis == Axis::any) continue;
    const auto is = [&x](Var var) { return same(x, Expr::variable(var)); };
    const bool ok = axis == Axis::b    ? is(Var::b)
                    : axis == Axis::h  ? is(Var::h)
                    : axis == Axis::q  ? is(Var::q)
                    : axis == Axis::kv ? is(Var::kv)
                                       : is(Var::q) || is(Var::kv);
    if (!ok)
      fail("index {} of {} must be {}, not `{}`", i + 1, signature(),
           axis == Axis::pos ? "q or kv" : axis_name(axis), to_text(x));
  }
  // The gradient of an access flows to its entry, never through its integer indices.
  return make_node(Node{.op = Op::capture,
                        .type = type(),
                        .capture = std::make_shared<const Capture>(*this),
                        .args = std::move(index)});
}

bool Capture::operator==(const Capture& other) const {
  if (info_ == other.info_) return true;
  return name() == other.name() && axes() == other.axes() && type() == other.type() &&
         differentiable() == other.differentiable();
}

void check_mask(const Expr& expr) {
  if (expr.type() != Type::boolean) {
    fail("a mask must be a condition such as kv <= q; `{}` is {}", to_text(expr), with_article(expr.type()));
  }
  if (expr.uses(Var::score)) {
    fail("a mask decides which scores exist, so it must not read score: `{}`", to_text(expr));
  }
}

void check_score_mod(const Expr& expr) {
  if (expr.type() == Type::boolean) {
    fail("a score mod must give a number; `{}` is a boolean (use it as a mask)", to_text(expr));
  }
}

}  // namespace flexchat::flex
