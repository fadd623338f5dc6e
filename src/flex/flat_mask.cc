#include "flex/flat_mask.h"

#include "flex/program.h"

namespace flexchat::flex {
namespace {

bool reads_captures(const Expr& expr) { return !Program({expr}).captures.empty(); }

// The access of an instruction, unless its indices are more than variables or several of them move.
std::optional<FlatAccess> flat_access(const Program& program, const Instruction& in,
                                      std::span<const Capture> captures) {
  const auto found =
      std::find(captures.begin(), captures.end(), program.captures[static_cast<size_t>(in.capture)]);
  if (found == captures.end()) return std::nullopt;
  FlatAccess access{
      static_cast<int>(found - captures.begin()), found->type() == Type::integer, in.n_args, {}};
  int moving = 0;
  for (int axis = 0; axis < in.n_args; ++axis) {
    const Instruction& index = program.code[static_cast<size_t>(in.args[static_cast<size_t>(axis)])];
    const bool position = index.var == Var::q || index.var == Var::kv;
    if (index.op != Op::variable || !(position || index.var == Var::b || index.var == Var::h))
      return std::nullopt;
    access.index[axis] = index.var;
    moving += position;
  }
  if (moving > 1) return std::nullopt;
  return access;
}

Scope scope_of(uint32_t vars) {
  const bool q = (vars >> static_cast<int>(Var::q) & 1) != 0, kv = (vars >> static_cast<int>(Var::kv) & 1) != 0;
  return q && kv ? Scope::both : kv ? Scope::keys : q ? Scope::queries : Scope::row;
}

}  // namespace

std::vector<Expr> split_terms(const Expr& mask, size_t most) {
  std::vector<Expr> terms = {mask};
  for (size_t i = 0; i < terms.size();) {
    const Expr term = terms[i];
    if (term.node().op != Op::logical_and || terms.size() == most) {
      ++i;
      continue;
    }
    terms[i] = term.node().args[0];
    terms.push_back(term.node().args[1]);
  }
  return terms;
}

std::optional<FlatMask> flatten_mask(const Expr& mask, std::span<const Capture> captures) {
  check_mask(mask);
  std::vector<Expr> terms = split_terms(mask, max_flat_terms);
  std::stable_partition(terms.begin(), terms.end(), [](const Expr& term) { return !reads_captures(term); });
  const Program program(terms);
  if (program.code.size() > max_flat_code) return std::nullopt;

  FlatMask flat{};
  flat.n_code = static_cast<int>(program.code.size());
  std::vector<uint32_t> vars(program.code.size());
  for (size_t i = 0; i < program.code.size(); ++i) {
    const Instruction& in = program.code[i];
    if (needs_library(in.op)) return std::nullopt;
    FlatInstruction& to = flat.code[i];
    to.op = in.op;
    to.type = in.type;
    to.var = in.var;
    to.value = in.value;
    if (in.op == Op::variable) vars[i] = 1u << static_cast<int>(in.var);
    to.of_integers = true;
    for (int k = 0; k < 3; ++k) {  // operands that an operator does not have repeat its first
      const int arg = in.args[static_cast<size_t>(k < in.n_args ? k : 0)];
      to.args[k] = static_cast<int8_t>(arg);
    }
    for (int k = 0; k < in.n_args; ++k) {
      const auto arg = static_cast<size_t>(in.args[static_cast<size_t>(k)]);
      vars[i] |= vars[arg];
      to.of_integers = to.of_integers && program.code[arg].type == Type::integer;
    }
    to.scope = scope_of(vars[i]);
    if (in.op != Op::capture) continue;
    const std::optional<FlatAccess> access = flat_access(program, in, captures);
    if (!access || flat.n_accesses == max_flat_accesses) return std::nullopt;
    to.args[0] = static_cast<int8_t>(flat.n_accesses);
    flat.accesses[flat.n_accesses++] = *access;
  }
  for (const int root : program.roots) flat.terms[flat.n_terms++] = static_cast<int8_t>(root);
  return flat;
}

}  // namespace flexchat::flex
