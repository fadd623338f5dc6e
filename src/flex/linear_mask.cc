#include "flex/linear_mask.h"

#include <algorithm>
#include <vector>

#include "flex/program.h"

namespace flexchat::flex {
namespace {

using Atoms = std::vector<LinearAtom>;   // any of them
using Clauses = std::vector<Atoms>;      // each of them
using Form = std::optional<LinearAtom>;  // an atom whose op is still to come

constexpr int64_t max_number = int64_t{1} << 31;  // integers of expressions lie below
constexpr int64_t max_factor = int64_t{1} << 24;  // so that no sum of products leaves 64 bits
// Nodes looked at, shared ones as often as they are met: x + x of x + x of ... would take for ever.
constexpr int max_visits = 512;

class Linearizer {
 public:
  explicit Linearizer(std::span<const Capture> captures) : captures_(captures) {}

  // The clauses of `expr`, or of its negation.
  std::optional<Clauses> clauses(const Expr& expr, bool negated) {
    if (++visits_ > max_visits) return std::nullopt;
    const Node& node = expr.node();
    switch (node.op) {
      case Op::constant:
        if ((node.value != 0) != negated) return Clauses{};
        return Clauses{Atoms{}};
      case Op::logical_not:
        return clauses(node.args[0], !negated);
      case Op::logical_and:
      case Op::logical_or: {
        const auto x = clauses(node.args[0], negated), y = clauses(node.args[1], negated);
        if (!x || !y) return std::nullopt;
        return (node.op == Op::logical_and) != negated ? both(*x, *y) : either(*x, *y);
      }
      case Op::lt:
      case Op::le:
      case Op::eq:
      case Op::ne:
        return comparison(node, negated);
      default:
        return std::nullopt;
    }
  }

 private:
  static std::optional<Clauses> both(const Clauses& x, const Clauses& y) {
    if (x.size() + y.size() > max_mask_clauses) return std::nullopt;
    Clauses all = x;
    all.insert(all.end(), y.begin(), y.end());
    return all;
  }
  // (a && b) || (c && d) is (a || c) && (a || d) && (b || c) && (b || d).
  static std::optional<Clauses> either(const Clauses& x, const Clauses& y) {
    if (x.size() * y.size() > max_mask_clauses) return std::nullopt;
    Clauses all;
    for (const Atoms& a : x) {
      for (const Atoms& b : y) {
        all.push_back(a);
        all.back().insert(all.back().end(), b.begin(), b.end());
      }
    }
    return all;
  }

  std::optional<Clauses> comparison(const Node& node, bool negated) {
    const Expr &left = node.args[0], &right = node.args[1];
    if (left.type() != Type::integer || right.type() != Type::integer) return std::nullopt;
    const bool ordered = node.op == Op::lt || node.op == Op::le;
    // |x| < y is x < y and -x < y; y < |x| is y < x or y < -x.
    if (ordered && left.node().op == Op::abs) {
      const Expr& x = left.node().args[0];
      return halves(node.op, {x, right}, {-x, right}, negated, true);
    }
    if (ordered && right.node().op == Op::abs) {
      const Expr& x = right.node().args[0];
      return halves(node.op, {left, x}, {left, -x}, negated, false);
    }
    const std::optional<LinearAtom> atom = difference(node.op, left, right, negated);
    if (!atom) return std::nullopt;
    return Clauses{Atoms{*atom}};
  }

  struct Sides {
    Expr left, right;
  };
  std::optional<Clauses> halves(Op op, const Sides& x, const Sides& y, bool negated, bool conjunction) {
    const auto one = difference(op, x.left, x.right, negated),
               other = difference(op, y.left, y.right, negated);
    if (!one || !other) return std::nullopt;
    if (conjunction != negated) return Clauses{Atoms{*one}, Atoms{*other}};
    return Clauses{Atoms{*one, *other}};
  }

  // left op right, or its negation: !(x < y) is y <= x.
  Form difference(Op op, const Expr& left, const Expr& right, bool negated) {
    const bool ordered = op == Op::lt || op == Op::le, swapped = ordered && negated;
    Form form = sum(linear(swapped ? right : left), linear(swapped ? left : right), -1);
    if (!form) return form;
    form->op = !negated ? op : op == Op::lt ? Op::le : op == Op::le ? Op::lt : op == Op::eq ? Op::ne : Op::eq;
    return form;
  }

  static bool below(int64_t x, int64_t limit) { return -limit < x && x < limit; }

  // x + by * y
  static Form sum(Form x, const Form& y, int64_t by) {
    if (!x || !y) return std::nullopt;
    x->constant += by * y->constant;
    bool fits = below(x->constant, max_number);
    for (int v = 0; v < n_vars; ++v) {
      const int64_t factor = x->factor[v] + by * y->factor[v];
      fits = fits && below(factor, max_factor);
      x->factor[v] = static_cast<int>(factor);
    }
    for (int i = 0; i < y->n_reads; ++i) {
      if (x->n_reads == max_atom_reads) return std::nullopt;
      LinearRead& read = x->reads[x->n_reads++] = y->reads[i];
      fits = fits && below(by * read.factor, max_factor);
      read.factor = static_cast<int>(by * read.factor);
    }
    if (!fits) return std::nullopt;
    return x;
  }

  Form linear(const Expr& expr) {
    if (++visits_ > max_visits) return std::nullopt;
    const Node& node = expr.node();
    LinearAtom form{};
    switch (node.op) {
      case Op::constant:
        form.constant = static_cast<int64_t>(node.value);
        return form;
      case Op::variable:
        form.factor[static_cast<int>(node.var)] = 1;
        return form;
      case Op::capture:
        return read(node);
      case Op::add:
        return sum(linear(node.args[0]), linear(node.args[1]), 1);
      case Op::sub:
        return sum(linear(node.args[0]), linear(node.args[1]), -1);
      case Op::neg:
        return sum(form, linear(node.args[0]), -1);
      case Op::mul:
        for (size_t k = 0; k < 2; ++k) {
          const Node& factor = node.args[k].node();
          if (factor.op == Op::constant)
            return sum(form, linear(node.args[1 - k]), static_cast<int64_t>(factor.value));
        }
        return std::nullopt;
      default:
        return std::nullopt;
    }
  }

  // Of indices that are variables, at most one of which moves within a block.
  Form read(const Node& node) const {
    const auto found = std::find(captures_.begin(), captures_.end(), *node.capture);
    if (found == captures_.end() || found->type() != Type::integer) return std::nullopt;
    LinearAtom form{};
    form.n_reads = 1;
    LinearRead& read = form.reads[0];
    read.factor = 1;
    read.capture = static_cast<int>(found - captures_.begin());
    read.n_axes = static_cast<int>(node.args.size());
    int moving = 0;
    for (int axis = 0; axis < read.n_axes; ++axis) {
      const Node& index = node.args[static_cast<size_t>(axis)].node();
      const bool position = index.var == Var::q || index.var == Var::kv;
      if (index.op != Op::variable || !(position || index.var == Var::b || index.var == Var::h))
        return std::nullopt;
      read.index[axis] = index.var;
      moving += position;
    }
    if (moving > 1) return std::nullopt;
    return form;
  }

  std::span<const Capture> captures_;
  int visits_ = 0;
};

}  // namespace

std::optional<LinearMask> linear_mask(const Expr& mask, std::span<const Capture> captures) {
  check_mask(mask);
  std::optional<Clauses> clauses = Linearizer(captures).clauses(mask, false);
  if (!clauses) return std::nullopt;
  std::stable_partition(clauses->begin(), clauses->end(), [](const Atoms& atoms) {
    return std::all_of(atoms.begin(), atoms.end(), [](const LinearAtom& a) { return a.n_reads == 0; });
  });
  LinearMask result{};
  int n_reads = 0;
  for (Atoms& atoms : *clauses) {
    if (atoms.size() > max_clause_atoms) return std::nullopt;
    for (LinearAtom& atom : atoms) {
      for (int i = 0; i < atom.n_reads; ++i) atom.reads[i].number = n_reads++;
    }
    std::copy(atoms.begin(), atoms.end(), result.atoms[result.n_clauses]);
    result.n_atoms[result.n_clauses++] = static_cast<int>(atoms.size());
  }
  if (n_reads > max_mask_reads) return std::nullopt;
  return result;
}

}  // namespace flexchat::flex
