// The tile interpreter: runs a flex::TileProgram over a tile of queries x keys, one operation after the other
// over up to kTileKeys contiguous keys, so that an operation's dispatch is shared by many vectors and its
// operands stay in L1. Included once per SIMD target.
//
// A value of `uniform` or of one query row is kept as one vector of copies and read with step 0, any other
// with step 1: one loop serves every mixture of operands.
#if defined(FLEXCHAT_FLEX_TILE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FLEXCHAT_FLEX_TILE_INL_H
#undef FLEXCHAT_FLEX_TILE_INL_H
#else
#define FLEXCHAT_FLEX_TILE_INL_H
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cpu/attention_kernels-inl.h"
#include "backend/cpu/attention_plan.h"
#include "backend/cpu/flex_math-inl.h"
#include "backend/cpu/simd-inl.h"
#include "flex/tile_program.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

using flex::TileInstruction;
using flex::TileOp;
using flex::TilePhase;
using flex::TileProgram;

constexpr int64_t kTileKeys = 240;  // keys of a tile: whole blocks of the mask, registers of 1 KB

// A register's lanes: those of vector i begin at data + i * step. Integers and booleans are bits of floats.
struct TileOperand {
  float* data = nullptr;
  int64_t step = 0;
  HWY_INLINE VF at(int64_t i) const { return hn::LoadU(F32(), data + i * step); }
  HWY_INLINE VI bits(int64_t i) const { return hn::BitCast(I32(), at(i)); }
  HWY_INLINE int32_t first_integer() const {
    int32_t x;
    std::memcpy(&x, data, sizeof(x));
    return x;
  }
};

class TileMachine {
 public:
  // Of one batch row and head; computes what is uniform. A null program computes nothing.
  void start(const TileProgram* program, int64_t b, int64_t h, int64_t n_q, int64_t n_kv, float scale) {
    program_ = program;
    if (!program) return;
    uniform_variables_[static_cast<size_t>(flex::Var::b)] = static_cast<int32_t>(b);
    uniform_variables_[static_cast<size_t>(flex::Var::h)] = static_cast<int32_t>(h);
    uniform_variables_[static_cast<size_t>(flex::Var::n_q)] = static_cast<int32_t>(n_q);
    uniform_variables_[static_cast<size_t>(flex::Var::n_kv)] = static_cast<int32_t>(n_kv);
    scale_ = scale;
    place_registers();
    execute(TilePhase::uniform, {0, vector_lanes()}, at_);
  }
  bool has_program() const { return program_ != nullptr; }

  // Query rows at positions [first, first + n), n <= kBackwardRows.
  void rows(int64_t first, int64_t n) {
    first_row_ = static_cast<int32_t>(first);
    execute(TilePhase::rows, {0, round_up(n, vector_lanes())}, rows_at_);
  }
  // Keys at positions [first, first + n), n <= kTileKeys.
  void keys(int64_t first, int64_t n) {
    first_key_ = first;
    execute(TilePhase::keys, {0, round_up(n, vector_lanes())}, at_);
  }
  // The elements of row r of the rows and keys [begin, end) of the keys, whole vectors. scores[i] is the
  // product q.k of key i.
  void run(int64_t r, const cpu::Range& keys, const float* scores) {
    for (const int reg : program_->row_operands) {
      const auto i = static_cast<size_t>(reg);
      hn::StoreU(set(rows_at_[i].data[r]), F32(), at_[i].data);
    }
    scores_ = scores;
    execute(TilePhase::elements, keys, at_);
  }

  // Outputs, valid until the next run().
  TileOperand root(size_t i) const { return at_[static_cast<size_t>(program_->roots[i])]; }
  TileOperand offsets(size_t access) const {
    return at_[static_cast<size_t>(program_->accesses[access].reg)];
  }
  const TileProgram& program() const { return *program_; }

 private:
  void place_registers() {
    const TileProgram& p = *program_;
    const int64_t lanes = vector_lanes(), n_rows = round_up(cpu::kBackwardRows, lanes),
                  n_keys = round_up(kTileKeys, lanes);
    const std::array<int64_t, flex::n_tile_phases> width = {lanes, n_rows, n_keys, n_keys};
    std::array<float*, flex::n_tile_phases> bank;
    int64_t total = p.n_slots[1] * lanes;  // and the copies of rows
    for (size_t i = 0; i < bank.size(); ++i) total += p.n_slots[i] * width[i];
    float* memory = buffer_.reserve(total);
    for (size_t i = 0; i < bank.size(); ++i) {
      bank[i] = memory;
      memory += p.n_slots[i] * width[i];
    }
    at_.resize(p.registers.size());
    rows_at_.resize(p.registers.size());
    for (size_t i = 0; i < at_.size(); ++i) {
      const flex::TileRegister& reg = p.registers[i];
      const auto phase = static_cast<size_t>(reg.phase);
      const bool still = reg.phase == TilePhase::uniform;
      at_[i] = rows_at_[i] = {bank[phase] + reg.slot * width[phase], still ? 0 : 1};
      if (reg.phase == TilePhase::rows) at_[i] = {memory + reg.slot * lanes, 0};
    }
  }

  template <class Fn>
  static HWY_INLINE void for_each(const cpu::Range& range, float* out, const Fn& fn) {
    const int64_t lanes = vector_lanes();
    for (int64_t i = range.begin; i < range.end; i += lanes) hn::StoreU(fn(i), F32(), out + i);
  }
  static HWY_INLINE VF as_float(VI v) { return hn::BitCast(F32(), v); }
  static HWY_INLINE VF truth(hn::Mask<F32> m) { return hn::VecFromMask(F32(), m); }
  static HWY_INLINE VF truth_i(hn::Mask<I32> m) { return as_float(hn::VecFromMask(I32(), m)); }

  void execute(TilePhase phase, const cpu::Range& range, const std::vector<TileOperand>& at) {
    for (const TileInstruction& in : program_->code[static_cast<size_t>(phase)]) {
      const auto arg = [&](size_t k) {
        return in.args[k] < 0 ? TileOperand{} : at[static_cast<size_t>(in.args[k])];
      };
      float* out = at[static_cast<size_t>(in.dst)].data;
      if (in.op < TileOp::add) {
        leaf(in, range, arg(0), out);
      } else if (in.op < TileOp::add_i) {
        number(in.op, range, arg(0), arg(1), out);
      } else if (in.op < TileOp::logical_and) {
        integer(in.op, range, arg(0), arg(1), out);
      } else {
        boolean(in.op, range, arg(0), arg(1), arg(2), out);
      }
    }
  }

  HWY_NOINLINE void leaf(const TileInstruction& in, const cpu::Range& range, TileOperand a, float* out) {
    const I32 di;
    switch (in.op) {
      case TileOp::constant:
        return for_each(range, out, [&](int64_t) HWY_ATTR { return as_float(hn::Set(di, in.bits)); });
      case TileOp::variable:
        return variable(in.var, range, out);
      case TileOp::load:
        return load_keys(in, a.first_integer() + first_key_, range, out);
      case TileOp::gather: {
        const Tensor& data = program_->captures[static_cast<size_t>(in.capture)];
        const VI zero = hn::Zero(di), last = hn::Set(di, static_cast<int32_t>(data.numel() - 1));
        const auto* base = static_cast<const float*>(data.data());
        return for_each(range, out, [&](int64_t i) HWY_ATTR {  // lanes past the end may hold anything
          return hn::GatherIndex(F32(), base, hn::Max(zero, hn::Min(last, a.bits(i))));
        });
      }
      default:
        return for_each(range, out, [&](int64_t i) HWY_ATTR { return hn::ConvertTo(F32(), a.bits(i)); });
    }
  }

  void variable(flex::Var var, const cpu::Range& range, float* out) {
    const I32 di;
    const auto count_from = [&](int32_t first) HWY_ATTR {
      for_each(range, out,
               [&](int64_t i) HWY_ATTR { return as_float(hn::Iota(di, first + static_cast<int32_t>(i))); });
    };
    if (var == flex::Var::score) {
      const VF scale = set(scale_);
      for_each(range, out, [&](int64_t i) HWY_ATTR { return hn::Mul(scale, hn::LoadU(F32(), scores_ + i)); });
    } else if (var == flex::Var::q) {
      count_from(first_row_);
    } else if (var == flex::Var::kv) {
      count_from(static_cast<int32_t>(first_key_));
    } else {
      const int32_t x = uniform_variables_[static_cast<size_t>(var)];
      for_each(range, out, [&](int64_t) HWY_ATTR { return as_float(hn::Set(di, x)); });
    }
  }

  // Consecutive elements from `first` on; lanes past the tensor's end become 0.
  void load_keys(const TileInstruction& in, int64_t first, const cpu::Range& range, float* out) {
    const Tensor& data = program_->captures[static_cast<size_t>(in.capture)];
    const int64_t begin = first + range.begin, n = range.end - range.begin;
    const int64_t there = std::clamp<int64_t>(data.numel() - begin, 0, n);
    std::memcpy(out + range.begin, static_cast<const float*>(data.data()) + begin,
                static_cast<size_t>(there) * sizeof(float));
    std::fill(out + range.begin + there, out + range.end, 0.0f);
  }

  HWY_NOINLINE void number(TileOp op, const cpu::Range& range, TileOperand a, TileOperand b, float* out) {
    switch (op) {
#define FLEXCHAT_CASE(name, ...) \
  case TileOp::name:             \
    return for_each(range, out, [&](int64_t i) HWY_ATTR { return __VA_ARGS__; });
      FLEXCHAT_CASE(add, hn::Add(a.at(i), b.at(i)))
      FLEXCHAT_CASE(sub, hn::Sub(a.at(i), b.at(i)))
      FLEXCHAT_CASE(mul, hn::Mul(a.at(i), b.at(i)))
      FLEXCHAT_CASE(div, hn::Div(a.at(i), b.at(i)))
      FLEXCHAT_CASE(neg, hn::Neg(a.at(i)))
      FLEXCHAT_CASE(min, flex_math::min(a.at(i), b.at(i)))
      FLEXCHAT_CASE(max, flex_math::max(a.at(i), b.at(i)))
      FLEXCHAT_CASE(abs, hn::Abs(a.at(i)))
      FLEXCHAT_CASE(exp, flex_math::exp(a.at(i)))
      FLEXCHAT_CASE(log, flex_math::log(a.at(i)))
      FLEXCHAT_CASE(tanh, flex_math::tanh(a.at(i)))
      FLEXCHAT_CASE(sigmoid, flex_math::sigmoid(a.at(i)))
      FLEXCHAT_CASE(softplus, flex_math::softplus(a.at(i)))
      FLEXCHAT_CASE(pow, flex_math::pow(a.at(i), b.at(i)))
      FLEXCHAT_CASE(sqrt, hn::Sqrt(a.at(i)))
      FLEXCHAT_CASE(lt, truth(hn::Lt(a.at(i), b.at(i))))
      FLEXCHAT_CASE(le, truth(hn::Le(a.at(i), b.at(i))))
      FLEXCHAT_CASE(eq, truth(hn::Eq(a.at(i), b.at(i))))
      FLEXCHAT_CASE(ne, truth(hn::Not(hn::Eq(a.at(i), b.at(i)))))  // true for NaN
      default:
        return;
    }
  }

  HWY_NOINLINE void integer(TileOp op, const cpu::Range& range, TileOperand a, TileOperand b, float* out) {
    switch (op) {
      FLEXCHAT_CASE(add_i, as_float(hn::Add(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(sub_i, as_float(hn::Sub(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(mul_i, as_float(hn::Mul(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(floor_div_i, as_float(flex_math::floor_div(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(mod_i, as_float(flex_math::mod(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(neg_i, as_float(hn::Neg(a.bits(i))))
      FLEXCHAT_CASE(min_i, as_float(hn::Min(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(max_i, as_float(hn::Max(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(abs_i, as_float(hn::Abs(a.bits(i))))
      FLEXCHAT_CASE(lt_i, truth_i(hn::Lt(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(le_i, truth_i(hn::Not(hn::Lt(b.bits(i), a.bits(i)))))
      FLEXCHAT_CASE(eq_i, truth_i(hn::Eq(a.bits(i), b.bits(i))))
      FLEXCHAT_CASE(ne_i, truth_i(hn::Ne(a.bits(i), b.bits(i))))
      default:
        return;
    }
  }

  HWY_NOINLINE void boolean(TileOp op, const cpu::Range& range, TileOperand a, TileOperand b, TileOperand c,
                            float* out) {
    switch (op) {
      FLEXCHAT_CASE(logical_and, hn::And(a.at(i), b.at(i)))
      FLEXCHAT_CASE(logical_or, hn::Or(a.at(i), b.at(i)))
      FLEXCHAT_CASE(logical_not, as_float(hn::Not(a.bits(i))))
      FLEXCHAT_CASE(where, hn::IfThenElse(hn::MaskFromVec(a.at(i)), b.at(i), c.at(i)))
#undef FLEXCHAT_CASE
      default:
        return;
    }
  }

  const TileProgram* program_ = nullptr;
  std::vector<TileOperand> at_, rows_at_;  // of registers; a row's values as copies, and side by side
  Buffer buffer_;
  std::array<int32_t, flex::n_vars> uniform_variables_{};
  const float* scores_ = nullptr;
  int64_t first_key_ = 0;
  int32_t first_row_ = 0;
  float scale_ = 1;
};

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
