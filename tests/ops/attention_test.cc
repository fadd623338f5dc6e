// Attention as an operation: gradients against finite differences for the fused and the general form, with
// masks, score mods, captured tensors and the LSE; caches and pages; misuse.
#include <gtest/gtest.h>

#include "base/error.h"
#include "flex/mods.h"
#include "testing/gradient_check.h"

namespace flexchat {
namespace {

using flex::Axis;
using flex::Capture;

struct Sizes {
  int64_t batch, q_len, kv_len, n_head, n_kv_head, d;
};
AttentionShape shape_of(const Sizes& s) {
  return {.batch = s.batch,
          .q_len = s.q_len,
          .kv_len = s.kv_len,
          .n_head = s.n_head,
          .n_kv_head = s.n_kv_head,
          .head_dim = s.d};
}
AttentionSpec causal(double scale, int64_t window = -1) {
  AttentionSpec spec;
  spec.scale = scale;
  spec.causal = true;
  spec.window = window;
  return spec;
}

class AttentionOp : public testing::Test {
 protected:
  Tensor random(Shape shape) { return random_tensor(rng, std::move(shape), DType::f64); }
  Var var(Shape shape) { return Tape::leaf(filled_tensor(std::move(shape), DType::f64, 0.5)); }
  AttentionPlanPtr plan(const Sizes& s, const AttentionSpec& spec) {
    return backend->plan_attention(shape_of(s), spec);
  }
  static std::string message(const std::function<void()>& fn) {
    try {
      fn();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  Rng rng{12};
  std::unique_ptr<Backend> backend = make_reference_backend();
  Tape tape{*backend, true}, inference{*backend, false};
};

// ---- gradients ------------------------------------------------------------------------------------------

TEST_F(AttentionOp, FusedGradients) {
  const struct {
    Sizes sizes;
    double scale;
    int64_t window;
  } cases[] = {{{1, 1, 1, 1, 1, 2}, 0.7, -1}, {{2, 3, 3, 2, 2, 3}, 0.6, -1}, {{1, 7, 7, 4, 2, 2}, 0.5, -1},
               {{1, 5, 5, 4, 1, 3}, 0.8, 2},  {{2, 6, 6, 2, 1, 2}, 1.0, 0},  {{1, 6, 6, 3, 3, 2}, 1.0, 9}};
  for (const auto& [s, scale, window] : cases) {
    const AttentionPlanPtr p = plan(s, causal(scale, window));
    check_gradients(
        fmt::format("T{} H{} G{} window {}", s.q_len, s.n_head, s.n_kv_head, window),
        {random({s.batch * s.q_len, (s.n_head + 2 * s.n_kv_head) * s.d})}, {},
        [&](Tape& t, const std::vector<Var>& v) { return weighted_sum(t, attention(t, v[0], p)); });
  }
}

// Gradients of q, k, v and of captured tensors that the mod reads in every way, with and without the LSE. The
// captured tensors are inputs of the graph, so each run makes its plan.
TEST_F(AttentionOp, GeneralGradients) {
  const auto v = flex::variables();
  const Capture slope("slope", {Axis::h}, flex::Type::number, true),
      gain("gain", {Axis::b, Axis::h, Axis::kv}, flex::Type::number, true),
      table("table", {Axis::h, Axis::any}, flex::Type::number, true);
  const Sizes s = {2, 4, 6, 4, 2, 3};
  AttentionShape shape = shape_of(s);
  shape.q_lens = {4, 3};
  shape.kv_lens = {6, 4};
  shape.q_offsets = {2, 0};
  for (const bool with_lse : {false, true}) {
    const Graph graph = [&](Tape& t, const std::vector<Var>& x) {
      AttentionSpec spec;
      spec.scale = 0.6;
      spec.mask = flex::causal() || v.kv == 3;
      spec.score_mod = flex::softcap(
          4, flex::relative_position(table, 2, v.score * gain(v.b, v.h, v.kv) - slope(v.h) * (v.q - v.kv)));
      spec.bindings.set("slope", x[3]->value).set("gain", x[4]->value).set("table", x[5]->value);
      spec.dropout = 0.25;
      spec.dropout_seed = 5;
      const AttentionOutput a = attention(t, x[0], x[1], x[2], t.backend().plan_attention(shape, spec),
                                          {{"slope", x[3]}, {"gain", x[4]}, {"table", x[5]}}, with_lse);
      double loss = weighted_sum(t, a.out);
      if (!with_lse) return loss;
      // Queries that are not there have an LSE of -inf, which no loss may read.
      if (t.recording()) a.lse->grad = filled_tensor(a.lse->value.shape(), DType::f64, 0);
      for (int64_t i = 0; i < a.lse->value.numel(); ++i) {
        if (!std::isfinite(a.lse->value.get(i))) continue;
        const double w = 0.1 * static_cast<double>(i % 7 - 3);
        loss += w * a.lse->value.get(i);
        if (t.recording()) a.lse->grad.set(i, w);
      }
      return loss;
    };
    check_gradients(
        with_lse ? "with LSE" : "without LSE",
        {random({s.batch * s.q_len, s.n_head * s.d}), random({s.batch * s.kv_len, s.n_kv_head * s.d}),
         random({s.batch * s.kv_len, s.n_kv_head * s.d}), random({s.n_head}),
         random({s.batch, s.n_head, s.kv_len}), random({s.n_head, 5})},
        {}, graph);
  }
}

// Keys that are the values, and q read by another as well: gradients add up.
TEST_F(AttentionOp, SharedInputs) {
  const Sizes s = {1, 3, 3, 2, 2, 2};
  const AttentionPlanPtr p = plan(s, causal(0.7));
  Weight other = random_weight(rng, {3, 4});
  check_gradients("shared", {random({3, 4}), random({3, 4})}, {&other},
                  [&](Tape& t, const std::vector<Var>& x) {
                    const Var y = linear(t, x[0], other);
                    const Var a = attention(t, x[0], x[1], x[1], p).out;
                    return weighted_sum(t, a, 1) + weighted_sum(t, y, 2);
                  });
}

// The LSE alone may be what a loss reads.
TEST_F(AttentionOp, OnlyTheLseIsRead) {
  const Sizes s = {1, 3, 5, 2, 1, 2};
  AttentionSpec spec;
  spec.scale = 0.7;
  const AttentionPlanPtr p = plan(s, spec);
  check_gradients("LSE", {random({3, 4}), random({5, 2}), random({5, 2})}, {},
                  [&](Tape& t, const std::vector<Var>& x) {
                    return weighted_sum(t, attention(t, x[0], x[1], x[2], p, {}, true).lse);
                  });
}

// ---- caches and pages -----------------------------------------------------------------------------------

// The last queries of a sequence over a cache of its keys: what self-attention gives for those rows. Pages
// through a block table give the same bits.
TEST_F(AttentionOp, CacheEqualsTheLastRowsOfSelfAttention) {
  const int64_t batch = 2, t_len = 9, h = 4, g = 2, d = 3, row = (h + 2 * g) * d, max_len = 12, page = 4;
  const Tensor qkv = random({batch, t_len, row});
  for (const int64_t window : {-1, 3}) {
    AttentionSpec spec = causal(0.4, window);
    const Var expected = attention(inference, Tape::leaf(qkv.reshape({batch * t_len, row})),
                                   plan({batch, t_len, t_len, h, g, d}, spec));
    const Tensor k = filled_tensor({batch, max_len, g * d}, DType::f64, std::nan("")), v = duplicate(k);
    backend->copy_rows(batch, t_len, g * d, heads_view(qkv, h * d), heads_view(k));
    backend->copy_rows(batch, t_len, g * d, heads_view(qkv, (h + g) * d), heads_view(v));
    // The cache's pages are its rows cut into three; the table is the identity.
    const Tensor k_pages = k.reshape({batch * max_len / page, page, g * d}),
                 v_pages = v.reshape({batch * max_len / page, page, g * d}),
                 block_table(host_arena(), {batch, max_len / page}, DType::i32);
    for (int64_t i = 0; i < block_table.numel(); ++i) block_table.set(i, static_cast<double>(i));
    for (const int64_t count : {1, 4, 9}) {
      const Tensor last(host_arena(), {batch * count, row}, DType::f64);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < count * row; ++i)
          last.set(b * count * row + i, qkv.get((b * t_len + t_len - count) * row + i));
      }
      AttentionShape s = shape_of({batch, count, t_len, h, g, d});
      s.q_offsets = {t_len - count, t_len - count};
      const Var got = cached_attention(inference, Tape::leaf(last), k, v, backend->plan_attention(s, spec));
      spec.page_size = page;
      const Var paged = cached_attention(inference, Tape::leaf(last), k_pages, v_pages,
                                         backend->plan_attention(s, spec), &block_table);
      spec.page_size = 0;
      for (int64_t b = 0; b < batch; ++b) {
        EXPECT_EQ(max_difference(got->value.rows(b * count, count),
                                 expected->value.rows((b + 1) * t_len - count, count)),
                  0)
            << count << " rows";
      }
      EXPECT_TRUE(same_bits(paged->value, got->value)) << count << " rows in pages";
    }
  }
}

// ---- misuse ---------------------------------------------------------------------------------------------

TEST_F(AttentionOp, ShapesThatDoNotFit) {
  const AttentionSpec spec = causal(1);
  const Tensor k = filled_tensor({1, 4, 4}, DType::f64, 0);
  EXPECT_EQ(message([&] {
              plan({1, 3, 3, 3, 2, 2}, spec);
            }),
            "3 query heads cannot share 2 key heads; the second must divide the first");
  EXPECT_EQ(message([&] {
              attention(tape, var({3, 10}), plan({1, 3, 3, 4, 2, 2}, spec));
            }),
            "attention: qkv (3, 10) is not (B*T, (H+2G)*D) = (3, 16)");
  EXPECT_EQ(message([&] {
              attention(tape, var({3, 16}), plan({1, 3, 5, 4, 2, 2}, spec));
            }),
            "attention: 3 queries over 5 keys need a cache");
  EXPECT_EQ(message([&] {
              cached_attention(inference, var({3, 16}), k, k, plan({1, 3, 5, 4, 2, 2}, spec));
            }),
            "attention: 5 keys do not fit a cache of 4");
  EXPECT_EQ(message([&] {
              cached_attention(tape, var({3, 16}), k, k, plan({1, 3, 4, 4, 2, 2}, spec));
            }),
            "attention over a cache has no backward");
  EXPECT_EQ(message([&] {
              attention(tape, var({3, 8}), var({4, 4}), var({5, 4}), plan({1, 3, 5, 4, 2, 2}, spec));
            }),
            "attention: k (4, 4) does not fit the plan, which needs (5, 4)");
}

TEST_F(AttentionOp, SecondReaders) {
  const Var qkv = var({3, 16});
  const Var out = attention(tape, qkv, plan({1, 3, 3, 4, 2, 2}, causal(1)));
  weighted_sum(tape, out);
  qkv->grad = filled_tensor({3, 16}, DType::f64, 0);
  EXPECT_EQ(message([&] { tape.backward(); }), "attention must be the only reader of qkv");
}

TEST_F(AttentionOp, BlockTables) {
  AttentionSpec spec = causal(1);
  spec.page_size = 2;
  const AttentionPlanPtr p = plan({1, 1, 5, 1, 1, 2}, spec);
  const Tensor pool = filled_tensor({3, 2, 2}, DType::f64, 0);
  const auto run = [&](std::vector<double> pages) {
    const auto n = static_cast<int64_t>(pages.size());
    const Tensor table = Tensor::from(std::span<const double>(pages), {1, n}, DType::i32);
    cached_attention(inference, var({1, 6}), pool, pool, p, &table);
  };
  run({2, 0, 1});
  EXPECT_EQ(message([&] {
              run({2, 0, 3});
            }),
            "attention: the block table sends page 2 of row 0 to 3; allowed are 0 to 2");
  EXPECT_EQ(message([&] {
              run({2, -1, 1});
            }),
            "attention: the block table sends page 1 of row 0 to -1; allowed are 0 to 2");
  EXPECT_EQ(message([&] {
              run({2, 0});
            }),
            "attention: row 0 of the batch has 5 keys, but its 2 pages hold 4");
  EXPECT_EQ(message([&] {
              cached_attention(inference, var({1, 6}), pool, pool, p);
            }),
            "attention: keys in pages need a block table");
}

}  // namespace
}  // namespace flexchat
