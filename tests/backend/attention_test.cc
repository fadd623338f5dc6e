// Programmable attention, forward and backward, on every backend that can run here: masks and score mods from
// named ones to random expressions, ragged and empty rows, offsets, grouped heads, gaps, dropout, LSE
// gradient, pages. FLEXCHAT_FUZZ_CASES=10000 makes the random test run so many cases.
#include <cstdlib>

#include "attention_kernel_case.h"
#include "backend/cuda_loader.h"
#include "base/error.h"
#include "flex/mods.h"
#include "testing/random_expression.h"

namespace flexchat {
namespace {

using flex::Axis;
using flex::Capture;
using flex::Expr;

// ---- backends -------------------------------------------------------------------------------------------

Backend* cuda() {
  static const std::unique_ptr<Backend> backend = cuda_available() ? make_cuda_backend() : nullptr;
  return backend.get();
}

// Runs a case everywhere. On the CPU: every instruction set (when `thorough`), any number of threads.
void run_case(const KernelCase& c, uint64_t seed = 1, bool thorough = true) {
  const AttentionCheck check(c, seed);
  const auto cpu = make_cpu_backend();
  const std::vector<int64_t> targets = SimdTargets::all();
  for (size_t i = 1; thorough && i < targets.size(); ++i) {
    const SimdTargets scope(targets[i]);
    check.expect_right(check.run(*cpu), fmt::format("instruction sets {:#x}", targets[i]));
  }
  KernelResults one;
  for (const int threads : {1, 2, 3}) {
    const Threads scope(threads);
    const KernelResults got = check.run(*cpu);
    if (threads == 1) {
      one = got;
      check.expect_right(got, "cpu");
    } else {
      AttentionCheck::expect_same_bits(got, one, fmt::format("{} threads {}", threads, c.label()));
    }
    if (!thorough && threads == 2) break;
  }
  if (cuda() == nullptr) return;
  const KernelResults got = check.run(*cuda());
  check.expect_right(got, "cuda", 3);
  AttentionCheck::expect_same_bits(check.run(*cuda()), got, "cuda, repeated " + c.label());
}

AttentionShape make_shape(int64_t batch, int64_t q_len, int64_t kv_len, int64_t n_head, int64_t n_kv_head,
                          int64_t d) {
  AttentionShape s;
  s.batch = batch;
  s.q_len = q_len;
  s.kv_len = kv_len;
  s.n_head = n_head;
  s.n_kv_head = n_kv_head;
  s.head_dim = d;
  return s;
}
std::vector<int64_t> repeated(int64_t n, int64_t value) {
  return std::vector<int64_t>(static_cast<size_t>(n), value);
}
AttentionSpec scaled(int64_t d) {
  AttentionSpec spec;
  spec.scale = 1 / std::sqrt(static_cast<double>(d));
  return spec;
}

// ---- the built-in mask ----------------------------------------------------------------------------------

struct Case {
  int64_t batch, q_len, kv_len, n_head, n_kv_head, d, q_offset, window;
};
const Case kCases[] = {
    // whole sequences around the block of 64 query rows, head dims, GQA ratios
    {1, 1, 1, 1, 1, 32, 0, -1},
    {2, 33, 33, 2, 1, 80, 0, -1},
    {1, 63, 63, 2, 2, 128, 0, -1},
    {1, 64, 64, 3, 1, 64, 0, -1},
    {2, 65, 65, 4, 4, 32, 0, -1},
    {1, 129, 129, 4, 2, 32, 0, -1},
    {1, 70, 70, 2, 2, 96, 0, -1},
    {1, 40, 40, 2, 1, 192, 0, -1},
    {1, 35, 35, 2, 1, 256, 0, -1},
    // windows: the token alone, its neighbour, less and more than a block, more than the sequence
    {2, 9, 9, 2, 1, 32, 0, 0},
    {1, 70, 70, 2, 1, 32, 0, 1},
    {1, 129, 129, 2, 1, 32, 0, 5},
    {1, 140, 140, 2, 2, 64, 0, 64},
    {1, 130, 130, 1, 1, 32, 0, 100},
    {1, 33, 33, 2, 1, 32, 0, 500},
    // chunks behind a cache, with and without a window
    {1, 2, 9, 4, 2, 32, 7, -1},
    {2, 5, 12, 4, 1, 32, 7, 3},
    {1, 65, 130, 2, 1, 64, 65, -1},
    {2, 66, 70, 2, 1, 80, 4, 20},
    {1, 7, 200, 2, 2, 128, 193, 127},
    // one token behind a cache
    {1, 1, 2, 1, 1, 32, 1, -1},
    {3, 1, 33, 4, 2, 64, 32, -1},
    {2, 1, 127, 8, 2, 80, 126, 16},
    {1, 1, 200, 4, 1, 128, 199, 0},
    {1, 1, 129, 4, 4, 32, 128, 300},
    // fewer keys than positions: the last queries see less than their window, then nothing
    {2, 6, 4, 2, 1, 32, 0, -1},
    {1, 9, 4, 2, 1, 32, 0, 2},
    {1, 70, 4, 2, 1, 32, 0, 2},
    {2, 3, 5, 2, 2, 32, 9, 2},
    {2, 1, 5, 2, 2, 32, 9, 2},
};

KernelCase built_in(const Case& k, DType dtype) {
  KernelCase c{.name = "built-in mask",
               .shape = make_shape(k.batch, k.q_len, k.kv_len, k.n_head, k.n_kv_head, k.d),
               .spec = scaled(k.d),
               .dtype = dtype};
  if (k.q_offset > 0) c.shape.q_offsets = repeated(k.batch, k.q_offset);
  c.spec.causal = true;
  c.spec.window = k.window;
  return c;
}

class Attention : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(Attention);

TEST_P(Attention, BuiltInMask) {
  for (const Case& k : kCases) {
    KernelCase c = built_in(k, dtype());
    if (dtype() == DType::f32) run_case(c, 1);
    c.token_gap = 3;
    c.head_gap = 8;
    c.lse_gradient = true;
    run_case(c, 2, false);
  }
}

// The same mask as an expression gives the same, and so does a mask that is always true on top of the
// built-in.
TEST_P(Attention, SameMaskAsExpression) {
  const size_t step =
      dtype() == DType::f32 ? 1 : 4;  // 16-bit rows differ from f32 ones where they are packed
  for (size_t i = 0; i < std::size(kCases); i += step) {
    const Case& k = kCases[i];
    const KernelCase plain = built_in(k, dtype());
    KernelCase flexible = plain;
    flexible.spec.causal = false;
    flexible.spec.window = -1;
    flexible.spec.mask = flex::causal();
    if (k.window >= 0) flexible.spec.mask = flex::causal() && flex::window(k.window + 1);
    run_case(flexible, 3, k.q_len == 70);
    KernelCase both = plain;
    both.spec.mask = Expr(true);
    run_case(both, 3, false);
  }
}

// Head dims that are no multiple of a vector run on the CPU.
TEST_P(Attention, OddHeadDims) {
  for (const int64_t d : {1, 2, 6, 8, 33, 48, 100}) {
    for (const int64_t t_len : {1, 5, 40, 70}) {
      if (dtype() != DType::f32 && t_len > 40) continue;
      KernelCase c = built_in({2, t_len, t_len, 4, 2, d, 0, -1}, dtype());
      const AttentionCheck plain(c, 4);
      const auto cpu = make_cpu_backend();
      plain.expect_right(plain.run(*cpu), "cpu");
      c.spec.score_mod = flex::softcap(2);
      const AttentionCheck modded(c, 4);
      modded.expect_right(modded.run(*cpu), "cpu");
    }
  }
}

TEST_P(Attention, Bidirectional) {
  for (const auto& [q_len, kv_len] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 65}, {7, 130}, {70, 33}, {65, 65}}) {
    for (const int64_t d : {32, 80}) {
      run_case({.name = "bidirectional",
                .shape = make_shape(2, q_len, kv_len, 4, 2, d),
                .spec = scaled(d),
                .dtype = dtype(),
                .lse_gradient = true});
    }
  }
}

// Scores of +-1000: the maximum must be taken out before exp.
TEST_P(Attention, LargeScores) {
  const auto cpu = make_cpu_backend();
  for (Backend* backend : {cpu.get(), cuda()}) {
    if (backend == nullptr) continue;
    KernelCase c = built_in({1, 70, 70, 2, 1, 32, 0, -1}, dtype());
    c.spec.scale = 60;
    const AttentionCheck check(c, 5);
    const KernelResults got = check.run(*backend);
    // Two keys whose f32 scores differ by 6e-8 * 1000 share the weight with as much relative error.
    expect_near(got.tensors[0], check.expected().tensors[0], {1, 1e-3, 2e-3, 1}, "out");
    expect_near(got.tensors[1], check.expected().tensors[1], {1, 0, 1e-6, 1}, "lse");
  }
}

// ---- ragged batches -------------------------------------------------------------------------------------

KernelCase ragged(DType dtype) {
  KernelCase c{.name = "ragged",
               .shape = make_shape(5, 37, 70, 4, 2, 64),
               .spec = scaled(64),
               .dtype = dtype,
               .head_gap = 4,
               .token_gap = 5,
               .lse_gradient = true};
  c.shape.q_lens = {37, 0, 5, 1, 20};
  c.shape.kv_lens = {70, 9, 0, 33, 61};
  c.shape.q_offsets = {33, 4, 0, 32, 41};
  return c;
}

TEST_P(Attention, RaggedRows) {
  KernelCase c = ragged(dtype());
  run_case(c);
  c.spec.causal = true;
  run_case(c);
  c.spec.window = 6;
  run_case(c);
  c.spec = scaled(64);
  c.spec.mask = flex::causal() && flex::window(30);
  c.spec.score_mod = flex::softcap(3);
  run_case(c);
}

TEST_P(Attention, EmptyShapes) {
  for (const auto& [q_len, kv_len] : {std::pair<int64_t, int64_t>{0, 0}, {0, 5}, {5, 0}, {40, 0}}) {
    KernelCase c{.name = "empty",
                 .shape = make_shape(2, q_len, kv_len, 2, 1, 32),
                 .spec = scaled(32),
                 .dtype = dtype()};
    run_case(c);
    c.spec.mask = flex::causal();
    c.spec.score_mod = flex::softcap(3);
    run_case(c);
  }
}

// ---- named masks and mods -------------------------------------------------------------------------------

Tensor document_ids(Rng& rng, int64_t batch, int64_t n) {
  const Tensor ids(host_arena(), {batch, n}, DType::i32);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t id = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (rng.below(20) == 0) ++id;
      ids.set(b * n + i, id);
    }
  }
  return ids;
}

struct Named {
  const char* name = "";
  AttentionSpec spec;
};

// Specs for (B, H) over up to `n` positions.
std::vector<Named> named_specs(Rng& rng, int64_t batch, int64_t n_head, int64_t n, int64_t d) {
  const auto v = flex::variables();
  std::vector<Named> specs;
  specs.reserve(32);  // references to earlier ones stay good
  const auto add = [&](const char* name) -> AttentionSpec& {
    specs.emplace_back();
    specs.back().name = name;
    specs.back().spec.scale = 1 / std::sqrt(static_cast<double>(d));
    return specs.back().spec;
  };
  const Capture doc("doc", {Axis::b, Axis::pos}, flex::Type::integer);
  const Capture length("length", {Axis::b}, flex::Type::integer);
  const Capture slope("slope", {Axis::h}, flex::Type::number, true);
  const Capture table("table", {Axis::h, Axis::any}, flex::Type::number, true);
  const Capture bias("bias", {Axis::h, Axis::q, Axis::kv}, flex::Type::number, true);
  const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}, flex::Type::number, true);
  const Capture amp("amp", {Axis::b, Axis::h, Axis::kv}, flex::Type::number, true);
  const Capture per_key("per_key", {Axis::kv}, flex::Type::number, true);
  const Tensor slopes = uniform_tensor(rng, {n_head}, DType::f32, 0.01, 0.2);

  add("window of 20").mask = flex::causal() && flex::window(20);
  add("window and sink").mask = flex::causal() && (flex::window(9) || flex::sink(3));
  AttentionSpec& documents = add("documents");
  documents.mask = flex::causal() && flex::document(doc);
  documents.bindings.set("doc", document_ids(rng, batch, n));
  const Tensor lengths = random_ids(rng, {batch}, n);
  AttentionSpec& prefix = add("prefix LM");
  prefix.mask = flex::prefix_lm(length);
  prefix.bindings.set("length", lengths);
  AttentionSpec& padding = add("padding");
  padding.mask = flex::padding(length);
  padding.bindings.set("length", lengths);
  add("every third key, second query blind").mask = v.kv % 3 == 0 && v.q != 1;
  // Rows whose weights nobody computes, between rows that see the same keys.
  add("every third run of 8 queries blind").mask = floor_div(v.q, 8) % 3 != 1 && abs(v.q - v.kv) < 40;
  add("nothing visible").mask = v.kv < 0;
  AttentionSpec& alibi = add("ALiBi");
  alibi.mask = flex::causal();
  alibi.score_mod = flex::alibi(slope);
  alibi.bindings.set("slope", slopes);
  AttentionSpec& capped = add("softcap over ALiBi");
  capped.causal = true;
  capped.score_mod = flex::softcap(3, flex::alibi(slope));
  capped.bindings.set("slope", slopes);
  AttentionSpec& relative = add("relative positions");
  relative.score_mod = flex::relative_position(table, 7);
  relative.bindings.set("table", random_tensor(rng, {n_head, 15}, DType::f32));
  AttentionSpec& biased = add("bias for each (h, q, kv)");
  biased.mask = flex::causal();
  biased.score_mod = v.score + bias(v.h, v.q, v.kv);
  biased.bindings.set("bias", random_tensor(rng, {n_head, n, n}, DType::f32));
  AttentionSpec& keyed = add("one number a key, twice");
  keyed.score_mod = v.score * (1.0 + 0.2 * per_key(v.kv)) + per_key(v.kv);
  keyed.bindings.set("per_key", uniform_tensor(rng, {n}, DType::f64, -1, 1));  // any float dtype
  AttentionSpec& synaptic = add("synaptic");
  synaptic.causal = true;
  synaptic.score_mod = v.score +
                       log(kf(v.b, v.h, v.kv) * sigmoid(v.score) * amp(v.b, v.h, v.kv) / 1.7 + 1e-3) -
                       0.5 * abs(v.q - v.kv) / v.n_kv;
  synaptic.bindings.set("kf", uniform_tensor(rng, {batch, n_head, n}, DType::f32, 0.1, 1.5));
  synaptic.bindings.set("amp", uniform_tensor(rng, {batch, n_head, n}, DType::f32, 0.5, 2));
  AttentionSpec& infinite = add("a mod of -inf is a mask");
  infinite.score_mod = where(v.kv <= v.q, v.score, -std::numeric_limits<double>::infinity());
  AttentionSpec& negative = add("a negative scale");
  negative.scale = -negative.scale;
  negative.mask = flex::causal();
  AttentionSpec& zero = add("a scale of zero");
  zero.scale = 0;
  zero.mask = flex::causal();
  return specs;
}

TEST_P(Attention, NamedMasksAndMods) {
  for (const auto& [q_len, kv_len, offset] :
       {std::tuple<int64_t, int64_t, int64_t>{70, 70, 0}, {1, 61, 60}, {6, 130, 124}, {37, 50, 13}}) {
    if (dtype() != DType::f32 && q_len != 37) continue;  // one of the shapes will do
    for (const Named& named : named_specs(rng, 2, 4, 140, 64)) {
      KernelCase c{.name = named.name,
                   .shape = make_shape(2, q_len, kv_len, 4, 2, 64),
                   .spec = named.spec,
                   .dtype = dtype(),
                   .lse_gradient = true};
      if (offset > 0) c.shape.q_offsets = repeated(2, offset);
      run_case(c, 6, q_len == 37 && dtype() == DType::f32);
    }
  }
}

TEST_P(Attention, HeadDimsWithAMod) {
  for (const int64_t d : {16, 32, 64, 80, 96, 128, 192, 256}) {
    KernelCase c{
        .name = "softcap", .shape = make_shape(1, 50, 50, 2, 1, d), .spec = scaled(d), .dtype = dtype()};
    c.spec.mask = flex::causal() && flex::window(40);
    c.spec.score_mod = flex::softcap(5);
    run_case(c, 7);
  }
}

// 5e-7 on unit-scale outputs, without the allowance for the mod: what the mods above are held to.
TEST(AttentionPrecision, NamedModsInF32) {
  Rng rng(8);
  const auto cpu = make_cpu_backend();
  for (const Named& named : named_specs(rng, 1, 2, 300, 64)) {
    KernelCase c{.name = named.name, .shape = make_shape(1, 300, 300, 2, 2, 64), .spec = named.spec};
    const AttentionCheck check(c, 9);
    for (Backend* backend : {cpu.get(), cuda()}) {
      if (backend == nullptr) continue;
      EXPECT_LE(check.out_error(check.run(*backend)), 5e-7) << backend->name() << " " << c.label();
    }
  }
}

// ---- dropout --------------------------------------------------------------------------------------------

TEST_P(Attention, Dropout) {
  for (const auto& [q_len, kv_len] : {std::pair<int64_t, int64_t>{70, 70}, {1, 61}, {5, 33}, {64, 130}}) {
    for (const double probability : {0.1, 0.5, 0.999}) {
      if (dtype() != DType::f32 && probability != 0.5) continue;
      KernelCase c{.name = "dropout",
                   .shape = make_shape(2, q_len, kv_len, 4, 2, 32),
                   .spec = scaled(32),
                   .dtype = dtype(),
                   .lse_gradient = true};
      c.spec.dropout = probability;
      c.spec.dropout_seed = 0x123456789ABCDEF0;
      run_case(c, 10, probability == 0.5);
      c.spec.mask = flex::window(30);
      c.spec.score_mod = flex::softcap(2);
      run_case(c, 10, false);
    }
  }
}

// Which weights are dropped, bit by bit: values of 1 in one column each tell the weight of one key.
TEST(AttentionDropout, DropsExactlyTheWeightsThatTheBitsSay) {
  const int64_t t_len = 64, d = 64;
  KernelCase c{.name = "dropout bits", .shape = make_shape(2, t_len, t_len, 2, 2, d), .spec = scaled(d)};
  c.spec.dropout = 0.3;
  c.spec.dropout_seed = 99;
  const Tensor zero = filled_tensor({2, t_len, 2 * d}, DType::f32, 0), v = duplicate(zero);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t j = 0; j < t_len; ++j) {
      for (int64_t h = 0; h < 2; ++h) v.set(((b * t_len + j) * 2 + h) * d + j, 1);
    }
  }
  const auto cpu = make_cpu_backend();
  for (Backend* backend : {cpu.get(), cuda()}) {
    if (backend == nullptr) continue;
    const auto plan = backend->plan_attention(c.shape, c.spec);
    const Tensor q = backend->to_device(zero), values = backend->to_device(v),
                 out = backend->to_device(filled_tensor(zero.shape(), DType::f32, std::nan("")));
    backend->attention(*plan, {heads_view(q), heads_view(q), heads_view(values), heads_view(out), nullptr});
    const Tensor got = backend->to_host(out);
    for (int64_t i = 0; i < got.numel(); ++i) {
      const int64_t j = i % d, h = i / d % 2, r = i / d / 2 % t_len, b = i / d / 2 / t_len;
      const bool dropped = attention_dropout_bits(99, b, h, r, j) < 0.3 * 0x1p32;
      ASSERT_EQ(got.get(i) == 0, dropped)
          << backend->name() << " b " << b << " h " << h << " q " << r << " kv " << j;
    }
  }
}

// ---- pages ----------------------------------------------------------------------------------------------

TEST_P(Attention, PagesChangeNoBit) {
  const auto cpu = make_cpu_backend();
  for (Backend* backend : {cpu.get(), cuda()}) {
    if (backend == nullptr) continue;
    for (const int64_t q_len : {1, 3, 37}) {
      for (const bool modded : {false, true}) {
        KernelCase c = ragged(dtype());
        c.name = "pages";
        c.shape.q_len = q_len;
        for (int64_t& n : c.shape.q_lens) n = std::min(n, q_len);
        c.spec.causal = !modded;
        if (modded) {
          c.spec.mask = flex::causal();
          c.spec.score_mod = flex::softcap(4);
        }
        const AttentionCheck check(c, 11);
        const KernelResults contiguous = check.run(*backend);
        for (const int64_t page_size : {1, 3, 16, 64, 100}) {
          for (const uint64_t permutation : {1, 2}) {
            EXPECT_TRUE(same_bits(check.paged_out(*backend, page_size, permutation), contiguous.tensors[0]))
                << backend->name() << " pages of " << page_size << " " << c.label();
          }
        }
      }
    }
  }
}

// ---- random cases ---------------------------------------------------------------------------------------

// Conditions on numbers may turn with the last bit, so random masks compare integers only.
bool compares_numbers(const Expr& expr) {
  for (const Expr& arg : expr.node().args) {
    if (compares_numbers(arg)) return true;
  }
  const flex::Op op = expr.node().op;
  return (op == flex::Op::lt || op == flex::Op::le || op == flex::Op::eq || op == flex::Op::ne) &&
         (expr.node().args[0].type() == flex::Type::number ||
          expr.node().args[1].type() == flex::Type::number);
}

template <class T>
T pick(Rng& rng, std::initializer_list<T> choices) {
  return choices.begin()[rng.below(choices.size())];
}

AttentionShape random_shape(Rng& rng) {
  const int64_t n_kv_head = pick<int64_t>(rng, {1, 2, 3}), group = pick<int64_t>(rng, {1, 1, 2, 4});
  const int64_t d = pick<int64_t>(rng, {16, 32, 32, 64, 80, 96, 128, 192, 256});
  AttentionShape s = make_shape(1 + static_cast<int64_t>(rng.below(3)), static_cast<int64_t>(rng.below(75)),
                                static_cast<int64_t>(rng.below(110)), n_kv_head * group, n_kv_head, d);
  if (rng.below(4) == 0) s.q_len = 1;
  const auto lengths = [&](int64_t most) {
    std::vector<int64_t> result;
    for (int64_t b = 0; b < s.batch; ++b)
      result.push_back(rng.below(8) == 0 ? 0
                                         : static_cast<int64_t>(rng.below(static_cast<uint64_t>(most + 1))));
    return result;
  };
  if (rng.below(2) == 0) s.q_lens = lengths(s.q_len);
  if (rng.below(2) == 0) s.kv_lens = lengths(s.kv_len);
  if (rng.below(2) == 0) s.q_offsets = lengths(s.kv_len);
  return s;
}

// A random spec that f32 can compute: no condition that rounding may turn, no mod that magnifies errors.
AttentionSpec random_spec(Rng& rng, const AttentionShape& s) {
  const int64_t n = s.q_len + 2 * s.kv_len + 1;  // positions of queries and keys
  const Capture ids("ids", {Axis::b, Axis::pos}, flex::Type::integer),
      groups("groups", {Axis::h}, flex::Type::integer);
  const std::vector<Capture> numbers = {
      Capture("gain", {Axis::b, Axis::h, Axis::kv}, flex::Type::number, true),
      Capture("slope", {Axis::h}, flex::Type::number, true),
      Capture("row", {Axis::q}, flex::Type::number, true),
      Capture("pair", {Axis::q, Axis::kv}, flex::Type::number, true),
      ids,
      groups};
  AttentionSpec spec = scaled(s.head_dim);
  spec.bindings.set("ids", random_ids(rng, {s.batch, n}, 4));
  spec.bindings.set("groups", random_ids(rng, {s.n_head}, 3));
  spec.bindings.set("gain", uniform_tensor(rng, {s.batch, s.n_head, n}, DType::f32, 0.2, 1.5));
  spec.bindings.set("slope", uniform_tensor(rng, {s.n_head}, DType::f32, -0.5, 0.5));
  spec.bindings.set("row", uniform_tensor(rng, {n}, DType::f32, -1, 1));
  spec.bindings.set("pair", uniform_tensor(rng, {n, n}, DType::f32, -1, 1));
  flex::RandomExpressions masks(rng.next_u64(), {ids, groups}, false), mods(rng.next_u64(), numbers, true);
  spec.causal = rng.below(3) == 0;
  if (spec.causal && rng.below(2) == 0) spec.window = static_cast<int64_t>(rng.below(40));
  if (rng.below(4) == 0) {
    spec.dropout = 0.2;
    spec.dropout_seed = rng.next_u64();
  }
  const uint64_t kind = rng.below(4);
  const auto v = flex::variables();
  for (;;) {
    if (kind != 0) spec.mask = masks.boolean(3);
    if (kind == 3) spec.mask = *spec.mask && flex::causal();
    spec.score_mod.reset();
    if (rng.below(4) != 0) {
      const Expr x = tanh(mods.number(3));
      spec.score_mod = rng.below(2) == 0 ? v.score + x : 3.0 * x;
    }
    try {
      spec.check(s);  // integers beyond 32 bits
    } catch (const Error&) {
      continue;
    }
    if (spec.mask && compares_numbers(*spec.mask)) continue;
    const F32Error error = f32_error(s, spec);
    if (!error.ambiguous && error.value < 1e-4 && error.derivative < 1e-3 && error.magnitude < 1e3)
      return spec;
  }
}

TEST(AttentionFuzz, RandomCases) {
  const char* wanted = std::getenv("FLEXCHAT_FUZZ_CASES");
  const char* first = std::getenv("FLEXCHAT_FUZZ_FIRST");  // to repeat one
  const int64_t begin = first ? std::atoll(first) : 0, n_cases = wanted ? std::atoll(wanted) : 60;
  for (int64_t i = begin; i < begin + n_cases && !testing::Test::HasFailure(); ++i) {
    Rng rng(77, static_cast<uint64_t>(i));
    KernelCase c{.name = fmt::format("random case {}", i), .shape = random_shape(rng), .spec = {}};
    c.spec = random_spec(rng, c.shape);
    c.dtype = pick(rng, {DType::f32, DType::f32, DType::bf16, DType::f16});
    c.head_gap = pick<int64_t>(rng, {0, 0, 8});
    c.token_gap = pick<int64_t>(rng, {0, 8});
    c.lse_gradient = rng.below(2) == 0;
    run_case(c, static_cast<uint64_t>(i), false);
  }
}

// ---- choosing a kernel ----------------------------------------------------------------------------------

std::string message(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(AttentionPlans, NameTheirKernel) {
  const auto cpu = make_cpu_backend(), reference = make_reference_backend();
  const AttentionShape s = make_shape(1, 3, 3, 2, 1, 8);
  AttentionSpec spec = scaled(8);
  EXPECT_EQ(cpu->attention_kernels(), std::vector<std::string>{"cpu"});
  EXPECT_EQ(cpu->plan_attention(s, spec)->kernel(), "cpu");
  EXPECT_EQ(cpu->plan_attention(s, spec, "cpu")->reason(), "the one kernel of the CPU, for every case");
  spec.causal = true;
  spec.score_mod = flex::softcap(2);
  EXPECT_EQ(
      cpu->plan_attention(s, spec)->reason(),
      "the one kernel of the CPU, for every case: built-in causal mask, score mod by the tile interpreter");
  EXPECT_EQ(message([&] { cpu->plan_attention(s, spec, "reference"); }),
            "the cpu backend has no attention kernel 'reference'; allowed: auto, cpu");
  EXPECT_EQ(message([&] { reference->plan_attention(s, spec, "cpu"); }),
            "the reference backend has no attention kernel 'cpu'; allowed: auto, reference");
  EXPECT_EQ(reference->plan_attention(s, spec)->kernel(), "reference");
  EXPECT_EQ(message([&] { cpu->attention(*reference->plan_attention(s, spec), {}); }),
            "an attention plan for kernel 'reference' cannot run on the cpu backend");
  EXPECT_EQ(message([&] {
              const KernelCase c{.name = "", .shape = s, .spec = spec};
              const HeadBuffer x(c, 1, 3, 2), k(c, 1, 3, 1);
              const Tensor lse = filled_tensor({1, 2, 3}, DType::f32, 0);
              AttentionGradients grads{x.view(x.data), nullptr,        x.view(x.data),
                                       k.view(k.data), k.view(k.data), {}};
              grads.captures.emplace_back("slope", filled_tensor({2}, DType::f32, 0));
              cpu->attention_backward(*cpu->plan_attention(s, spec),
                                      {x.view(x.data), k.view(k.data), k.view(k.data), x.view(x.data), &lse},
                                      grads);
            }),
            "the score mod has no differentiable captured tensor 'slope'");
}

}  // namespace
}  // namespace flexchat
