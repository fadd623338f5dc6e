// From a straight-line program to phases, typed operations and slots.
#include "flex/tile_program.h"

#include <bit>
#include <map>

#include "base/error.h"

namespace flexchat::flex {
namespace {

// The operation on numbers, and on integers, that computes `op`.
TileOp tile_op(Op op, bool integers) {
  switch (op) {
    case Op::add:
      return integers ? TileOp::add_i : TileOp::add;
    case Op::sub:
      return integers ? TileOp::sub_i : TileOp::sub;
    case Op::mul:
      return integers ? TileOp::mul_i : TileOp::mul;
    case Op::neg:
      return integers ? TileOp::neg_i : TileOp::neg;
    case Op::lt:
      return integers ? TileOp::lt_i : TileOp::lt;
    case Op::le:
      return integers ? TileOp::le_i : TileOp::le;
    case Op::eq:
      return integers ? TileOp::eq_i : TileOp::eq;
    case Op::ne:
      return integers ? TileOp::ne_i : TileOp::ne;
    case Op::min:
      return integers ? TileOp::min_i : TileOp::min;
    case Op::max:
      return integers ? TileOp::max_i : TileOp::max;
    case Op::abs:
      return integers ? TileOp::abs_i : TileOp::abs;
    case Op::floor_div:
      return TileOp::floor_div_i;
    case Op::mod:
      return TileOp::mod_i;
    case Op::div:
      return TileOp::div;
    case Op::exp:
      return TileOp::exp;
    case Op::log:
      return TileOp::log;
    case Op::tanh:
      return TileOp::tanh;
    case Op::sigmoid:
      return TileOp::sigmoid;
    case Op::softplus:
      return TileOp::softplus;
    case Op::pow:
      return TileOp::pow;
    case Op::sqrt:
      return TileOp::sqrt;
    case Op::logical_and:
      return TileOp::logical_and;
    case Op::logical_or:
      return TileOp::logical_or;
    case Op::logical_not:
      return TileOp::logical_not;
    case Op::where:
      return TileOp::where;
    case Op::constant:
    case Op::variable:
    case Op::capture:
      break;
  }
  fail("'{}' is not an operation on tiles", static_cast<int>(op));
}

TilePhase phase_of(Var var) {
  switch (var) {
    case Var::score:
      return TilePhase::elements;
    case Var::q:
      return TilePhase::rows;
    case Var::kv:
      return TilePhase::keys;
    default:
      return TilePhase::uniform;
  }
}

TilePhase combine(TilePhase x, TilePhase y) {
  if (x == y || y == TilePhase::uniform) return x;
  return x == TilePhase::uniform ? y : TilePhase::elements;
}

std::vector<int64_t> row_major_strides(const Tensor& tensor) {
  std::vector<int64_t> strides(static_cast<size_t>(tensor.rank()), 1);
  for (size_t i = strides.size() - 1; i > 0; --i)
    strides[i - 1] = strides[i] * tensor.dim(static_cast<int>(i));
  return strides;
}

Tensor as_tile_data(const Tensor& tensor, const Capture& capture) {
  check(tensor.numel() < int64_t{1} << 31, "captured tensor {} has {} elements; allowed are fewer than 2^31",
        capture.signature(), tensor.numel());
  check(tensor.arena().host(), "captured tensor {} must be in host memory", capture.signature());
  const DType wanted = capture.type() == Type::integer ? DType::i32 : DType::f32;
  if (tensor.dtype() == wanted) return tensor;
  const Tensor copy(host_arena(), tensor.shape(), wanted);
  for (int64_t i = 0; i < copy.numel(); ++i) copy.set(i, tensor.get(i));
  return copy;
}

}  // namespace

class TileCompiler {
 public:
  TileCompiler(TileProgram& out, const Program& program) : out_(out), program_(program) {}

  void instruction(size_t i) {
    const Instruction& in = program_.code[i];
    if (in.op == Op::constant) {
      place_.push_back(in.type == Type::number
                           ? constant(std::bit_cast<int32_t>(static_cast<float>(in.value)))
                       : in.type == Type::boolean ? constant(in.value != 0 ? -1 : 0)
                                                  : constant(static_cast<int32_t>(in.value)));
    } else if (in.op == Op::variable) {
      place_.push_back(variable(in.var));
    } else if (in.op == Op::capture) {
      const Tensor& tensor = out_.captures[static_cast<size_t>(in.capture)];
      const TileAccess at = access(in, row_major_strides(tensor));
      TileInstruction load{.op = at.kind == TileIndex::contiguous ? TileOp::load : TileOp::gather,
                           .args = {at.reg, -1, -1},
                           .capture = in.capture};
      const TilePhase phase =
          at.kind == TileIndex::contiguous ? combine(phase_of(at.reg), TilePhase::keys) : phase_of(at.reg);
      place_.push_back(emit(load, phase));
    } else {
      place_.push_back(operation(in));
    }
  }

  int number(size_t i) { return program_.code[i].type == Type::integer ? to_number(place_[i]) : place_[i]; }
  int place(size_t i) const { return place_[i]; }

  // The offset sum of index * stride. Where the last axis that moves is `kv` itself with stride 1 and nothing
  // else depends on kv or score, kv stays out of the register.
  TileAccess access(const Instruction& in, const std::vector<int64_t>& strides) {
    int sum = -1;
    bool contiguous = false;
    const auto n = static_cast<size_t>(in.n_args);
    for (size_t axis = 0; axis < n; ++axis) {
      const auto index = static_cast<size_t>(in.args[axis]);
      const Instruction& leaf = program_.code[index];
      if (strides[axis] == 0) continue;
      if (!contiguous && strides[axis] == 1 && leaf.op == Op::variable && leaf.var == Var::kv) {
        contiguous = true;
        continue;
      }
      const int term = binary(TileOp::mul_i, place_[index], constant(static_cast<int32_t>(strides[axis])));
      sum = sum < 0 ? term : binary(TileOp::add_i, sum, term);
    }
    if (sum < 0) sum = constant(0);
    const TilePhase phase = phase_of(sum);
    const bool still = phase == TilePhase::uniform || phase == TilePhase::rows;
    if (contiguous && still) return {TileIndex::contiguous, sum};
    if (contiguous) sum = binary(TileOp::add_i, sum, variable(Var::kv));
    return {still && !contiguous ? TileIndex::row : TileIndex::scattered, sum};
  }

  // Drops what no output needs, such as the values behind wanted offsets.
  void drop_unused() {
    std::vector<bool> needed(out_.registers.size(), false);
    const auto need = [&](int reg) { needed[static_cast<size_t>(reg)] = true; };
    for (const int root : out_.roots) need(root);
    for (const TileAccess& a : out_.accesses) need(a.reg);
    std::vector<const TileInstruction*> writer(needed.size(), nullptr);
    for (const auto& code : out_.code) {
      for (const TileInstruction& in : code) writer[static_cast<size_t>(in.dst)] = &in;
    }
    for (size_t r = needed.size(); r-- > 0;) {  // operands have lower numbers than results
      for (const int arg : writer[r]->args) {
        if (needed[r] && arg >= 0) need(arg);
      }
    }
    for (auto& code : out_.code) {
      std::erase_if(code, [&](const TileInstruction& in) { return !needed[static_cast<size_t>(in.dst)]; });
    }
  }

  // Gives values of elements their slots: one is free after its last reader.
  void allocate() {
    auto& code = out_.code[static_cast<size_t>(TilePhase::elements)];
    std::vector<size_t> last(out_.registers.size(), 0);
    for (size_t i = 0; i < code.size(); ++i) {
      for (const int arg : code[i].args) {
        if (arg >= 0) last[static_cast<size_t>(arg)] = i;
      }
    }
    const auto keep = [&](int reg) { last[static_cast<size_t>(reg)] = code.size(); };
    for (const int root : out_.roots) keep(root);
    for (const TileAccess& a : out_.accesses) keep(a.reg);
    std::vector<int> free;
    int& n_slots = out_.n_slots[static_cast<size_t>(TilePhase::elements)];
    for (size_t i = 0; i < code.size(); ++i) {
      for (size_t k = 0; k < code[i].args.size(); ++k) {
        const int arg = code[i].args[k];
        if (arg < 0 || phase_of(arg) != TilePhase::elements || last[static_cast<size_t>(arg)] != i) continue;
        if (k > 0 && (arg == code[i].args[0] || (k > 1 && arg == code[i].args[1]))) continue;
        free.push_back(out_.registers[static_cast<size_t>(arg)].slot);
      }
      if (free.empty()) free.push_back(n_slots++);
      out_.registers[static_cast<size_t>(code[i].dst)].slot = free.back();
      free.pop_back();
    }
  }

  void collect_row_operands() {
    std::vector<bool> read(out_.registers.size(), false);
    for (const TileInstruction& in : out_.code[static_cast<size_t>(TilePhase::elements)]) {
      for (const int arg : in.args) {
        if (arg >= 0) read[static_cast<size_t>(arg)] = true;
      }
    }
    for (const int root : out_.roots) read[static_cast<size_t>(root)] = true;
    for (const TileAccess& a : out_.accesses) read[static_cast<size_t>(a.reg)] = true;
    for (size_t r = 0; r < read.size(); ++r) {
      if (read[r] && out_.registers[r].phase == TilePhase::rows)
        out_.row_operands.push_back(static_cast<int>(r));
    }
  }

 private:
  TilePhase phase_of(int reg) const { return out_.registers[static_cast<size_t>(reg)].phase; }
  static TilePhase phase_of(Var var) { return flex::phase_of(var); }

  int emit(TileInstruction in, TilePhase phase) {
    const auto p = static_cast<size_t>(phase);
    in.dst = static_cast<int>(out_.registers.size());
    out_.registers.push_back({phase, phase == TilePhase::elements ? -1 : out_.n_slots[p]++});
    out_.code[p].push_back(in);
    return in.dst;
  }

  int constant(int32_t bits) {
    const auto [found, is_new] = constants_.try_emplace(bits, -1);
    if (is_new) found->second = emit({.op = TileOp::constant, .bits = bits}, TilePhase::uniform);
    return found->second;
  }

  int variable(Var var) {
    const auto [found, is_new] = variables_.try_emplace(var, -1);
    if (is_new) found->second = emit({.op = TileOp::variable, .var = var}, phase_of(var));
    return found->second;
  }

  int to_number(int reg) {
    const auto [found, is_new] = numbers_.try_emplace(reg, -1);
    if (is_new) found->second = emit({.op = TileOp::to_number, .args = {reg, -1, -1}}, phase_of(reg));
    return found->second;
  }

  int binary(TileOp op, int x, int y) {
    if (op == TileOp::mul_i && y == constant(1)) return x;
    return emit({.op = op, .args = {x, y, -1}}, combine(phase_of(x), phase_of(y)));
  }

  int operation(const Instruction& in) {
    const auto n = static_cast<size_t>(in.n_args);
    bool integers = true, booleans = false;
    for (size_t k = 0; k < n; ++k) {
      const Type type = program_.code[static_cast<size_t>(in.args[k])].type;
      if (k == 0 && in.op == Op::where) continue;
      integers = integers && type == Type::integer;
      booleans = booleans || type == Type::boolean;
    }
    TileInstruction out{.op = tile_op(in.op, integers)};
    TilePhase phase = TilePhase::uniform;
    // Operands that are not all integers are numbers, and so are those of functions such as exp.
    const bool numbers = !booleans && (!integers || (in.type == Type::number && in.op != Op::where));
    for (size_t k = 0; k < n; ++k) {
      const auto arg = static_cast<size_t>(in.args[k]);
      const bool convert = numbers && program_.code[arg].type == Type::integer;
      out.args[k] = convert ? to_number(place_[arg]) : place_[arg];
      phase = combine(phase, phase_of(out.args[k]));
    }
    return emit(out, phase);
  }

  TileProgram& out_;
  const Program& program_;
  std::vector<int> place_;  // the register of each instruction
  std::map<int32_t, int> constants_;
  std::map<Var, int> variables_;
  std::map<int, int> numbers_;  // integer registers that have been converted
};

TileProgram::TileProgram(const std::vector<Expr>& expressions, const Bindings& bindings,
                         const std::vector<Access>& wanted) {
  // The indices of wanted accesses are computed beside the expressions themselves.
  std::vector<Expr> all = expressions;
  for (const Access& a : wanted) all.push_back(a.access);
  const Program program(all);
  for (const Capture& capture : program.captures)
    captures.push_back(as_tile_data(bindings.at(capture), capture));

  TileCompiler compiler(*this, program);
  for (size_t i = 0; i < program.code.size(); ++i) compiler.instruction(i);
  for (size_t i = 0; i < expressions.size(); ++i) {
    const auto root = static_cast<size_t>(program.roots[i]);
    roots.push_back(compiler.number(root));
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto root = static_cast<size_t>(program.roots[expressions.size() + i]);
    accesses.push_back(compiler.access(program.code[root], wanted[i].strides));
  }
  compiler.drop_unused();
  compiler.allocate();
  compiler.collect_row_operands();
}

}  // namespace flexchat::flex
