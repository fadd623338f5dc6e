// An expression as a straight-line program: every distinct node once, operands before their users. It is what
// evaluators, interval analysis and code emitters walk; none of them recurses over the graph.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "flex/expr.h"

namespace flexchat::flex {

struct Instruction {
  Op op;
  Type type;
  Var var;                  // op variable
  double value;             // op constant
  int capture;              // op capture: index into Program::captures
  int n_args;               // operands, or indices of a capture
  std::array<int, 4> args;  // earlier instructions
};

struct Program {
  explicit Program(const std::vector<Expr>& expressions);

  std::vector<Instruction> code;
  std::vector<Capture> captures;  // each once
  std::vector<int> roots;         // the instruction of each expression
};

}  // namespace flexchat::flex
