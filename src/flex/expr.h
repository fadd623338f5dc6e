// Score and mask mods as values.
//
// A mod is a small immutable expression: a *score mod* gives the number that replaces an attention score, a
// *mask* gives true where query `q` may attend to key `kv`. Writing one is ordinary C++:
//
//   const auto [score, b, h, q, kv, n_q, n_kv] = variables();
//   const Expr sliding = kv <= q && q - kv < 256;
//   const Capture slope("slope", {Axis::h});
//   const Expr biased = score - slope(h) * (q - kv);
//
// or text (flex/parse.h): "kv <= q && q - kv < 256". The expression is data: it can be printed, evaluated at
// a point in double (flex/eval.h), differentiated (flex/derivative.h), bounded over a block of positions
// (flex/interval.h) and turned into a block mask (flex/block_mask.h).
//
// Variables                                   Types
//   score      number   q.k * scale             number   a float
//   b, h       integer  batch row, query head   integer  a position or index; exact, |x| < 2^31
//   q, kv      integer  logical positions       boolean  the value of a comparison
//   n_q, n_kv  integer  lengths of this row     An integer is accepted where a number is needed.
//
// `q` counts from the row's position offset, `kv` from 0, so training, prefill, chunked prefill and decode
// see the same expression; only the data differs.
//
// Operators: + - * keep integers; / always gives a number; // and % are for integers and round towards minus
// infinity (x // 0 is 0, x % 0 is x, so x == (x//y)*y + x%y always holds); comparisons; && || !. min and max
// drop a NaN operand, as C's fmin and fmax do; comparisons with NaN are false, != is true.
//
// Invariants: nodes are hash-consed, so two expressions are the same exactly when their nodes are the same
// object, and a common subexpression is one node however often it was written. Constants are folded and
// neutral operands dropped while building, without changing any value. Building is thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace flexchat::flex {

enum class Type : uint8_t { boolean, integer, number };
enum class Var : uint8_t { score, b, h, q, kv, n_q, n_kv };
constexpr int n_vars = 7;

// What may index an axis of a captured tensor: that variable; for `pos` either q or kv (`doc[b,q]` and
// `doc[b,kv]` are one tensor); for `any` any integer expression (a relative-position table).
enum class Axis : uint8_t { b, h, q, kv, pos, any };

// a > b is b < a, and a >= b is b <= a.
enum class Op : uint8_t {
  constant,
  variable,
  capture,
  add,
  sub,
  mul,
  div,
  floor_div,
  mod,
  neg,
  lt,
  le,
  eq,
  ne,
  logical_and,
  logical_or,
  logical_not,
  min,
  max,
  abs,
  where,
  exp,
  log,
  tanh,
  sigmoid,
  softplus,
  pow,
  sqrt
};

const char* type_name(Type type);  // "integer"
const char* var_name(Var var);     // "n_kv"
const char* axis_name(Axis axis);  // "pos"
const char* op_name(Op op);        // "&&", "min"

// What an operator computes, in double: booleans are 0 and 1, unused operands are ignored. Every evaluator
// and kernel is held to this definition.
double apply_op(Op op, double a, double b, double c);

struct Node;

class Expr {
 public:
  // Constants mix freely with expressions. (Templates, so that no pointer converts to a boolean.)
  template <class T>
  requires(std::is_arithmetic_v<T>) Expr(T value)  // NOLINT(google-explicit-constructor)
      : Expr(constant(std::is_same_v<T, bool> ? Type::boolean
                      : std::is_integral_v<T> ? Type::integer
                                              : Type::number,
                      static_cast<double>(value))) {}

  static Expr variable(Var var);

  const Node& node() const { return *node_; }
  Type type() const;
  bool is_constant() const;
  bool is_constant(double value) const;  // the constant `value`, whatever its type
  bool uses(Var var) const;              // does its value depend on `var`?
  // The same expression. (a == b builds a comparison.)
  friend bool same(const Expr& x, const Expr& y) { return x.node_ == y.node_; }

 private:
  friend Expr make_node(Node node);
  explicit Expr(std::shared_ptr<const Node> node) : node_(std::move(node)) {}
  static Expr constant(Type type, double value);
  std::shared_ptr<const Node> node_;
};

// A tensor that a mod reads: its name, what indexes each axis, whether it holds integers or numbers, and
// whether training wants its gradient. The values come later, as data (flex/bindings.h).
class Capture {
 public:
  // Errors: a name that is no identifier or is taken by the language, more than 4 axes, a differentiable
  // tensor of integers.
  Capture(std::string name, std::vector<Axis> axes, Type type = Type::number, bool differentiable = false);

  const std::string& name() const { return info_->name; }
  const std::vector<Axis>& axes() const { return info_->axes; }
  Type type() const { return info_->type; }
  bool differentiable() const { return info_->differentiable; }
  std::string signature() const;  // "doc[b,pos]"

  // One element: doc(b, q). Errors name the axis and what may index it.
  template <class... Index>
  Expr operator()(const Index&... index) const {
    return at({Expr(index)...});
  }
  Expr at(std::vector<Expr> index) const;

  bool operator==(const Capture& other) const;

 private:
  struct Info {
    std::string name;
    std::vector<Axis> axes;
    Type type;
    bool differentiable;
  };
  std::shared_ptr<const Info> info_;
};

// One operation. Only the fields of its `op` mean something.
struct Node {
  Op op;
  Type type;
  Var var = Var::score;                    // variable
  double value = 0;                        // constant
  std::shared_ptr<const Capture> capture;  // capture: args are its indices
  std::vector<Expr> args;
  uint32_t vars = 0;  // bit v: the value depends on Var v
  int depth = 0;      // longest path to a leaf
  size_t hash = 0;
};

struct Variables {
  Expr score, b, h, q, kv, n_q, n_kv;
};
Variables variables();

// Builds any operator from its operands, with type checks, folding and simplification. The functions below
// are its readable forms. Type errors say which operand is wrong and what is allowed.
Expr make(Op op, std::vector<Expr> args);

inline Expr operator+(const Expr& x, const Expr& y) { return make(Op::add, {x, y}); }
inline Expr operator-(const Expr& x, const Expr& y) { return make(Op::sub, {x, y}); }
inline Expr operator*(const Expr& x, const Expr& y) { return make(Op::mul, {x, y}); }
inline Expr operator/(const Expr& x, const Expr& y) { return make(Op::div, {x, y}); }
inline Expr operator%(const Expr& x, const Expr& y) { return make(Op::mod, {x, y}); }
inline Expr operator-(const Expr& x) { return make(Op::neg, {x}); }
inline Expr operator<(const Expr& x, const Expr& y) { return make(Op::lt, {x, y}); }
inline Expr operator<=(const Expr& x, const Expr& y) { return make(Op::le, {x, y}); }
inline Expr operator>(const Expr& x, const Expr& y) { return make(Op::lt, {y, x}); }
inline Expr operator>=(const Expr& x, const Expr& y) { return make(Op::le, {y, x}); }
inline Expr operator==(const Expr& x, const Expr& y) { return make(Op::eq, {x, y}); }
inline Expr operator!=(const Expr& x, const Expr& y) { return make(Op::ne, {x, y}); }
inline Expr operator&&(const Expr& x, const Expr& y) { return make(Op::logical_and, {x, y}); }
inline Expr operator||(const Expr& x, const Expr& y) { return make(Op::logical_or, {x, y}); }
inline Expr operator!(const Expr& x) { return make(Op::logical_not, {x}); }
inline Expr floor_div(const Expr& x, const Expr& y) { return make(Op::floor_div, {x, y}); }
inline Expr min(const Expr& x, const Expr& y) { return make(Op::min, {x, y}); }
inline Expr max(const Expr& x, const Expr& y) { return make(Op::max, {x, y}); }
inline Expr abs(const Expr& x) { return make(Op::abs, {x}); }
inline Expr where(const Expr& c, const Expr& x, const Expr& y) { return make(Op::where, {c, x, y}); }
inline Expr exp(const Expr& x) { return make(Op::exp, {x}); }
inline Expr log(const Expr& x) { return make(Op::log, {x}); }
inline Expr tanh(const Expr& x) { return make(Op::tanh, {x}); }
inline Expr sigmoid(const Expr& x) { return make(Op::sigmoid, {x}); }
inline Expr softplus(const Expr& x) { return make(Op::softplus, {x}); }
inline Expr pow(const Expr& x, const Expr& y) { return make(Op::pow, {x, y}); }
inline Expr sqrt(const Expr& x) { return make(Op::sqrt, {x}); }

// Text that parses back to the same expression (flex/parse.h).
std::string to_text(const Expr& expr);

// A mask must be boolean and must not read `score`; a score mod must be a number. Errors say what is wrong.
void check_mask(const Expr& expr);
void check_score_mod(const Expr& expr);

}  // namespace flexchat::flex
