// Forward-mode differentiation over the graph, one derivative per distinct node.
#include "flex/derivative.h"

#include <unordered_map>
#include <unordered_set>

#include "base/error.h"

namespace flexchat::flex {
namespace {

const Expr& zero() {
  static const Expr value(0.0);
  return value;
}

// Sums and products that drop zeros and ones. Unlike the builder they may turn x*0.0 into 0.0 and 1.0*(q-kv)
// into an integer: here a factor that is identically zero means that the term does not exist.
Expr plus(const Expr& x, const Expr& y) {
  if (x.is_constant(0)) return y;
  return y.is_constant(0) ? x : x + y;
}
Expr minus(const Expr& x, const Expr& y) {
  if (y.is_constant(0)) return x;
  return x.is_constant(0) ? -y : x - y;
}
Expr times(const Expr& x, const Expr& y) {
  if (x.is_constant(0) || y.is_constant(0)) return zero();
  if (x.is_constant(1)) return y;
  return y.is_constant(1) ? x : x * y;
}
Expr over(const Expr& x, const Expr& y) { return x.is_constant(0) ? zero() : x / y; }
Expr choose(const Expr& condition, const Expr& x, const Expr& y) {
  return same(x, y) ? x : where(condition, x, y);
}

class Differentiator {
 public:
  explicit Differentiator(const Expr& leaf) : leaf_(leaf) {}

  Expr operator()(const Expr& expr) {
    if (same(expr, leaf_)) return Expr(1.0);
    if (expr.type() != Type::number) return zero();
    const auto found = known_.find(&expr.node());
    if (found != known_.end()) return found->second;
    const Expr result = rule(expr, expr.node().args);
    known_.emplace(&expr.node(), result);
    return result;
  }

 private:
  Expr rule(const Expr& y, const std::vector<Expr>& args) {
    const Op op = y.node().op;
    if (op == Op::constant || op == Op::variable || op == Op::capture) return zero();
    if (op == Op::where) return choose(args[0], (*this)(args[1]), (*this)(args[2]));
    const Expr& x = args[0];
    const Expr dx = (*this)(x);
    return args.size() == 1 ? unary(op, x, dx, y) : binary(op, x, dx, args[1], (*this)(args[1]), y);
  }

  static Expr unary(Op op, const Expr& x, const Expr& dx, const Expr& y) {
    if (dx.is_constant(0)) return zero();
    switch (op) {
      case Op::neg:
        return -dx;
      case Op::abs:
        return where(x < 0, -dx, where(0 < x, dx, 0.0));
      case Op::exp:
        return times(y, dx);
      case Op::log:
        return dx / x;
      case Op::tanh:
        return times(1.0 - y * y, dx);
      case Op::sigmoid:
        return times(y * (1.0 - y), dx);
      case Op::softplus:
        return times(sigmoid(x), dx);
      case Op::sqrt:
        return times(0.5, dx) / y;
      default:
        fail("no derivative rule for '{}'", op_name(op));
    }
  }

  static Expr binary(Op op, const Expr& x, const Expr& dx, const Expr& z, const Expr& dz, const Expr& y) {
    switch (op) {
      case Op::add:
        return plus(dx, dz);
      case Op::sub:
        return minus(dx, dz);
      case Op::mul:
        return plus(times(dx, z), times(x, dz));
      case Op::div:
        return over(minus(dx, times(y, dz)), z);
      case Op::min:
        return choose(x <= z, dx, dz);
      case Op::max:
        return choose(z <= x, dx, dz);
      case Op::pow:
        return plus(dx.is_constant(0) ? zero() : times(times(z, pow(x, z - 1)), dx),
                    dz.is_constant(0) ? zero() : times(times(y, log(x)), dz));
      default:
        fail("no derivative rule for '{}'", op_name(op));
    }
  }

  const Expr leaf_;
  std::unordered_map<const Node*, Expr> known_;  // the nodes live as long as the differentiated expression
};

void collect_accesses(const Expr& expr, std::unordered_set<const Node*>& seen, std::vector<Expr>& accesses) {
  const Node& node = expr.node();
  if (!seen.insert(&node).second) return;
  if (node.op == Op::capture && node.capture->differentiable()) accesses.push_back(expr);
  for (const Expr& arg : node.args) collect_accesses(arg, seen, accesses);
}

}  // namespace

Expr derivative(const Expr& expr, const Expr& leaf) {
  const Node& node = leaf.node();
  const bool number_leaf = leaf.type() == Type::number && (node.op == Op::variable || node.op == Op::capture);
  check(number_leaf,
        "derivatives are taken with respect to score or an element of a captured tensor, not `{}`",
        to_text(leaf));
  return Differentiator(leaf)(expr);
}

Expr score_derivative(const Expr& expr) { return derivative(expr, variables().score); }

std::vector<CaptureDerivative> capture_derivatives(const Expr& expr) {
  std::unordered_set<const Node*> seen;
  std::vector<Expr> accesses;
  collect_accesses(expr, seen, accesses);
  std::vector<CaptureDerivative> result;
  for (const Expr& access : accesses) result.push_back({access, derivative(expr, access)});
  return result;
}

}  // namespace flexchat::flex
