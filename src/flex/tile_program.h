// Expressions compiled for vector units that work on tiles of (queries x keys): a list of operations over
// contiguous keys in f32 and int32, split by how often a value has to be computed.
//
//   uniform   depends on neither q, kv nor score: once a (batch row, head)
//   rows      depends on q: once a query row
//   keys      depends on kv: once a block of keys, shared by all rows of the tile
//   elements  depends on score, or on q and kv: for every element
//
// Numbers are f32, integers int32, booleans int32 with all bits set or none; meanings are those of expr.h.
// Accesses of captured tensors become offsets: `load` where consecutive keys read consecutive elements,
// `gather` otherwise. The executor is the backend's (backend/cpu/flex_tile-inl.h).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "flex/bindings.h"
#include "flex/program.h"

namespace flexchat::flex {

enum class TilePhase : uint8_t { uniform, rows, keys, elements };
constexpr int n_tile_phases = 4;

enum class TileOp : uint8_t {
  constant,   // `bits`
  variable,   // `var`
  load,       // data[args[0] + kv]; args[0] is uniform or of rows
  gather,     // data[args[0]]
  to_number,  // of an integer
  // numbers
  add,
  sub,
  mul,
  div,
  neg,
  min,
  max,
  abs,
  exp,
  log,
  tanh,
  sigmoid,
  softplus,
  pow,
  sqrt,
  lt,
  le,
  eq,
  ne,
  // integers
  add_i,
  sub_i,
  mul_i,
  floor_div_i,
  mod_i,
  neg_i,
  min_i,
  max_i,
  abs_i,
  lt_i,
  le_i,
  eq_i,
  ne_i,
  // booleans, and a choice between any two of a kind
  logical_and,
  logical_or,
  logical_not,
  where
};

struct TileInstruction {
  TileOp op;
  int dst = -1;
  std::array<int, 3> args{-1, -1, -1};  // registers
  int32_t bits = 0;                     // constant
  Var var = Var::score;                 // variable
  int capture = -1;                     // load, gather: index into TileProgram::captures
};

// Where a value lives: one of the slots of its phase. Slots of elements are reused once their value is dead.
struct TileRegister {
  TilePhase phase;
  int slot;
};

// How an access of a captured tensor runs over the keys of a row.
enum class TileIndex : uint8_t {
  row,         // all keys read the same element: the register holds its offset
  contiguous,  // key kv reads the register's value + kv; the register is uniform or of rows
  scattered    // the register holds each key's offset
};
struct TileAccess {
  TileIndex kind;
  int reg;
};

class TileProgram {
 public:
  // An access whose offset is wanted as an output, with the strides to compute it by.
  struct Access {
    Expr access;
    std::vector<int64_t> strides;
  };
  // Errors: captured tensors of 2^31 elements or more.
  TileProgram(const std::vector<Expr>& expressions, const Bindings& bindings,
              const std::vector<Access>& accesses = {});

  std::vector<TileRegister> registers;
  std::array<std::vector<TileInstruction>, n_tile_phases> code;
  std::array<int, n_tile_phases> n_slots{};
  std::vector<int> row_operands;  // registers of rows that elements or outputs read
  std::vector<int> roots;         // the register of each expression; a number's is f32
  std::vector<TileAccess> accesses;
  // Captured tensors as host f32 or i32, contiguous: the bound tensor itself when it is that already.
  std::vector<Tensor> captures;

 private:
  friend class TileCompiler;
};

}  // namespace flexchat::flex
