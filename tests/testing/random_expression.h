// Random, well-typed expressions for property tests.
#pragma once

#include <vector>

#include "base/rng.h"
#include "flex/expr.h"

namespace flexchat::flex {

class RandomExpressions {
 public:
  // Leaves: the position variables, `score` when asked for, small constants, and accesses of `captures`.
  RandomExpressions(uint64_t seed, std::vector<Capture> captures, bool with_score)
      : rng_(seed), captures_(std::move(captures)), with_score_(with_score) {}

  Expr number(int depth) {
    if (depth <= 0) return number_leaf();
    switch (rng_.below(14)) {
      case 0:
      case 1:
        return number(depth - 1) + number(depth - 1);
      case 2:
        return number(depth - 1) - number(depth - 1);
      case 3:
        return number(depth - 1) * number(depth - 1);
      case 4:
        return number(depth - 1) / (1.5 + abs(number(depth - 1)));
      case 5:
        return min(number(depth - 1), number(depth - 1));
      case 6:
        return max(number(depth - 1), number(depth - 1));
      case 7:
        return where(boolean(depth - 1), number(depth - 1), number(depth - 1));
      case 8:
        return exp(tanh(number(depth - 1)));
      case 9:
        return log(0.5 + abs(number(depth - 1)));
      case 10:
        return sigmoid(number(depth - 1));
      case 11:
        return softplus(-number(depth - 1));
      case 12:
        return pow(0.25 + sigmoid(number(depth - 1)), number(0));
      default:
        return sqrt(1.0 + abs(number(depth - 1)));
    }
  }

  Expr integer(int depth) {
    if (depth <= 0) return integer_leaf();
    switch (rng_.below(11)) {
      case 0:
      case 1:
      case 2:
        return integer(depth - 1) - integer(depth - 1);
      case 3:
        return integer(depth - 1) + integer(depth - 1);
      case 4:
        return integer(depth - 1) * small();
      case 5:
        return floor_div(integer(depth - 1), divisor(depth - 1));
      case 6:
        return integer(depth - 1) % divisor(depth - 1);
      case 7:
        return min(integer(depth - 1), integer(depth - 1));
      case 8:
        return abs(integer(depth - 1));
      case 9:
        return -integer(depth - 1);
      default:
        return where(boolean(depth - 1), integer(depth - 1), integer(depth - 1));
    }
  }

  Expr boolean(int depth) {
    if (depth <= 0) return comparison(integer(0), integer(0));
    switch (rng_.below(8)) {
      case 0:
      case 1:
        return boolean(depth - 1) && boolean(depth - 1);
      case 2:
        return boolean(depth - 1) || boolean(depth - 1);
      case 3:
        return !boolean(depth - 1);
      case 4:
        return comparison(number(depth - 1), number(depth - 1));
      default:
        return comparison(integer(depth - 1), integer(depth - 1));
    }
  }

  Rng& rng() { return rng_; }

 private:
  int64_t small() { return static_cast<int64_t>(rng_.below(13)) - 4; }
  // Mostly a constant; sometimes an expression that may be zero at some points.
  Expr divisor(int depth) {
    const Expr x = rng_.below(4) == 0 ? integer(depth) : Expr(small());
    return x.is_constant(0) ? Expr(5) : x;
  }
  Expr n() { return rng_.below(2) == 0 ? variables().n_q : variables().n_kv; }

  Expr comparison(const Expr& x, const Expr& y) {
    switch (rng_.below(6)) {
      case 0:
      case 1:
        return x < y;
      case 2:
      case 3:
        return x <= y;
      case 4:
        return x == y;
      default:
        return x != y;
    }
  }

  Expr access(Type type) {
    const Variables v = variables();
    for (int attempt = 0; attempt < 8 && !captures_.empty(); ++attempt) {
      const Capture& capture = captures_[rng_.below(captures_.size())];
      if (capture.type() != type) continue;
      std::vector<Expr> index;
      for (const Axis axis : capture.axes()) {
        const bool q = axis == Axis::q || (axis != Axis::kv && rng_.below(2) == 0);
        index.push_back(axis == Axis::b ? v.b : axis == Axis::h ? v.h : q ? v.q : v.kv);
      }
      return capture.at(index);
    }
    return small();
  }

  Expr integer_leaf() {
    const Variables v = variables();
    const std::vector<Expr> leaves = {v.q, v.kv, v.q, v.kv, v.q - v.kv, v.b, v.h, n()};
    const uint64_t pick = rng_.below(leaves.size() + 4);
    if (pick < leaves.size()) return leaves[pick];
    return pick < leaves.size() + 2 ? Expr(small()) : access(Type::integer);
  }

  Expr number_leaf() {
    const uint64_t pick = rng_.below(6);
    if (with_score_ && pick < 3) return variables().score;
    if (pick == 3) return static_cast<double>(small()) * 0.375;
    if (pick == 4) return access(Type::number);
    return integer_leaf() / 8;
  }

  Rng rng_;
  std::vector<Capture> captures_;
  bool with_score_;
};

}  // namespace flexchat::flex
