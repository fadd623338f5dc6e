// Emitted Mod sections, compiled as plain C++ and run: every result has exactly the bits of an f32 evaluator,
// and rearranged expressions have the value of the original.
#include "flex/emit.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <numbers>
#include <sstream>
#include <string_view>

#include "backend/cuda/kernels/attention_params.cuh"
#include "flex/derivative.h"
#include "flex/eval.h"
#include "flex/mods.h"
#include "flex/parse.h"
#include "support/temp_folder.h"
#include "testing/random_expression.h"
#include "testing/tensors.h"

namespace flexchat::flex {
namespace {

using cuda::AttentionParams;

// What stands in for CUDA around the sections.
constexpr const char* prologue = R"(
#include <cmath>
#include <cstring>
#define __device__
#define __forceinline__ inline
template <class T> T __ldg(const T* p) { return *p; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __int_as_float(int x) { float f; std::memcpy(&f, &x, 4); return f; }
#define asm(...)  // of what f32 never reaches
#define ATTENTION_DTYPE 0
#include "attention_params.cuh"
#include "mod_math.cuh"
using namespace flexchat::cuda;
extern "C" float call_exp(float x) { return mod_exp(x); }
extern "C" float call_log(float x) { return mod_log(x); }
extern "C" float call_tanh(float x) { return mod_tanh(x); }
extern "C" float call_sigmoid(float x) { return mod_sigmoid(x); }
extern "C" float call_softplus(float x) { return mod_softplus(x); }
extern "C" float call_sqrt(float x) { return mod_sqrt(x); }
extern "C" float call_pow(float x, float y) { return mod_pow(x, y); }
)";

// The functions of one section under a C name, and the macros cleared for the next one.
constexpr const char* wrapper = R"(
extern "C" void run_SECTION(const AttentionParams* p, const int* at, float score, float* out, long long* index) {
  using namespace section_SECTION;
  const ModContext c{*p, at[0], at[1], at[4], at[5]};
  const int q = at[2], kv = at[3];
  const ModHead mh = mod_head(c);
  const ModQ mq = mod_q(c, mh, q);
  const ModKv mk = mod_kv(c, mh, kv);
  out[0] = mod_mask(c, mh, mq, mk, q, kv);
  out[1] = mod_score(c, mh, mq, mk, score, q, kv);
  out[2] = mod_score_grad(c, mh, mq, mk, score, q, kv);
  out[11] = mod_score_base2(c, mh, mq, mk, score, score * kModLog2e, q, kv);
  for (int i = 0; i < MOD_N_CAPTURE_GRADS; ++i) {
    out[3 + i] = mod_capture_grad(i, c, mh, mq, mk, score, q, kv);
    index[i] = mod_capture_index(i, c, q, kv);
  }
}
#undef MOD_HAS_MASK
#undef MOD_HAS_SCORE
#undef MOD_IS_DEAR
#undef MOD_N_CAPTURE_GRADS
#undef MOD_CAPTURE_GRAD_KINDS
)";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

// Sections compiled into one shared object.
class Compiled {
 public:
  explicit Compiled(const std::vector<EmittedMod>& mods) {
    const auto source = folder_ / "sections.cc";
    std::ofstream file(source);
    file << prologue;
    for (size_t i = 0; i < mods.size(); ++i) {
      const std::string n = std::to_string(i);
      file << replaced(mods[i].text, "flexchat::cuda", "section_" + n) << replaced(wrapper, "SECTION", n);
    }
    file.close();
    const std::string library = (folder_ / "sections.so").string();
    // -w: sections leave parameters unused. No contraction: the evaluator below has none.
    const std::string command = fmt::format(
        "c++ -std=c++17 -O0 -w -fPIC -shared -ffp-contract=off -I{}/../../src/backend/cuda/kernels -o {} {}",
        FLEXCHAT_TEST_DATA, library, source.string());
    if (std::system(command.c_str()) == 0) handle_ = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  ~Compiled() {
    if (handle_ != nullptr) ::dlclose(handle_);
  }
  Compiled(const Compiled&) = delete;
  Compiled& operator=(const Compiled&) = delete;

  bool ok() const { return handle_ != nullptr; }

  struct Result {
    float out[12];  // mask, score, gradients; the last is the score in base 2
    long long index[8];
  };
  Result run(size_t section, const AttentionParams& params, const Point& x) const {
    const int at[] = {static_cast<int>(x.b),  static_cast<int>(x.h),   static_cast<int>(x.q),
                      static_cast<int>(x.kv), static_cast<int>(x.n_q), static_cast<int>(x.n_kv)};
    Result r{};
    const auto f = function<void(const AttentionParams*, const int*, float, float*, long long*)>(
        fmt::format("run_{}", section).c_str());
    f(&params, at, static_cast<float>(x.score), r.out, r.index);
    return r;
  }

  float call(Op op, float x, float y = 0) const {
    const std::string name = fmt::format("call_{}", op_name(op));
    if (op == Op::pow) return function<float(float, float)>(name.c_str())(x, y);
    return function<float(float)>(name.c_str())(x);
  }

 private:
  template <class F>
  F* function(const char* name) const {
    return reinterpret_cast<F*>(::dlsym(handle_, name));
  }
  TempFolder folder_;
  void* handle_ = nullptr;
};

// Parameters with the constants of a mod.
AttentionParams constants_of(const EmittedMod& mod) {
  static_assert(cuda::kMaxConstants == max_emitted_constants);
  AttentionParams p{};
  std::copy(mod.numbers.begin(), mod.numbers.end(), p.numbers);
  std::copy(mod.integers.begin(), mod.integers.end(), p.integers);
  return p;
}

void set_captures(AttentionParams& p, const std::vector<Capture>& captures, const Bindings& bindings) {
  for (size_t i = 0; i < captures.size(); ++i) {
    const Tensor& t = bindings.at(captures[i]);
    p.captures[i].data = t.data();
    long long stride = 1;
    for (int axis = t.rank() - 1; axis >= 0; --axis) {
      p.captures[i].stride[axis] = stride;
      stride *= t.dim(axis);
    }
  }
}

bool has_compiler() { return std::system("c++ --version > /dev/null 2>&1") == 0; }

// The program's meaning in f32: apply_op on f32 operands, rounded. (One rounding of a double sum, product,
// quotient or root of f32 operands is the f32 result.)
class F32Evaluator {
 public:
  F32Evaluator(const std::vector<Expr>& results, const Bindings& bindings, const Compiled& functions)
      : program_(results), values_(program_.code.size()), functions_(functions) {
    for (const Capture& capture : program_.captures) tensors_.push_back(bindings.at(capture));
  }

  // False when an integer leaves 32 bits, which AttentionSpec::check would have refused.
  bool run(const Point& x) {
    for (size_t i = 0; i < values_.size(); ++i) {
      const Instruction& in = program_.code[i];
      values_[i] = compute(in, x);
      if (in.type == Type::integer && std::abs(values_[i]) > 2147483647) return false;
    }
    return true;
  }
  double result(size_t i) const { return values_[static_cast<size_t>(program_.roots[i])]; }
  double element(const Instruction& in) const {
    const Tensor& tensor = tensors_[static_cast<size_t>(in.capture)];
    return tensor.get(flat_index(in));
  }
  int64_t flat_index(size_t result) const {
    return flat_index(program_.code[static_cast<size_t>(program_.roots[result])]);
  }

 private:
  int64_t flat_index(const Instruction& in) const {
    const Tensor& tensor = tensors_[static_cast<size_t>(in.capture)];
    int64_t offset = 0;
    for (int axis = 0; axis < in.n_args; ++axis) {
      const auto index = values_[static_cast<size_t>(in.args[static_cast<size_t>(axis)])];
      offset = offset * tensor.dim(axis) + static_cast<int64_t>(index);
    }
    return offset;
  }

  double compute(const Instruction& in, const Point& x) const {
    const auto f32 = [](double v) { return static_cast<double>(static_cast<float>(v)); };
    if (in.op == Op::constant) return in.type == Type::number ? f32(in.value) : in.value;
    if (in.op == Op::capture) return element(in);
    if (in.op == Op::variable) {
      const double all[] = {f32(x.score),
                            static_cast<double>(x.b),
                            static_cast<double>(x.h),
                            static_cast<double>(x.q),
                            static_cast<double>(x.kv),
                            static_cast<double>(x.n_q),
                            static_cast<double>(x.n_kv)};
      return all[static_cast<size_t>(in.var)];
    }
    double args[3] = {};
    bool any_number = in.type == Type::number;
    for (size_t k = 0; k < static_cast<size_t>(in.n_args); ++k) {
      args[k] = values_[static_cast<size_t>(in.args[k])];
      any_number = any_number || program_.code[static_cast<size_t>(in.args[k])].type == Type::number;
    }
    if (any_number) {
      for (double& arg : args) arg = f32(arg);
    }
    switch (in.op) {
      case Op::exp:
      case Op::log:
      case Op::tanh:
      case Op::sigmoid:
      case Op::softplus:
      case Op::pow:
        return static_cast<double>(
            functions_.call(in.op, static_cast<float>(args[0]), static_cast<float>(args[1])));
      default:
        break;
    }
    const double result = apply_op(in.op, args[0], args[1], args[2]);
    return in.type == Type::number ? f32(result) : result;
  }

  Program program_;
  std::vector<double> values_;
  std::vector<Tensor> tensors_;
  const Compiled& functions_;
};

bool same_bits(float x, double y) {
  if (std::isnan(x) && std::isnan(y)) return true;
  return static_cast<double>(x) == y;
}

// Captured tensors for tests and their place in AttentionParams.
struct Captured {
  Capture gain{"gain", {Axis::pos}, Type::number, true};
  Capture bias{"bias", {Axis::h, Axis::q, Axis::kv}, Type::number, true};
  Capture slope{"slope", {Axis::h}, Type::number, true};
  Capture doc{"doc", {Axis::b, Axis::pos}, Type::integer};
  Bindings bindings;

  static constexpr int64_t batch = 2, heads = 3, length = 40;

  explicit Captured(Rng& rng) {
    const auto bind = [&](const Capture& capture, Shape shape) {
      const bool integers = capture.type() == Type::integer;
      Tensor t(host_arena(), std::move(shape), integers ? DType::i32 : DType::f32);
      for (int64_t i = 0; i < t.numel(); ++i) {
        t.set(i, integers ? static_cast<double>(rng.below(6)) - 1 : rng.normal());
      }
      bindings.set(capture.name(), t);
    };
    bind(gain, {length});
    bind(bias, {heads, length, length});
    bind(slope, {heads});
    bind(doc, {batch, length});
  }
  std::vector<Capture> all() const { return {gain, bias, slope, doc}; }

  AttentionParams params(const EmittedMod& mod) const {
    AttentionParams p = constants_of(mod);
    set_captures(p, mod.captures, bindings);
    return p;
  }

  static Point point(Rng& rng) {
    Point x;
    x.b = static_cast<int64_t>(rng.below(batch));
    x.h = static_cast<int64_t>(rng.below(heads));
    x.q = static_cast<int64_t>(rng.below(length));
    x.kv = static_cast<int64_t>(rng.below(length));
    x.n_q = length - static_cast<int64_t>(rng.below(3));
    x.n_kv = length;
    x.score = static_cast<double>(static_cast<float>(4 * rng.normal()));
    return x;
  }
};

// mask, score, gradient, capture gradients, accesses: the results of a section, in its own order.
std::vector<Expr> results_of(const Expr& mask, const Expr& score) {
  const Expr arranged = arrange_products(score);
  std::vector<Expr> results = {mask, arranged, arrange_products(score_derivative(arranged))};
  const std::vector<CaptureDerivative> derivatives = capture_derivatives(arranged);
  for (const CaptureDerivative& d : derivatives) results.push_back(arrange_products(d.derivative));
  for (const CaptureDerivative& d : derivatives) results.push_back(d.access);
  return results;
}

// Mods of all kinds that a factor log2(e) travels through: sums, selections, products on either side,
// quotients, exp and its relatives.
TEST(Emit, ScoresInBase2) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  Rng rng(32);
  const Captured captured(rng);
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const Expr gain = captured.gain(kv), slope = captured.slope(h);
  const std::vector<Expr> scores = {
      score,
      score + log(abs(gain) * sigmoid(score) + 1e-6) - 0.1 * abs(q - kv) / n_kv,
      score - abs(slope) * (q - kv),
      30.0 * tanh(score / 30.0),
      score + gain + captured.bias(h, q, kv),
      where(q % 3 == 1, score, -score * slope),
      max(min(score, 2.0), -1.5 * abs(score)),
      (q - kv) * slope - exp(0.25 * score) * gain,
      score / (1.0 + exp(-score)),
      softplus(score) + sqrt(abs(score)) + pow(abs(score), 1.5),
      1.0 * (q - kv),
      where(kv <= q, score, -INFINITY),
  };
  std::vector<EmittedMod> mods;
  for (const Expr& x : scores) mods.push_back(emit_mod({}, x));
  const Compiled compiled(mods);
  ASSERT_TRUE(compiled.ok());
  for (size_t i = 0; i < mods.size(); ++i) {
    const AttentionParams params = captured.params(mods[i]);
    for (int round = 0; round < 200; ++round) {
      const Compiled::Result got = compiled.run(i, params, Captured::point(rng));
      const double expected = static_cast<double>(got.out[1]) * std::numbers::log2e;
      if (std::isinf(expected)) {
        ASSERT_EQ(static_cast<double>(got.out[11]), expected) << to_text(scores[i]);
      } else {
        ASSERT_NEAR(got.out[11], expected, 4e-6 * (1 + std::abs(expected))) << to_text(scores[i]) << "\n"
                                                                            << mods[i].text;
      }
    }
  }
}

TEST(Emit, RandomSectionsHaveTheBitsOfTheF32Evaluator) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  Rng rng(31);
  const Captured captured(rng);
  RandomExpressions random(77, captured.all(), true);
  RandomExpressions random_masks(78, captured.all(), false);
  std::vector<Expr> masks, scores;
  std::vector<EmittedMod> mods;
  while (mods.size() < 120) {
    const Expr mask = random_masks.boolean(static_cast<int>(rng.below(5)));
    const int depth = 1 + static_cast<int>(rng.below(4));
    const Expr score = mods.size() % 4 == 0 ? random.integer(depth) : random.number(depth);
    if (capture_derivatives(arrange_products(score)).size() > max_emitted_captures) continue;
    masks.push_back(mask);
    scores.push_back(score);
    mods.push_back(emit_mod(mask, score));
  }
  const Compiled compiled(mods);
  ASSERT_TRUE(compiled.ok());

  int64_t compared = 0;
  for (size_t i = 0; i < mods.size(); ++i) {
    const std::vector<Expr> results = results_of(masks[i], scores[i]);
    const size_t n = mods[i].gradients.size();
    ASSERT_EQ(results.size(), 3 + 2 * n);
    F32Evaluator expected(results, captured.bindings, compiled);
    const AttentionParams params = captured.params(mods[i]);
    for (int round = 0; round < 30; ++round) {
      const Point x = Captured::point(rng);
      if (!expected.run(x)) continue;
      const Compiled::Result got = compiled.run(i, params, x);
      for (size_t r = 0; r < 3 + n; ++r) {
        ASSERT_TRUE(same_bits(got.out[r], expected.result(r)))
            << "result " << r << " of mask " << to_text(masks[i]) << ", score " << to_text(scores[i]) << ": "
            << got.out[r] << " instead of " << expected.result(r) << "\n"
            << mods[i].text;
        ++compared;
      }
      for (size_t g = 0; g < n; ++g) ASSERT_EQ(got.index[g], expected.flat_index(3 + n + g));
    }
  }
  EXPECT_GT(compared, 10000);
}

TEST(Emit, ArrangedProductsKeepTheirValue) {
  Rng rng(32);
  const Captured captured(rng);
  RandomExpressions random(79, captured.all(), true);
  int arranged = 0;
  for (int round = 0; round < 3000; ++round) {
    const Expr e = random.number(1 + static_cast<int>(rng.below(4))) * random.number(1) / random.number(1) *
                   captured.slope(variables().h);
    const Expr f = arrange_products(e);
    if (same(e, f)) continue;
    ++arranged;
    Evaluator before({e}, captured.bindings), after({f}, captured.bindings);
    for (int i = 0; i < 10; ++i) {
      const Point x = Captured::point(rng);
      const double u = before(x), v = after(x);
      if (std::isfinite(u)) {
        ASSERT_NEAR(u, v, 1e-11 * std::abs(u)) << to_text(e) << " -> " << to_text(f);
      } else {
        ASSERT_FALSE(std::isfinite(v)) << to_text(e) << " -> " << to_text(f);
      }
    }
  }
  EXPECT_GT(arranged, 500);
}

TEST(Emit, NamedModsComeCloseToDouble) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  Rng rng(33);
  const Captured captured(rng);
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const Capture& gain = captured.gain;
  const std::vector<Expr> scores = {
      softcap(30), alibi(captured.slope), softcap(20, alibi(captured.slope)),
      score + log(gain(kv) * gain(kv) * sigmoid(score) * 2 / 0.5 + 1e-6) - 0.1 * abs(q - kv) / n_kv,
      score * captured.bias(h, q, kv) + gain(q)};
  std::vector<EmittedMod> mods;
  for (const Expr& s : scores) mods.push_back(emit_mod(causal() && window(8), s));
  const Compiled compiled(mods);
  ASSERT_TRUE(compiled.ok());
  for (size_t i = 0; i < scores.size(); ++i) {
    Evaluator value({scores[i], score_derivative(scores[i]), causal() && window(8)}, captured.bindings);
    for (int round = 0; round < 200; ++round) {
      const Point x = Captured::point(rng);
      const std::vector<double> expected = value.all(x);
      const Compiled::Result got = compiled.run(i, captured.params(mods[i]), x);
      EXPECT_EQ(static_cast<double>(got.out[0]), expected[2]);
      EXPECT_NEAR(static_cast<double>(got.out[1]), expected[0], 2e-6 * (1 + std::abs(expected[0])));
      EXPECT_NEAR(static_cast<double>(got.out[2]), expected[1], 2e-6 * (1 + std::abs(expected[1])));
    }
  }
}

// The formulas of kernels/mod_math.cuh, with this machine's own expf and logf underneath.
TEST(Emit, FunctionsAreAccurateToAFewUlps) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  const Compiled compiled({});
  ASSERT_TRUE(compiled.ok());
  Rng rng(34);
  for (const Op op : {Op::exp, Op::log, Op::tanh, Op::sigmoid, Op::softplus, Op::sqrt, Op::pow}) {
    double worst = 0;
    for (int i = 0; i < 20000; ++i) {
      const double scale = std::pow(10.0, 4 * rng.uniform() - 2);
      auto x = static_cast<float>(scale * (2 * rng.uniform() - 1));
      x = std::fmax(std::fmin(x, 80.0f), -80.0f);
      if (op == Op::log || op == Op::sqrt || op == Op::pow) x = std::fabs(x);
      const auto y = static_cast<float>(4 * rng.uniform() - 2);
      const double exact = apply_op(op, static_cast<double>(x), static_cast<double>(y), 0);
      const double got = static_cast<double>(compiled.call(op, x, y));
      const auto rounded = static_cast<float>(exact);
      const double ulp = static_cast<double>(std::nextafter(std::fabs(rounded), HUGE_VALF)) -
                         static_cast<double>(std::fabs(rounded));
      worst = std::max(worst, std::abs(got - exact) / ulp);
    }
    EXPECT_LE(worst, 4.0) << op_name(op);
    const double nan = static_cast<double>(compiled.call(op, std::nanf(""), 1.5f));
    EXPECT_TRUE(std::isnan(nan)) << op_name(op);
  }
  EXPECT_EQ(compiled.call(Op::sigmoid, 200.0f), 1.0f);
  EXPECT_EQ(compiled.call(Op::sigmoid, -200.0f), 0.0f);
  EXPECT_EQ(compiled.call(Op::tanh, 200.0f), 1.0f);
  EXPECT_EQ(compiled.call(Op::softplus, 200.0f), 200.0f);
  EXPECT_EQ(compiled.call(Op::softplus, -200.0f), 0.0f);
}

TEST(Emit, TheTextDependsOnTheExpressionAlone) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const Capture slope("slope", {Axis::h}), other("other", {Axis::h});
  EXPECT_EQ(emit_mod(causal(), alibi(slope)).text, emit_mod(causal(), alibi(other)).text);
  EXPECT_NE(emit_mod(causal(), alibi(slope)).text, emit_mod(causal(), alibi(slope, score * 2.0)).text);
  EXPECT_NE(emit_mod(causal(), {}).text, emit_mod(window(5), {}).text);
  EXPECT_EQ(emit_mod({}, {}).text, emit_mod({}, {}).text);
}

TEST(Emit, ConstantsAreData) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const auto mod = [&](int64_t width, double cap, double slope) {
    return emit_mod(causal() && window(width), softcap(cap, score - slope * abs(q - kv) / n_kv));
  };
  const EmittedMod one = mod(100, 30, 0.1), other = mod(4096, 50, 0.7);
  EXPECT_EQ(one.text, other.text);
  EXPECT_EQ(one.integers, std::vector<int32_t>{100});
  EXPECT_EQ(other.integers, std::vector<int32_t>{4096});
  EXPECT_NE(one.numbers, other.numbers);
  // These are the form of a mod rather than its constants.
  EXPECT_TRUE(emit_mod(q - kv < 2, 0.5 * score + 1.0 / (2.0 - score)).numbers.empty());
  EXPECT_NE(emit_mod(floor_div(q, 5) == kv, {}).text, emit_mod(floor_div(q, 7) == kv, {}).text);
  // Without room the rest is spelled out.
  Expr sum = score;
  for (int i = 0; i < 40; ++i) sum = tanh(sum * (3.0 + i));
  const EmittedMod many = emit_mod({}, sum);
  EXPECT_EQ(many.numbers.size(), max_emitted_constants);
  EXPECT_NE(many.text.find("0x1.5p+5f"), std::string::npos) << "42";
}

TEST(Emit, ModsAreDearFromThreeFunctionsAnElementOn) {
  const Variables v = variables();
  const auto dear = [](const Expr& score) { return emit_mod({}, score).dear; };
  EXPECT_FALSE(emit_mod(causal(), {}).dear);
  EXPECT_FALSE(dear(softcap(30)));                                      // tanh, by a constant
  EXPECT_FALSE(dear(v.score / exp(1.0 * v.h) / exp(tanh(1.0 * v.q))));  // before an element is known
  EXPECT_FALSE(dear(exp(v.score) + log(exp(v.score))));                 // exp(score) is computed once
  EXPECT_TRUE(dear(log(sigmoid(v.score))));
  EXPECT_TRUE(dear(v.score + 1.0 * ((v.q - v.kv) % 3)));
}

// The lines of a text that begin so.
std::vector<std::string> lines_of(const std::string& text, std::string_view start) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(start)) lines.push_back(line);
  }
  return lines;
}

// The section that mod_contract.cuh spells out is what is emitted for its expression, but for rounding.
TEST(Emit, TheExampleOfTheContractIsASection) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  std::ifstream file(std::string(FLEXCHAT_TEST_DATA) + "/../../src/backend/cuda/kernels/mod_contract.cuh");
  EmittedMod example;
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("#pragma") && !line.starts_with("#include")) example.text += line + '\n';
  }
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}, Type::number, true),
      amp("amp", {Axis::b, Axis::h, Axis::kv}, Type::number, true),
      prefix("prefix", {Axis::b}, Type::integer);
  const EmittedMod emitted = emit_mod(
      kv <= q || kv < prefix(b),
      score + log(kf(b, h, kv) * sigmoid(score) * amp(b, h, kv) / 0.5 + 1e-6) - 0.1 * abs(q - kv) / n_kv);
  EXPECT_EQ(lines_of(example.text, "#define MOD_"), lines_of(emitted.text, "#define MOD_"));

  Rng rng(35);
  Bindings bindings;
  const Shape shape = {Captured::batch, Captured::heads, Captured::length};
  bindings.set("kf", uniform_tensor(rng, shape, DType::f32, 0.5, 1.5));
  bindings.set("amp", uniform_tensor(rng, shape, DType::f32, 0.5, 1.5));
  bindings.set("prefix", Tensor::from<int32_t>(std::vector<int32_t>{5, 17}, {Captured::batch}, DType::i32));
  const auto params_of = [&](const EmittedMod& mod, const std::vector<Capture>& captures) {
    AttentionParams p = constants_of(mod);
    set_captures(p, captures, bindings);
    return p;
  };
  const AttentionParams params = params_of(example, {kf, amp, prefix}),
                        emitted_params = params_of(emitted, emitted.captures);
  const Compiled compiled({example, emitted});
  ASSERT_TRUE(compiled.ok());
  for (int round = 0; round < 500; ++round) {
    const Point x = Captured::point(rng);
    const Compiled::Result got = compiled.run(0, params, x), want = compiled.run(1, emitted_params, x);
    EXPECT_EQ(got.out[0], want.out[0]);
    for (const int i : {1, 2, 3, 4, 11})
      EXPECT_NEAR(got.out[i], want.out[i], 1e-5f * (1 + std::abs(want.out[i]))) << i;
    for (const int i : {0, 1}) EXPECT_EQ(got.index[i], want.index[i]);
  }
}

TEST(Emit, WhatDoesNotDependOnTheElementIsHoisted) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}, Type::number, true),
      doc("doc", {Axis::b, Axis::pos}, Type::integer);
  const EmittedMod mod = emit_mod(doc(b, q) == doc(b, kv), score + log(kf(b, h, kv)) - abs(q - kv) / n_kv);
  const std::string elements = mod.text.substr(mod.text.find("bool mod_mask"));
  const std::string computed = elements.substr(0, elements.find("mod_capture_index"));
  for (const char* dear : {"capture_integer", "capture_number", "mod_log", "mod_div", "static_cast"}) {
    EXPECT_EQ(computed.find(dear), std::string::npos) << dear << " in\n" << computed;
  }
  ASSERT_EQ(mod.captures.size(), 2u);
  EXPECT_EQ(mod.captures[0].name(), "doc");
  ASSERT_EQ(mod.gradients.size(), 1u);
  EXPECT_EQ(mod.gradients[0].capture, 1);
  EXPECT_EQ(mod.gradients[0].kind, 'k');
}

TEST(Emit, IntegerDivisionRoundsDown) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  const Variables v = variables();
  std::vector<Expr> scores;
  std::vector<EmittedMod> mods;
  for (const int64_t divisor : {-8, -3, -1, 1, 2, 3, 4, 5, 8, 64}) {
    scores.push_back(floor_div(v.q - v.kv, divisor) * 1000 + (v.q - v.kv) % divisor);
  }
  scores.push_back(floor_div(v.q - 7, v.kv - 3) * 1000 + (v.q - 7) % (v.kv - 3));  // zero at kv == 3
  for (const Expr& s : scores) mods.push_back(emit_mod({}, s));
  const Compiled compiled(mods);
  ASSERT_TRUE(compiled.ok());
  for (size_t i = 0; i < scores.size(); ++i) {
    const AttentionParams params = constants_of(mods[i]);
    Evaluator value({scores[i]}, {});
    for (Point x; x.q < 20; ++x.q) {
      for (x.kv = 0; x.kv < 20; ++x.kv) {
        EXPECT_EQ(static_cast<double>(compiled.run(i, params, x).out[1]), value(x)) << to_text(scores[i]);
      }
    }
  }
}

// float(x) - float(q) would be 16777215.
TEST(Emit, LargeIntegersAreSubtractedBeforeTheyAreRounded) {
  if (!has_compiler()) GTEST_SKIP() << "no C++ compiler named c++";
  const Variables v = variables();
  const Capture big("big", {Axis::kv}, Type::integer);
  const EmittedMod mod = emit_mod({}, v.score + (big(v.kv) - v.q));
  const Compiled compiled({mod});
  ASSERT_TRUE(compiled.ok());
  const int value = (1 << 24) + 1;
  AttentionParams params = constants_of(mod);
  params.captures[0].data = &value;
  EXPECT_EQ(compiled.run(0, params, {.q = 1}).out[1], 16777216.0f);
}

TEST(Emit, GradientKinds) {
  const Variables v = variables();
  const auto kind = [&](const Capture& capture, const Expr& access) {
    EXPECT_TRUE(capture.differentiable());
    return emit_mod({}, v.score + access).gradients.at(0).kind;
  };
  const Capture slope("slope", {Axis::h}, Type::number, true), gain("gain", {Axis::pos}, Type::number, true),
      table("table", {Axis::any}, Type::number, true);
  EXPECT_EQ(kind(slope, slope(v.h)), 'k');
  EXPECT_EQ(kind(gain, gain(v.kv)), 'k');
  EXPECT_EQ(kind(gain, gain(v.q)), 'q');
  EXPECT_EQ(kind(table, table(max(v.q - v.kv, 0))), 'a');
}

TEST(Emit, Errors) {
  const Variables v = variables();
  const Capture table("table", {Axis::any}, Type::number, true);
  const Expr by_score = v.score + table(where(v.score < 0, 0, 1));
  EXPECT_NE(message_of<Error>([&] { emit_mod({}, by_score); }).find("score"), std::string::npos);
  Expr sum = v.score;
  for (int i = 0; i < 9; ++i) sum = sum + Capture(fmt::format("x{}", i), {Axis::h})(v.h);
  EXPECT_NE(message_of<Error>([&] { emit_mod({}, sum); }).find("at most 8"), std::string::npos);
  EXPECT_FALSE(message_of<Error>([&] { emit_mod(v.q + v.kv, {}); }).empty());
  EXPECT_FALSE(message_of<Error>([&] { emit_mod({}, v.kv <= v.q); }).empty());
}

}  // namespace
}  // namespace flexchat::flex
