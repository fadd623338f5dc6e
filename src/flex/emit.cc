// Emission in two steps: rearrange products on the graph, then print the straight-line program of all results
// as one function per result. Functions for elements are printed first; they tell which values they want
// from the coarser levels.
#include "flex/emit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <unordered_map>

#include "base/error.h"
#include "flex/derivative.h"
#include "flex/program.h"

namespace flexchat::flex {
namespace {

// Where a value changes.
enum class Level : uint8_t { head, q, kv, element };

constexpr uint32_t bit(Var var) { return 1u << static_cast<int>(var); }

Level level_of(uint32_t vars) {
  const bool q = (vars & bit(Var::q)) != 0, kv = (vars & bit(Var::kv)) != 0;
  if ((vars & bit(Var::score)) != 0 || (q && kv)) return Level::element;
  return q ? Level::q : kv ? Level::kv : Level::head;
}

// ---- products -------------------------------------------------------------------------------------------

class ProductArranger {
 public:
  Expr operator()(const Expr& expr) {
    const Node& node = expr.node();
    if (node.args.empty()) return expr;
    if (const auto found = known_.find(&node); found != known_.end()) return found->second;
    std::vector<Expr> args;
    for (const Expr& arg : node.args) args.push_back((*this)(arg));
    const Expr rebuilt = node.op == Op::capture ? node.capture->at(std::move(args)) : rebuild(node, args);
    known_.emplace(&node, rebuilt);
    return rebuilt;
  }

 private:
  struct Factors {
    std::vector<Expr> above, below;  // their product over theirs
  };

  Expr rebuild(const Node& node, const std::vector<Expr>& args) {
    if (node.op == Op::pow) return power(args[0], args[1]);
    Expr expr = make(node.op, args);
    if (is_product(expr) && level_of(expr.node().vars) == Level::element) return arrange(expr);
    return expr;
  }

  static Expr power(const Expr& x, const Expr& exponent) {
    const Expr number = x.type() == Type::number ? x : 1.0 * x;
    if (exponent.is_constant(2)) return number * number;
    if (exponent.is_constant(3)) return number * number * number;
    if (exponent.is_constant(-1)) return 1.0 / number;
    return pow(x, exponent);
  }

  static bool is_product(const Expr& expr) {
    return expr.type() == Type::number && (expr.node().op == Op::mul || expr.node().op == Op::div);
  }

  static void collect(const Expr& expr, bool above, Factors& factors) {
    if (!is_product(expr) || level_of(expr.node().vars) != Level::element) {
      (above ? factors.above : factors.below).push_back(expr);
      return;
    }
    collect(expr.node().args[0], above, factors);
    collect(expr.node().args[1], expr.node().op == Op::div ? !above : above, factors);
  }

  static Expr arrange(const Expr& expr) {
    Factors factors;
    collect(expr, true, factors);
    const auto early = [](const Expr& x) { return level_of(x.node().vars) != Level::element; };
    const auto n_above = std::count_if(factors.above.begin(), factors.above.end(), early);
    const auto n_below = std::count_if(factors.below.begin(), factors.below.end(), early);
    if (n_above < 2 && n_below == 0) return expr;

    const Expr one(1.0);
    // One factor for each level. All start from 1.0, so that integers multiply as numbers.
    std::array<Expr, 3> known = {one, one, one};
    std::array<bool, 3> used = {};
    Expr above = one, below = one;
    bool has_below = false;
    const auto include = [&](const Expr& x, bool is_above) {
      if (early(x)) {
        const auto level = static_cast<size_t>(level_of(x.node().vars));
        known[level] = is_above ? known[level] * x : known[level] / x;
        used[level] = true;
      } else if (is_above) {
        above = above * x;
      } else {
        below = below * x;
        has_below = true;
      }
    };
    for (const Expr& x : factors.above) include(x, true);
    for (const Expr& x : factors.below) include(x, false);

    constexpr auto head = static_cast<size_t>(Level::head), q = static_cast<size_t>(Level::q),
                   kv = static_cast<size_t>(Level::kv);
    if (used[head] && (used[q] || used[kv])) {  // constants and per-head factors ride along
      Expr& carrier = known[used[kv] ? kv : q];
      carrier = carrier * known[head];
      used[head] = false;
    }
    Expr result = above;
    for (const size_t level : {head, q, kv}) {
      if (used[level]) result = result * known[level];
    }
    return has_below ? result / below : result;
  }

  std::unordered_map<const Node*, Expr> known_;
};

// ---- printing -------------------------------------------------------------------------------------------

std::string integer_literal(double value) {
  return value < 0 ? fmt::format("({:.0f})", value) : fmt::format("{:.0f}", value);
}

std::string number_literal(double value) {
  const auto x = static_cast<float>(value);
  if (std::isinf(x)) return x > 0 ? "__int_as_float(0x7f800000)" : "(-__int_as_float(0x7f800000))";
  return std::signbit(x) ? fmt::format("({:a}f)", x) : fmt::format("{:a}f", x);
}

const char* c_type(Type type) {
  return type == Type::boolean ? "bool" : type == Type::integer ? "int" : "float";
}

struct Range {
  double lo, hi;
  bool exact() const { return lo >= -0x1p24 && hi <= 0x1p24; }  // every integer of it is an f32
};

class Emitter {
 public:
  explicit Emitter(const std::vector<Expr>& results) : program_(results) { analyse(); }

  const std::vector<Capture>& captures() const { return program_.captures; }
  // When everything is printed.
  const std::vector<float>& numbers() const { return numbers_; }
  const std::vector<int32_t>& integers() const { return integers_; }

  // How often result `i` needs the unit of exp, log and divisions for an element, roughly.
  int functions(size_t i) const {
    std::vector<bool> needed(program_.code.size());
    needed[static_cast<size_t>(program_.roots[i])] = true;
    int n = 0;
    for (size_t k = program_.code.size(); k-- > 0;) {
      const Instruction& in = program_.code[k];
      if (!needed[k] || level(static_cast<int>(k)) != Level::element) continue;
      n += functions(in.op);
      for (size_t a = 0; a < static_cast<size_t>(in.n_args); ++a)
        needed[static_cast<size_t>(in.args[a])] = true;
    }
    return n;
  }

  // Statements that compute result `i` per element, indented by `indent`, the last of which returns it.
  std::string element_body(size_t i, const std::string& indent) {
    Scope scope{Level::element, true, indent, {}, {}, {}, {}};
    const int root = program_.roots[i];
    const bool boolean = code(root).type == Type::boolean;
    const std::string result = boolean ? value(scope, root) : number(scope, root);
    return scope.body + fmt::format("{}return {};\n", indent, result);
  }

  // The same times log2(e), for the hardware's exp and log.
  std::string base2_body(size_t i, const std::string& indent) {
    Scope scope{Level::element, true, indent, {}, {}, {}, {}, true};
    const std::string result = base2(scope, program_.roots[i]);
    return scope.body + fmt::format("{}return {};\n", indent, result);
  }

  // Statements that compute the flat element that access `i`, itself a result, reads, and return it.
  std::string index_body(size_t i, const std::string& indent) {
    Scope scope{Level::element, false, indent, {}, {}, {}, {}};
    const std::string index = index_arguments(scope, code(program_.roots[i]));
    return scope.body + fmt::format("{}return capture_index({});\n", indent, index);
  }

  // The structs and functions of the coarser levels; to be called when all elements are printed.
  std::string hoisted() {
    const std::string q = level_function(Level::q, "ModQ", "mod_q", ", const ModHead& mh, int q");
    const std::string kv = level_function(Level::kv, "ModKv", "mod_kv", ", const ModHead& mh, int kv");
    return level_function(Level::head, "ModHead", "mod_head", "") + q + kv;
  }

 private:
  // One function being printed.
  struct Scope {
    Level level;
    bool hoists;  // may it read values of coarser levels?
    std::string indent;
    std::string body;
    // Instructions that have a local already: v<i>, f<i> as float, b<i> as float times log2(e).
    std::set<int> values, numbers, scaled;
    bool has_score2 = false;  // is score * log2(e) at hand?
  };
  // What a coarser level is asked for: instructions by value (v<i>), as float (f<i>), times log2(e) (b<i>).
  struct Fields {
    std::set<int> values, numbers, scaled;
  };

  const Instruction& code(int i) const { return program_.code[static_cast<size_t>(i)]; }
  Level level(int i) const { return level_of(vars_[static_cast<size_t>(i)]); }

  void analyse() {
    for (const Instruction& in : program_.code) {
      uint32_t vars = in.op == Op::variable ? bit(in.var) : 0;
      for (size_t k = 0; k < static_cast<size_t>(in.n_args); ++k) {
        vars |= vars_[static_cast<size_t>(in.args[k])];
      }
      vars_.push_back(vars);
      costs_.push_back(cost(in, level_of(vars)));
      ranges_.push_back(range(in));
      convertible_.push_back(converts_by_operands(in));
    }
  }

  // Operations to repeat per element if the value is not kept by a coarser level. Values of a query or key
  // occupy a register for each row or column, so that a single cheap operation is repeated instead.
  int cost(const Instruction& in, Level at) const {
    constexpr int dear = 100;
    if (in.op == Op::constant || in.op == Op::variable) return 0;
    const bool integers = in.type != Type::number;
    const bool cheap = in.op == Op::add || in.op == Op::sub || in.op == Op::neg || in.op == Op::min ||
                       in.op == Op::max || in.op == Op::abs || in.op == Op::logical_not;
    if (!cheap || !integers || at == Level::head) return dear;
    int total = 1;
    for (size_t k = 0; k < static_cast<size_t>(in.n_args); ++k)
      total += costs_[static_cast<size_t>(in.args[k])];
    return std::min(total, dear);
  }
  bool kept(int i) const { return costs_[static_cast<size_t>(i)] > 1; }

  // Bounds of integers whose conversion to f32 can be moved to their operands.
  Range range(const Instruction& in) const {
    constexpr Range unknown = {-HUGE_VAL, HUGE_VAL};
    const auto arg = [&](size_t k) { return ranges_[static_cast<size_t>(in.args[k])]; };
    if (in.type != Type::integer) return unknown;
    switch (in.op) {
      case Op::constant:
        return {in.value, in.value};
      case Op::variable:
        return {0, 0x1p24};
      case Op::add:
        return {arg(0).lo + arg(1).lo, arg(0).hi + arg(1).hi};
      case Op::sub:
        return {arg(0).lo - arg(1).hi, arg(0).hi - arg(1).lo};
      case Op::neg:
        return {-arg(0).hi, -arg(0).lo};
      case Op::abs:
        return {0, std::max(-arg(0).lo, arg(0).hi)};
      case Op::min:
        return {std::min(arg(0).lo, arg(1).lo), std::min(arg(0).hi, arg(1).hi)};
      case Op::max:
        return {std::max(arg(0).lo, arg(1).lo), std::max(arg(0).hi, arg(1).hi)};
      case Op::where:
        return {std::min(arg(1).lo, arg(2).lo), std::max(arg(1).hi, arg(2).hi)};
      default:
        return unknown;
    }
  }

  // Can float(op(x, y)) be had as op(float(x), float(y)) without converting anything per element? Rounding
  // is monotone and symmetric, so it passes through selections and signs; sums need exact operands.
  bool converts_by_operands(const Instruction& in) const {
    const auto free = [&](size_t k) {
      const auto i = static_cast<size_t>(in.args[k]);
      return level_of(vars_[i]) != Level::element || convertible_[i];
    };
    const auto exact = [&](size_t k) { return ranges_[static_cast<size_t>(in.args[k])].exact(); };
    if (in.type != Type::integer) return false;
    switch (in.op) {
      case Op::add:
      case Op::sub:
        return exact(0) && exact(1) && free(0) && free(1);
      case Op::min:
      case Op::max:
        return free(0) && free(1);
      case Op::neg:
      case Op::abs:
        return free(0);
      case Op::where:
        return free(1) && free(2);
      default:
        return false;
    }
  }

  static int functions(Op op) {
    switch (op) {
      case Op::exp:
      case Op::log:
      case Op::sqrt:
      case Op::div:
        return 1;
      case Op::sigmoid:
      case Op::tanh:
        return 2;
      case Op::softplus:
      case Op::pow:
      case Op::floor_div:
      case Op::mod:
        return 4;
      default:
        return 0;
    }
  }

  static const char* owner(Level level) {
    return level == Level::head ? "mh" : level == Level::q ? "mq" : "mk";
  }
  Fields& fields(Level level) { return fields_[static_cast<size_t>(level)]; }

  static std::string variable(Var var) {
    const bool argument = var == Var::score || var == Var::q || var == Var::kv;
    return argument ? var_name(var) : fmt::format("c.{}", var_name(var));
  }

  // Constants are data, so that another window or cap is the same text: entries of AttentionParams::numbers
  // and integers, as long as there is room. Those that programs are made of stay in the text.
  std::string number_constant(double value, double factor = 1) {
    const double size = std::abs(value);
    const bool plain = !std::isfinite(value) || size == 0 || size == 0.5 || size == 1 || size == 2;
    const auto at = plain ? std::nullopt : entry(numbers_, static_cast<float>(value * factor));
    return at ? fmt::format("c.p.numbers[{}]", *at) : number_literal(value * factor);
  }
  std::string integer_constant(double value) {
    const auto at = std::abs(value) <= 2 ? std::nullopt : entry(integers_, static_cast<int32_t>(value));
    return at ? fmt::format("c.p.integers[{}]", *at) : integer_literal(value);
  }
  template <class T>
  static std::optional<size_t> entry(std::vector<T>& constants, T value) {
    const auto found = std::find(constants.begin(), constants.end(), value);
    const auto at = static_cast<size_t>(found - constants.begin());
    if (found == constants.end()) {
      if (at == max_emitted_constants) return std::nullopt;
      constants.push_back(value);
    }
    return at;
  }

  // The text that names instruction i in its own type; prints what it needs first.
  std::string value(Scope& scope, int i) {
    const Instruction& in = code(i);
    if (in.op == Op::constant) {
      if (in.type == Type::boolean) return in.value != 0 ? "true" : "false";
      return in.type == Type::integer ? integer_constant(in.value) : number_constant(in.value);
    }
    if (in.op == Op::variable) return variable(in.var);
    if (scope.hoists && level(i) != scope.level && kept(i)) {
      fields(level(i)).values.insert(i);
      return fmt::format("{}.v{}", owner(level(i)), i);
    }
    if (scope.values.count(i) == 0) {
      const std::string text = operation(scope, in);
      scope.body += fmt::format("{}const {} v{} = {};\n", scope.indent, c_type(in.type), i, text);
      scope.values.insert(i);
    }
    return fmt::format("v{}", i);
  }

  // The same as an f32.
  std::string number(Scope& scope, int i) {
    const Instruction& in = code(i);
    if (in.type == Type::number) return value(scope, i);
    if (in.op == Op::constant) return number_constant(in.value);
    if (scope.hoists && level(i) != scope.level) {
      fields(level(i)).numbers.insert(i);
      return fmt::format("{}.f{}", owner(level(i)), i);
    }
    if (scope.numbers.count(i) == 0) {
      const bool by_operands =
          scope.hoists && scope.level == Level::element && convertible_[static_cast<size_t>(i)];
      const std::string text =
          by_operands ? operation(scope, in, true) : fmt::format("static_cast<float>({})", value(scope, i));
      scope.body += fmt::format("{}const float f{} = {};\n", scope.indent, i, text);
      scope.numbers.insert(i);
    }
    return fmt::format("f{}", i);
  }

  // Does instruction i cost no more times log2(e) than it does as it is? The factor then lands on something
  // that is known before the element is, or on the score.
  bool scales_free(int i) const {
    const Instruction& in = code(i);
    const auto free = [&](size_t k) { return scales_free(in.args[k]); };
    if (level(i) != Level::element) return true;
    if (in.type != Type::number) return false;
    switch (in.op) {
      case Op::variable:
        return in.var == Var::score;
      case Op::log:
        return true;
      case Op::neg:
      case Op::abs:
      case Op::div:
        return free(0);
      case Op::mul:
        return free(0) || free(1);
      case Op::add:
      case Op::sub:
      case Op::min:
      case Op::max:
        return free(0) && free(1);
      case Op::where:
        return free(1) && free(2);
      default:
        return false;
    }
  }

  // Instruction i times log2(e), as an f32.
  std::string base2(Scope& scope, int i) {
    constexpr double log2e = 1.4426950408889634;
    const Instruction& in = code(i);
    if (in.op == Op::constant) return number_constant(in.value, log2e);
    if (in.op == Op::variable && in.var == Var::score) return "score2";
    if (level(i) != scope.level) {
      fields(level(i)).scaled.insert(i);
      return fmt::format("{}.b{}", owner(level(i)), i);
    }
    if (scope.scaled.count(i) == 0) {
      const std::string text = scaled_operation(scope, i);
      scope.body += fmt::format("{}const float b{} = {};\n", scope.indent, i, text);
      scope.scaled.insert(i);
    }
    return fmt::format("b{}", i);
  }

  std::string scaled_operation(Scope& scope, int i) {
    const Instruction& in = code(i);
    const auto x = [&](size_t k) { return base2(scope, in.args[k]); };
    const auto y = [&](size_t k) { return number(scope, in.args[k]); };
    if (in.type == Type::number && scope.level == Level::element) {
      switch (in.op) {
        case Op::log:
          return fmt::format("mod_log2({})", y(0));
        case Op::neg:
          return "-" + x(0);
        case Op::abs:
          return fmt::format("mod_abs({})", x(0));
        case Op::add:
        case Op::sub: {
          const std::string left = x(0);
          return fmt::format("{} {} {}", left, in.op == Op::add ? "+" : "-", x(1));
        }
        case Op::min:
        case Op::max: {
          const std::string left = x(0);
          return fmt::format("mod_{}({}, {})", op_name(in.op), left, x(1));
        }
        case Op::mul: {
          const bool second = scales_free(in.args[1]);
          const std::string left = second ? y(0) : x(0);
          return fmt::format("{} * {}", left, second ? x(1) : y(1));
        }
        case Op::div: {
          const std::string left = x(0);
          return fmt::format("mod_div({}, {})", left, y(1));
        }
        case Op::where: {
          const std::string condition = value(scope, in.args[0]), then = x(1);
          return fmt::format("{} ? {} : {}", condition, then, x(2));
        }
        default:
          break;
      }
    }
    return number(scope, i) + " * kModLog2e";
  }

  std::string index_arguments(Scope& scope, const Instruction& in) {
    std::string text = fmt::format("c.p.captures[{}]", in.capture);
    for (size_t k = 0; k < static_cast<size_t>(in.n_args); ++k) text += ", " + value(scope, in.args[k]);
    return text;
  }

  // as_number: an operation on integers, computed in f32.
  std::string operation(Scope& scope, const Instruction& in, bool as_number = false) {
    const bool on_numbers = as_number || in.type == Type::number;
    const auto x = [&](size_t k) {
      return on_numbers ? number(scope, in.args[k]) : value(scope, in.args[k]);
    };
    const auto call = [&](const char* function) {
      std::string text = fmt::format("{}({}", function, x(0));
      if (in.n_args > 1) text += ", " + x(1);
      return text + ")";
    };
    const auto infix = [&](const char* op) {
      const std::string left = x(0);  // printed before the right side, whatever order the compiler likes
      return fmt::format("{} {} {}", left, op, x(1));
    };
    switch (in.op) {
      case Op::capture:
        return fmt::format("{}({})", in.type == Type::integer ? "capture_integer" : "capture_number",
                           index_arguments(scope, in));
      case Op::add:
        return infix("+");
      case Op::sub:
        return infix("-");
      case Op::mul:
        return infix("*");
      case Op::div:
        return scope.level == Level::element ? call("mod_div") : infix("/");
      case Op::floor_div:
      case Op::mod:
        return integer_division(scope, in);
      case Op::neg:
        return "-" + x(0);
      case Op::lt:
      case Op::le:
      case Op::eq:
      case Op::ne:
        return comparison(scope, in);
      case Op::logical_and:
        return infix("&&");
      case Op::logical_or:
        return infix("||");
      case Op::logical_not:
        return "!" + x(0);
      case Op::min:
        return call(on_numbers ? "mod_min" : "mod_imin");
      case Op::max:
        return call(on_numbers ? "mod_max" : "mod_imax");
      case Op::abs:
        return call(on_numbers ? "mod_abs" : "mod_iabs");
      case Op::where: {
        const std::string condition = value(scope, in.args[0]), then = x(1);
        return fmt::format("{} ? {} : {}", condition, then, x(2));
      }
      case Op::exp:
      case Op::tanh:
      case Op::sigmoid:
        if (scope.has_score2 && scales_free(in.args[0])) {
          const std::string argument = base2(scope, in.args[0]);
          if (in.op == Op::exp) return fmt::format("mod_exp2({})", argument);
          return fmt::format("mod_{}_base2({})", op_name(in.op), argument);
        }
        [[fallthrough]];
      case Op::log:
      case Op::softplus:
      case Op::pow:
      case Op::sqrt:
        return call(fmt::format("mod_{}", op_name(in.op)).c_str());
      case Op::constant:
      case Op::variable:
        break;
    }
    fail("'{}' is a leaf, not an operator", op_name(in.op));
  }

  // Powers of two become shifts and masks, which round towards minus infinity by themselves; other constant
  // divisors stay in the text, for dividing by what the compiler knows is cheap.
  std::string integer_division(Scope& scope, const Instruction& in) {
    const Instruction& divisor = code(in.args[1]);
    const std::string x = value(scope, in.args[0]);
    if (divisor.op == Op::constant && divisor.value >= 1) {
      int exponent = 0;
      if (std::frexp(divisor.value, &exponent) == 0.5) {
        return in.op == Op::floor_div ? fmt::format("{} >> {}", x, exponent - 1)
                                      : fmt::format("{} & {}", x, integer_literal(divisor.value - 1));
      }
    }
    return fmt::format(
        "{}({}, {})", in.op == Op::floor_div ? "mod_floor_div" : "mod_floor_mod", x,
        divisor.op == Op::constant ? integer_literal(divisor.value) : value(scope, in.args[1]));
  }

  std::string comparison(Scope& scope, const Instruction& in) {
    const bool integers = code(in.args[0]).type == Type::integer && code(in.args[1]).type == Type::integer;
    const auto x = [&](size_t k) { return integers ? value(scope, in.args[k]) : number(scope, in.args[k]); };
    const char* op = in.op == Op::lt ? "<" : in.op == Op::le ? "<=" : in.op == Op::eq ? "==" : "!=";
    const std::string left = x(0);
    return fmt::format("{} {} {}", left, op, x(1));
  }

  std::string level_function(Level at, const char* type, const char* name, const char* parameters) {
    Scope scope{at, true, "  ", {}, {}, {}, {}};
    std::string members, results;
    const auto add = [&](const char* member_type, char prefix, int i, const std::string& result) {
      members += fmt::format("  {} {}{};\n", member_type, prefix, i);
      results += (results.empty() ? "" : ", ") + result;
    };
    const Fields wanted = fields(at);  // what it needs in turn belongs to the level above
    for (const int i : wanted.values) add(c_type(code(i).type), 'v', i, value(scope, i));
    for (const int i : wanted.numbers) add("float", 'f', i, number(scope, i));
    for (const int i : wanted.scaled) add("float", 'b', i, base2(scope, i));
    return fmt::format(
        "struct {} {{\n{}}};\nMOD_DEVICE {} {}(const ModContext& c{}) {{\n{}  return {{{}}};\n}}\n", type,
        members, type, name, parameters, scope.body, results);
  }

  Program program_;
  std::vector<uint32_t> vars_;  // of each instruction: the variables its value depends on
  std::vector<int> costs_;
  std::vector<Range> ranges_;
  std::vector<bool> convertible_;
  std::array<Fields, 3> fields_;  // by Level
  std::vector<float> numbers_;
  std::vector<int32_t> integers_;
};

// ---- the section ----------------------------------------------------------------------------------------

std::string function(const char* type, const char* name, const char* before, const char* score,
                     const std::string& body) {
  return fmt::format(
      "MOD_DEVICE {} {}({}const ModContext& c, const ModHead& mh, const ModQ& mq, const ModKv& mk,{} int q,\n"
      "    int kv) {{\n{}}}\n",
      type, name, before, score, body);
}

// The bodies of a function of `i`, one for each access.
template <class Body>
std::string cases(size_t n, const char* otherwise, const Body& body) {
  std::string text;
  for (size_t i = 0; i < n; ++i) text += fmt::format("  if (i == {}) {{\n{}  }}\n", i, body(i));
  return text + fmt::format("  return {};\n", otherwise);
}

char gradient_kind(const Expr& access) {
  if (!access.uses(Var::q)) return 'k';
  return access.uses(Var::kv) ? 'a' : 'q';
}

}  // namespace

Expr arrange_products(const Expr& expr) { return ProductArranger()(expr); }

EmittedMod emit_mod(const std::optional<Expr>& mask, const std::optional<Expr>& score_mod) {
  if (mask) check_mask(*mask);
  if (score_mod) check_score_mod(*score_mod);

  // Results in this order: mask, score, its derivative, derivatives by accesses, the accesses.
  std::vector<Expr> results;
  results.push_back(mask ? *mask : Expr(true));
  results.push_back(score_mod ? arrange_products(*score_mod) : variables().score);
  results.push_back(arrange_products(score_derivative(results[1])));
  const std::vector<CaptureDerivative> derivatives = capture_derivatives(results[1]);
  const size_t n = derivatives.size();
  for (const CaptureDerivative& d : derivatives) results.push_back(arrange_products(d.derivative));
  for (const CaptureDerivative& d : derivatives) {
    check(!d.access.uses(Var::score),
          "captured tensor {} is differentiable; its index `{}` must not depend on score",
          d.access.node().capture->signature(), to_text(d.access));
    results.push_back(d.access);
  }
  check(n <= max_emitted_captures,
        "the score mod reads differentiable captured tensors at {} different places; at most {} are allowed",
        n, max_emitted_captures);

  Emitter emitter(results);
  check(emitter.captures().size() <= max_emitted_captures,
        "mask and score mod read {} captured tensors; at most {} are allowed", emitter.captures().size(),
        max_emitted_captures);

  EmittedMod mod;
  mod.captures = emitter.captures();
  std::string kinds;
  for (const CaptureDerivative& d : derivatives) {
    const auto at = std::find(mod.captures.begin(), mod.captures.end(), *d.access.node().capture);
    mod.gradients.push_back({static_cast<int>(at - mod.captures.begin()), gradient_kind(d.access)});
    kinds += mod.gradients.back().kind;
  }

  const char* const with_score = " float score,";
  const std::string elements =
      function("bool", "mod_mask", "", "", emitter.element_body(0, "  ")) +
      function("float", "mod_score", "", with_score, emitter.element_body(1, "  ")) +
      function("float", "mod_score_base2", "", " float score, float score2,", emitter.base2_body(1, "  ")) +
      function("float", "mod_score_grad", "", with_score, emitter.element_body(2, "  ")) +
      function("float", "mod_capture_grad", "int i, ", with_score,
               cases(n, "0.0f", [&](size_t i) { return emitter.element_body(3 + i, "    "); })) +
      "MOD_DEVICE long long mod_capture_index(int i, const ModContext& c, int q, int kv) {\n" +
      cases(n, "0", [&](size_t i) { return emitter.index_body(3 + n + i, "    "); }) + "}\n";

  mod.dear = emitter.functions(1) > 2;
  mod.text = fmt::format(
      "#define MOD_HAS_MASK {}\n#define MOD_HAS_SCORE {}\n#define MOD_IS_DEAR {}\n"
      "#define MOD_N_CAPTURE_GRADS {}\n#define MOD_CAPTURE_GRAD_KINDS \"{}\"\n\nnamespace flexchat::cuda "
      "{{\n\n{}{}\n}}  // namespace "
      "flexchat::cuda\n",
      mask ? 1 : 0, score_mod ? 1 : 0, mod.dear ? 1 : 0, n, kinds, emitter.hoisted(), elements);
  mod.numbers = emitter.numbers();
  mod.integers = emitter.integers();
  return mod;
}

}  // namespace flexchat::flex
