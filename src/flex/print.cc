// Expressions as text: the fewest parentheses that parse back to the same graph.
#include <cmath>

#include "flex/expr.h"
#include "flex/language.h"

#include <fmt/core.h>

namespace flexchat::flex {
namespace {

std::string constant_text(const Node& node) {
  if (node.type == Type::boolean) return node.value != 0 ? "true" : "false";
  if (node.type == Type::integer) return fmt::format("{:.0f}", node.value);
  if (std::isinf(node.value)) return node.value > 0 ? "inf" : "-inf";
  std::string text = fmt::format("{}", node.value);  // the shortest text that reads back exactly
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

void print(const Expr& expr, std::string& out);

// An operand that must bind at least as tightly as `precedence`.
void print_operand(const Expr& expr, int precedence, std::string& out) {
  const bool parenthesised = op_precedence(expr.node().op) < precedence;
  if (parenthesised) out += '(';
  print(expr, out);
  if (parenthesised) out += ')';
}

void print_list(const std::vector<Expr>& args, char open, char close, std::string& out) {
  out += open;
  for (size_t i = 0; i < args.size(); ++i) {
    if (i > 0) out += open == '[' ? "," : ", ";
    print(args[i], out);
  }
  out += close;
}

void print(const Expr& expr, std::string& out) {
  const Node& node = expr.node();
  const int precedence = op_precedence(node.op);
  if (node.op == Op::constant) {
    out += constant_text(node);
  } else if (node.op == Op::variable) {
    out += var_name(node.var);
  } else if (node.op == Op::capture) {
    out += node.capture->name();
    print_list(node.args, '[', ']', out);
  } else if (is_infix(node.op)) {
    // All infix operators group to the left; comparisons do not chain at all.
    const bool comparison = node.type == Type::boolean && precedence == op_precedence(Op::lt);
    print_operand(node.args[0], precedence + (comparison ? 1 : 0), out);
    out += fmt::format(" {} ", op_name(node.op));
    print_operand(node.args[1], precedence + 1, out);
  } else if (precedence == unary_precedence) {
    out += op_name(node.op);
    print_operand(node.args[0], unary_precedence, out);
  } else {
    out += op_name(node.op);
    print_list(node.args, '(', ')', out);
  }
}

}  // namespace

std::string to_text(const Expr& expr) {
  std::string out;
  print(expr, out);
  return out;
}

}  // namespace flexchat::flex
