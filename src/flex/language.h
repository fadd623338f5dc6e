// The words and symbols of the expression language: one table that the builder, the parser and the printer
// share.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flex/expr.h"

namespace flexchat::flex {

size_t op_arity(Op op);
bool is_infix(Op op);  // written between its operands

// How tightly an operator binds: a larger number binds tighter. Functions and leaves bind tightest.
int op_precedence(Op op);
constexpr int unary_precedence = 6, primary_precedence = 7;

std::optional<Op> find_infix(std::string_view symbol);    // "+"; not ">" and ">=", which swap operands
std::optional<Op> find_function(std::string_view name);   // "tanh"
std::optional<Var> find_variable(std::string_view name);  // "kv"
std::optional<Axis> find_axis(std::string_view name);     // "pos"

std::vector<std::string> function_names();
std::vector<std::string> variable_names();

// Names that no captured tensor may take.
bool is_reserved(std::string_view name);

}  // namespace flexchat::flex
