// Flattening by depth-first walk; hash-consing has already made common subexpressions one node.
#include "flex/program.h"

#include <algorithm>
#include <unordered_map>

namespace flexchat::flex {
namespace {

struct Flattener {
  Program& program;
  std::unordered_map<const Node*, int> place;

  int capture_index(const Capture& capture) {
    auto& list = program.captures;
    const auto found = std::find(list.begin(), list.end(), capture);
    if (found != list.end()) return static_cast<int>(found - list.begin());
    list.push_back(capture);
    return static_cast<int>(list.size()) - 1;
  }

  int visit(const Expr& expr) {
    const Node& node = expr.node();
    if (const auto found = place.find(&node); found != place.end()) return found->second;
    Instruction instruction{.op = node.op,
                            .type = node.type,
                            .var = node.var,
                            .value = node.value,
                            .capture = node.capture ? capture_index(*node.capture) : -1,
                            .n_args = static_cast<int>(node.args.size()),
                            .args = {}};
    for (size_t i = 0; i < node.args.size(); ++i) instruction.args[i] = visit(node.args[i]);
    program.code.push_back(instruction);
    return place[&node] = static_cast<int>(program.code.size()) - 1;
  }
};

}  // namespace

Program::Program(const std::vector<Expr>& expressions) {
  Flattener flattener{*this, {}};
  for (const Expr& expr : expressions) roots.push_back(flattener.visit(expr));
}

}  // namespace flexchat::flex
