#include "verify/attention_suite.h"

#include <cmath>
#include <cstring>
#include <span>

#include "base/error.h"
#include "base/rng.h"
#include "flex/mods.h"
#include "flex/parse.h"

namespace flexchat {
namespace {

using flex::Axis;
using flex::Capture;
using flex::Expr;

AttentionShape shape_of(int64_t batch, int64_t n_head, int64_t n_kv_head, int64_t q_len, int64_t kv_len,
                        int64_t head_dim) {
  AttentionShape s;
  s.batch = batch;
  s.n_head = n_head;
  s.n_kv_head = n_kv_head;
  s.q_len = q_len;
  s.kv_len = kv_len;
  s.head_dim = head_dim;
  return s;
}

AttentionSpec spec_of(const AttentionShape& s) {
  AttentionSpec spec;
  spec.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  return spec;
}
AttentionSpec causal_spec(const AttentionShape& s) {
  AttentionSpec spec = spec_of(s);
  spec.causal = true;
  return spec;
}
AttentionSpec masked(const AttentionShape& s, const Expr& mask) {
  AttentionSpec spec = spec_of(s);
  spec.mask = mask;
  return spec;
}

// The last q_len positions of kv_len, in every row.
AttentionShape at_the_end(AttentionShape s) {
  s.q_offsets.assign(static_cast<size_t>(s.batch), s.kv_len - s.q_len);
  return s;
}

Tensor numbers(Shape shape, uint64_t seed, double low, double high) {
  const Tensor t(host_arena(), std::move(shape), DType::f32);
  Rng rng(seed, /*stream=*/9);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, low + (high - low) * rng.uniform());
  return t;
}
Tensor integers(const std::vector<int64_t>& values, Shape shape) {
  return Tensor::from<int64_t>(values, std::move(shape), DType::i32);
}

// Ids (B, T) of documents of uneven lengths.
Tensor document_ids(int64_t batch, int64_t length, uint64_t seed) {
  const Tensor t(host_arena(), {batch, length}, DType::i32);
  Rng rng(seed, /*stream=*/10);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0, id = 0; i < length; ++i) {
      if (i > 0 && rng.below(23) == 0) ++id;
      t.set(b * length + i, static_cast<double>(id));
    }
  }
  return t;
}

// The score mod of the Synaptic GPT: log of a release probability, and a distance penalty.
AttentionSpec synaptic(const AttentionShape& s, bool differentiable) {
  const auto v = flex::variables();
  const Capture kf("kf", {Axis::b, Axis::h, Axis::kv}, flex::Type::number, differentiable);
  const Capture amp("amp", {Axis::b, Axis::h, Axis::kv}, flex::Type::number, differentiable);
  AttentionSpec spec = causal_spec(s);
  const Expr release = kf(v.b, v.h, v.kv) * flex::sigmoid(v.score) * amp(v.b, v.h, v.kv) / 1.01;
  spec.score_mod = v.score + flex::log(release + 1e-6) - 0.1 * flex::abs(v.q - v.kv) / v.n_kv;
  spec.bindings.set("kf", numbers({s.batch, s.n_head, s.kv_len}, 21, 0.5, 1.5));
  spec.bindings.set("amp", numbers({s.batch, s.n_head, s.kv_len}, 22, 0.5, 1.5));
  return spec;
}

class Suite {
 public:
  AttentionCase& add(const std::string& name, const AttentionShape& shape, const AttentionSpec& spec) {
    AttentionCase c;
    c.name = name;
    c.shape = shape;
    c.spec = spec;
    c.seed = 100 + cases.size();
    cases.push_back(c);
    return cases.back();
  }
  // By the built-in mask and by the same mask as an expression.
  void add_causal(const std::string& name, const AttentionShape& shape) {
    add(name + " sdpa", shape, causal_spec(shape));
    add(name + " flex", shape, masked(shape, flex::causal()));
  }
  std::vector<AttentionCase> cases;
};

void add_shapes(Suite& suite) {
  for (const auto& [heads, kv_heads, name] :
       {std::tuple{4, 4, "mha"}, std::tuple{4, 2, "gqa"}, std::tuple{4, 1, "mqa"}}) {
    const std::string group = name;
    suite.add_causal(group + " causal", shape_of(2, heads, kv_heads, 67, 67, 64));
    suite.add_causal(group + " kv decode", at_the_end(shape_of(2, heads, kv_heads, 1, 83, 64)));
    suite.add_causal(group + " kv chunk", at_the_end(shape_of(2, heads, kv_heads, 7, 71, 64)));
  }
  for (const int64_t d : {16, 32, 64, 80, 96, 128, 192, 256}) {
    suite.add_causal(fmt::format("head dim {}", d), shape_of(1, 2, 1, 45, 45, d));
  }
  const AttentionShape square = shape_of(2, 4, 2, 70, 70, 64);
  suite.add("fused buffer", square, causal_spec(square)).fused = true;
  const AttentionShape wide = shape_of(1, 2, 2, 61, 93, 64);
  suite.add("bidirectional", wide, spec_of(wide));
  const AttentionShape longer = shape_of(1, 2, 1, 330, 330, 64);
  suite.add_causal("several tiles", longer);
}

void add_lengths(Suite& suite) {
  AttentionShape ragged = shape_of(4, 2, 1, 41, 41, 64);
  ragged.q_lens = ragged.kv_lens = {41, 17, 1, 0};
  suite.add_causal("padding", ragged);
  suite.add("padding bidirectional", ragged, spec_of(ragged));
  AttentionShape decode = shape_of(3, 4, 2, 1, 90, 64);
  decode.kv_lens = {90, 33, 1};
  decode.q_offsets = {89, 32, 0};
  suite.add_causal("padding kv decode", decode);
  AttentionShape chunk = shape_of(3, 4, 2, 9, 60, 64);
  chunk.q_lens = {9, 4, 1};
  chunk.kv_lens = {60, 24, 5};
  chunk.q_offsets = {51, 20, 4};
  suite.add_causal("padding kv chunk", chunk);
  // Queries before position 20 see no key at all.
  const auto v = flex::variables();
  const AttentionShape s = shape_of(1, 2, 2, 50, 50, 64);
  suite.add("rows that see nothing", s, masked(s, v.kv <= v.q - 20));
}

void add_masks(Suite& suite) {
  const AttentionShape s = shape_of(2, 4, 2, 150, 150, 64);
  AttentionSpec window = causal_spec(s);
  window.window = 31;
  suite.add("window sdpa", s, window);
  suite.add("window flex", s, masked(s, flex::causal() && flex::window(32)));
  suite.add("sink and window", s, masked(s, flex::causal() && (flex::window(16) || flex::sink(4))));
  const Capture doc("doc", {Axis::b, Axis::pos}, flex::Type::integer);
  AttentionSpec documents = masked(s, flex::causal() && flex::document(doc));
  documents.bindings.set("doc", document_ids(s.batch, s.kv_len, 5));
  suite.add("documents", s, documents);
  const Capture length("length", {Axis::b}, flex::Type::integer);
  AttentionSpec prefix = masked(s, flex::prefix_lm(length));
  prefix.bindings.set("length", integers({40, 0}, {2}));
  suite.add("prefix LM", s, prefix);
  AttentionSpec padding = masked(s, flex::causal() && flex::padding(length));
  padding.bindings.set("length", integers({150, 77}, {2}));
  suite.add("padding mask", s, padding);
}

void add_score_mods(Suite& suite) {
  const AttentionShape s = shape_of(2, 4, 2, 67, 67, 64);
  const auto v = flex::variables();
  AttentionSpec softcap = causal_spec(s);
  softcap.score_mod = flex::softcap(2);
  suite.add("softcap", s, softcap);
  const Capture slope("slope", {Axis::h}, flex::Type::number, /*differentiable=*/true);
  AttentionSpec alibi = causal_spec(s);
  alibi.score_mod = flex::alibi(slope);
  alibi.bindings.set("slope", numbers({4}, 31, 0.05, 0.5));
  suite.add("alibi", s, alibi);
  const Capture table("table", {Axis::h, Axis::any}, flex::Type::number, /*differentiable=*/true);
  AttentionSpec relative = causal_spec(s);
  relative.score_mod = flex::relative_position(table, 12);
  relative.bindings.set("table", numbers({4, 25}, 32, -1, 1));
  suite.add("relative position", s, relative);
  const Capture bias("bias", {Axis::b, Axis::h, Axis::q}, flex::Type::number, /*differentiable=*/true);
  AttentionSpec scaled = causal_spec(s);
  scaled.score_mod = v.score * flex::sigmoid(bias(v.b, v.h, v.q));
  scaled.bindings.set("bias", numbers({2, 4, 67}, 33, -1, 1));
  suite.add("scale of a query", s, scaled);
  suite.add("synaptic", s, synaptic(s, /*differentiable=*/true));
  suite.add("synaptic constant", s, synaptic(s, /*differentiable=*/false));
  const AttentionShape decode = at_the_end(shape_of(2, 4, 2, 1, 83, 64));
  suite.add("synaptic kv decode", decode, synaptic(decode, /*differentiable=*/false));
  suite.add("lse gradient", s, causal_spec(s)).lse_gradient = true;
  suite.add("lse gradient of a mod", s, synaptic(s, /*differentiable=*/true)).lse_gradient = true;
}

void add_dropout_and_pages(Suite& suite) {
  const AttentionShape s = shape_of(2, 4, 2, 67, 67, 64);
  AttentionSpec dropout = causal_spec(s);
  dropout.dropout = 0.2;
  dropout.dropout_seed = 1234567;
  suite.add("dropout sdpa", s, dropout);
  dropout.causal = false;
  dropout.mask = flex::causal();
  dropout.score_mod = flex::softcap(3);
  suite.add("dropout flex", s, dropout);

  AttentionShape decode = shape_of(3, 4, 2, 1, 90, 64);
  decode.kv_lens = {90, 33, 1};
  decode.q_offsets = {89, 32, 0};
  AttentionShape chunk = shape_of(2, 4, 2, 11, 75, 128);
  chunk.q_lens = {11, 6};
  chunk.kv_lens = {75, 38};
  chunk.q_offsets = {64, 32};
  for (const auto& [name, shape] :
       {std::pair{"paged kv decode", decode}, std::pair{"paged kv chunk", chunk}}) {
    AttentionSpec sdpa = causal_spec(shape), flex_spec = masked(shape, flex::causal() && flex::window(24));
    sdpa.page_size = flex_spec.page_size = 16;
    suite.add(std::string(name) + " sdpa", shape, sdpa).backward = false;
    suite.add(std::string(name) + " flex", shape, flex_spec).backward = false;
  }
}

}  // namespace

std::vector<AttentionCase> attention_suite() {
  Suite suite;
  add_shapes(suite);
  add_lengths(suite);
  add_masks(suite);
  add_score_mods(suite);
  add_dropout_and_pages(suite);
  return std::move(suite.cases);
}

bool does_case(const AttentionSupport& kernel, const AttentionCase& c) {
  return attention_refusal(kernel.kernel, c.shape, c.spec).empty() &&
         (!c.lse_gradient || kernel.lse_gradient);
}

// ---- a user's mods --------------------------------------------------------------------------------------

std::vector<AttentionCase> attention_cases_of(const AttentionSpec& spec, const AttentionShape& shape) {
  Suite suite;
  AttentionSpec scaled = spec;
  scaled.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  suite.add("training", shape, scaled);
  AttentionCase& gradients = suite.add("with an LSE gradient", shape, scaled);
  gradients.lse_gradient = true;
  if (shape.q_len == shape.kv_len) suite.add("fused buffer", shape, scaled).fused = true;
  scaled.dropout = 0.1;
  scaled.dropout_seed = 99;
  suite.add("dropout", shape, scaled);
  scaled.dropout = 0;
  scaled.page_size = 16;
  suite.add("pages", shape, scaled).backward = false;
  return std::move(suite.cases);
}

// ---- random cases ---------------------------------------------------------------------------------------

namespace {

template <class T>
T pick(Rng& rng, std::initializer_list<T> of) {
  return of.begin()[rng.below(of.size())];
}
int64_t between(Rng& rng, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(rng.below(static_cast<uint64_t>(high - low + 1)));
}

// form: draws what is part of the expression; rng: draws data.
Expr random_mask(Rng& form, Rng& rng, const AttentionShape& s, flex::Bindings& bindings) {
  const auto v = flex::variables();
  const Capture doc("doc", {Axis::b, Axis::pos}, flex::Type::integer);
  const Capture length("length", {Axis::b}, flex::Type::integer);
  switch (form.below(7)) {
    case 0:
      return flex::causal();
    case 1:
      return flex::causal() && (flex::window(between(form, 1, 70)) || flex::sink(between(form, 0, 5)));
    case 2:
      bindings.set("doc", document_ids(s.batch, 400, rng.next_u32()));
      return flex::causal() && flex::document(doc);
    case 3: {
      std::vector<int64_t> lengths;
      for (int64_t b = 0; b < s.batch; ++b) lengths.push_back(between(rng, 0, s.kv_len));
      bindings.set("length", integers(lengths, {s.batch}));
      return flex::prefix_lm(length);
    }
    case 4:
      return (v.q + v.kv) % between(form, 2, 5) != 0;
    case 5:
      return flex::abs(v.q - v.kv) <= between(form, 0, 40) || v.kv == v.h;
    default:
      return flex::floor_div(v.q, 16) == flex::floor_div(v.kv, 16) || v.kv < v.n_kv - 9;
  }
}

std::optional<Expr> random_score_mod(Rng& form, Rng& rng, const AttentionShape& s, flex::Bindings& bindings) {
  const auto v = flex::variables();
  const Capture slope("slope", {Axis::h}, flex::Type::number, /*differentiable=*/true);
  const Capture key_bias("key_bias", {Axis::b, Axis::h, Axis::kv}, flex::Type::number,
                         /*differentiable=*/true);
  switch (form.below(6)) {
    case 0:
      return flex::softcap(pick(form, {1.5, 4.0, 30.0}));
    case 1:
      bindings.set("slope", numbers({s.n_head}, rng.next_u32(), 0.01, 0.5));
      return flex::alibi(slope);
    case 2:
      bindings.set("key_bias",
                   numbers({s.batch, s.n_head, std::max<int64_t>(s.kv_len, 1)}, rng.next_u32(), -1, 1));
      return v.score * 0.5 + key_bias(v.b, v.h, v.kv);
    case 3: {
      AttentionSpec spec = synaptic(s, /*differentiable=*/true);
      for (const flex::Capture& c : differentiable_captures(spec))
        bindings.set(c.name(), spec.bindings.at(c));
      return spec.score_mod;
    }
    case 4: {
      // No kink: at one the gradient of a score that lies within its rounding is not defined.
      const Expr above = flex::max(v.score - 1.0, 0.0);
      return v.score - 0.1 * above * above - flex::softplus(v.score * 0.3) / 4 +
             flex::where(v.kv % 3 == 0, 0.25, -0.25);
    }
    default:
      return std::nullopt;
  }
}

}  // namespace

AttentionCase random_attention_case(uint64_t seed, uint64_t forms) {
  Rng rng(seed, /*stream=*/11), form(forms > 0 ? seed % forms : seed, /*stream=*/12);
  AttentionCase c;
  c.seed = seed;
  const int64_t kv_heads = pick<int64_t>(rng, {1, 1, 2, 3}), group = pick<int64_t>(rng, {1, 2, 3, 4});
  const bool square = rng.below(2) == 0;
  const int64_t kv_len = pick(rng, {between(rng, 0, 20), between(rng, 1, 130), between(rng, 100, 200)});
  const int64_t q_len =
      square ? kv_len : pick<int64_t>(rng, {1, 1, between(rng, 0, 20), between(rng, 1, 100)});
  c.shape = shape_of(between(rng, 1, 3), kv_heads * group, kv_heads, q_len, kv_len,
                     pick<int64_t>(form, {32, 64, 64, 80, 96, 128, 128, 192, 256}));
  AttentionShape& s = c.shape;
  for (int64_t b = 0; rng.below(2) == 0 && b < s.batch; ++b) {
    if (b == 0) {
      s.q_lens.assign(static_cast<size_t>(s.batch), s.q_len);
      s.kv_lens.assign(static_cast<size_t>(s.batch), s.kv_len);
    }
    s.q_lens[static_cast<size_t>(b)] = between(rng, 0, s.q_len);
    s.kv_lens[static_cast<size_t>(b)] = between(rng, 0, s.kv_len);
  }
  if (rng.below(3) != 0 || !square) {
    for (int64_t b = 0; b < s.batch; ++b)
      s.q_offsets.push_back(between(rng, 0, std::max<int64_t>(kv_len, 1)));
  }
  c.spec = spec_of(s);
  if (rng.below(2) == 0) {
    c.spec.causal = true;
    if (rng.below(3) == 0) c.spec.window = between(rng, 0, 60);
  }
  if (form.below(3) != 0) c.spec.mask = random_mask(form, rng, s, c.spec.bindings);
  if (form.below(2) == 0) c.spec.score_mod = random_score_mod(form, rng, s, c.spec.bindings);
  if (form.below(4) == 0) {
    c.spec.dropout = 0.3;
    c.spec.dropout_seed = rng.next_u64();
  }
  if (form.below(4) == 0) {
    c.spec.page_size = pick<int64_t>(rng, {1, 8, 16, 64});
    c.backward = false;
  }
  c.lse_gradient = rng.below(3) == 0;
  c.fused = q_len == kv_len && c.spec.page_size == 0 && rng.below(3) == 0;
  c.name = fmt::format("seed {}: B{} H{}/{} {}x{} D{}{}{}{}{}", seed, s.batch, s.n_head, s.n_kv_head, q_len,
                       kv_len, s.head_dim, c.spec.causal ? " causal" : "",
                       c.spec.mask ? " mask " + to_text(*c.spec.mask) : "",
                       c.spec.score_mod ? " mod " + to_text(*c.spec.score_mod) : "",
                       c.spec.page_size ? fmt::format(" pages of {}", c.spec.page_size) : "");
  return c;
}

// ---- bit for bit ----------------------------------------------------------------------------------------

namespace {

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}
Check count_check(const std::string& name, int64_t differences) {
  return {name,
          static_cast<double>(differences),
          static_cast<double>(differences),
          static_cast<double>(differences),
          "max_abs",
          0,
          differences == 0};
}

}  // namespace

Check check_pages_bit_for_bit(Backend& backend, DType dtype, const std::string& kernel) {
  int64_t differences = 0;
  for (const int64_t q_len : {1, 9}) {
    AttentionCase c;
    c.shape = at_the_end(shape_of(2, 4, 2, q_len, 150, 64));
    c.spec = causal_spec(c.shape);
    c.backward = false;
    c.seed = 77;
    const AttentionResults contiguous = run_attention(c, backend, dtype, kernel);
    for (const int64_t page_size : {16, 64}) {
      c.spec.page_size = page_size;
      const AttentionResults paged = run_attention(c, backend, dtype, kernel);
      differences += same_bits(contiguous.out, paged.out) && same_bits(contiguous.lse, paged.lse) ? 0 : 1;
    }
  }
  return count_check("pages bit for bit", differences);
}

Check check_backward_repeats(Backend& backend, DType dtype, const std::string& kernel, int repeats) {
  AttentionCase c;
  c.shape = shape_of(2, 4, 2, 200, 200, 64);
  const bool mods = kernel == "auto" || attention_support(kernel).score_mod;
  c.spec = mods ? synaptic(c.shape, /*differentiable=*/true) : causal_spec(c.shape);
  c.seed = 78;
  const AttentionResults first = run_attention(c, backend, dtype, kernel);
  int64_t differences = 0;
  for (int i = 1; i < repeats; ++i) {
    const AttentionResults again = run_attention(c, backend, dtype, kernel);
    bool same =
        same_bits(first.dq, again.dq) && same_bits(first.dk, again.dk) && same_bits(first.dv, again.dv);
    for (size_t k = 0; k < first.captures.size(); ++k) {
      same = same && same_bits(first.captures[k].second, again.captures[k].second);
    }
    differences += same ? 0 : 1;
  }
  return count_check(fmt::format("backward {} times bit for bit", repeats), differences);
}

}  // namespace flexchat
