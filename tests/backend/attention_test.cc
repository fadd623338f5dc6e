// Causal windowed attention, forward and backward: grouped heads, offsets, chunks, single rows, blind rows.
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

struct Case {
  int64_t batch, q_len, kv_len, n_head, n_kv_head, d, q_offset, window;
};
constexpr int64_t kSpare = 3;  // columns of q and out rows beside the heads, and cache rows beyond kv_len

const Case kCases[] = {
    // whole sequences around the block of 64 query rows, head dims, GQA ratios
    {1, 1, 1, 1, 1, 2, 0, -1},
    {2, 3, 3, 2, 2, 6, 0, -1},
    {1, 7, 7, 4, 2, 8, 0, -1},
    {1, 17, 17, 4, 1, 32, 0, -1},
    {2, 33, 33, 2, 1, 80, 0, -1},
    {1, 63, 63, 2, 2, 128, 0, -1},
    {1, 64, 64, 3, 1, 6, 0, -1},
    {2, 65, 65, 4, 4, 8, 0, -1},
    {1, 129, 129, 4, 2, 32, 0, -1},
    // windows: the token alone, its neighbour, less and more than a block, more than the sequence
    {2, 9, 9, 2, 1, 6, 0, 0},
    {1, 70, 70, 2, 1, 8, 0, 1},
    {1, 129, 129, 2, 1, 8, 0, 5},
    {1, 140, 140, 2, 2, 6, 0, 64},
    {1, 130, 130, 1, 1, 2, 0, 100},
    {1, 33, 33, 2, 1, 32, 0, 500},
    // chunks behind a cache, with and without a window
    {1, 2, 9, 4, 2, 8, 7, -1},
    {2, 5, 12, 4, 1, 32, 7, 3},
    {1, 65, 130, 2, 1, 6, 65, -1},
    {2, 66, 70, 2, 1, 80, 4, 20},
    {1, 7, 200, 2, 2, 128, 193, 127},
    // one token behind a cache
    {1, 1, 2, 1, 1, 2, 1, -1},
    {3, 1, 33, 4, 2, 6, 32, -1},
    {2, 1, 127, 8, 2, 80, 126, 16},
    {1, 1, 200, 4, 1, 128, 199, 0},
    {1, 1, 129, 4, 4, 32, 128, 300},
    // fewer keys than positions: the last queries see less than their window, then nothing
    {2, 6, 4, 2, 1, 8, 0, -1},
    {1, 9, 4, 2, 1, 8, 0, 2},
    {1, 70, 4, 2, 1, 8, 0, 2},
    {2, 3, 5, 2, 2, 6, 9, 2},
    {2, 1, 5, 2, 2, 6, 9, 2},
};

std::string label(const Case& c) {
  return fmt::format("B{} Tq{} Tk{} H{} G{} D{} offset {} window {}", c.batch, c.q_len, c.kv_len, c.n_head,
                     c.n_kv_head, c.d, c.q_offset, c.window);
}

AttentionShape shape_of(const Case& c) {
  return {c.batch,    c.q_len,     c.kv_len,
          c.n_head,   c.n_kv_head, c.d,
          c.q_offset, c.window,    1.1 / std::sqrt(static_cast<double>(c.d))};
}

class Attention : public KernelTest {
 protected:
  // (B, rows, columns) with `kSpare` rows of NaN behind every sequence: nobody may read them.
  Tensor cache(const Case& c) {
    const Tensor t = random_tensor(rng, {c.batch, c.kv_len + kSpare, c.n_kv_head * c.d}, dtype());
    const int64_t row = t.dim(2);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t i = c.kv_len * row; i < t.dim(1) * row; ++i) t.set(b * t.dim(1) * row + i, std::nan(""));
    }
    return t;
  }
  Tensor queries(const Case& c) {
    return random_tensor(rng, {c.batch, c.q_len, c.n_head * c.d + kSpare}, dtype());
  }
  // A score is a dot product of some 1e-7 * sqrt(D) / sqrt(D); softmax weights inherit that relative error.
  static constexpr Tolerance kTolerance = {1, 4e-6, 4e-6, 1};
};
FLEXCHAT_FOR_EVERY_DTYPE(Attention);

TEST_P(Attention, Forward) {
  for (const Case& c : kCases) {
    check_kernel(label(c),
                 {in(queries(c)), in(cache(c)), in(cache(c)), update(queries(c), kTolerance),
                  out({c.batch, c.n_head, c.q_len}, DType::f32, kTolerance)},
                 [&](Backend& b, const Tensors& t) {
                   b.attention(shape_of(c), heads_view(t[0], kSpare), heads_view(t[1]), heads_view(t[2]),
                               heads_view(t[3]), &t[4]);
                 },
                 {.same_bits_for_any_threads = c.q_len == 1, .repeats = 1});
  }
}

TEST_P(Attention, WithoutLse) {
  for (const Case& c : {kCases[4], kCases[20], kCases[18]}) {
    check_kernel(label(c), {in(queries(c)), in(cache(c)), in(cache(c)), update(queries(c), kTolerance)},
                 [&](Backend& b, const Tensors& t) {
                   b.attention(shape_of(c), heads_view(t[0]), heads_view(t[1]), heads_view(t[2]),
                               heads_view(t[3], kSpare), nullptr);
                 },
                 {.same_bits_for_any_threads = c.q_len == 1});
  }
}

// Scores of +-1000: the maximum must be taken out before exp.
TEST_P(Attention, LargeScores) {
  const Case c = {1, 70, 70, 2, 1, 8, 0, -1};
  const Tensor q = random_tensor(rng, {1, 70, 16}, dtype(), 100),
               k = random_tensor(rng, {1, 70, 8}, dtype(), 10), v = random_tensor(rng, {1, 70, 8}, dtype());
  // Two keys whose f32 scores differ by 6e-8 * 1000 share the weight with as much relative error.
  const Tolerance tolerance = {1, 1e-3, 1e-3};
  check_kernel(label(c),
               {in(q), in(k), in(v), out({1, 70, 16}, dtype(), tolerance), out({1, 2, 70}, DType::f32)},
               [&](Backend& b, const Tensors& t) {
                 b.attention(shape_of(c), heads_view(t[0]), heads_view(t[1]), heads_view(t[2]),
                             heads_view(t[3]), &t[4]);
               },
               {.same_bits_for_any_threads = false});
}

TEST_P(Attention, Backward) {
  for (const Case& c : kCases) {
    const AttentionShape s = shape_of(c);
    const Tensor q = queries(c), k = cache(c), v = cache(c), dout = queries(c);
    // What the forward left behind, rounded as the CPU's forward rounds it.
    const auto reference = make_reference_backend();
    const Tensor out64(host_arena(), {c.batch, c.q_len, c.n_head * c.d}, DType::f64),
        lse64(host_arena(), {c.batch, c.n_head, c.q_len}, DType::f64);
    reference->attention(s, heads_view(converted(q, DType::f64)), heads_view(converted(k, DType::f64)),
                         heads_view(converted(v, DType::f64)), heads_view(out64), &lse64);
    // p = exp(score - lse): a rounding of lse is a relative error of p. Sums over a group's heads and rows.
    const Tolerance tolerance = {1, 8e-6, 8e-6, 1};
    const Shape kv = {c.batch, c.kv_len, c.n_kv_head * c.d};
    check_kernel(
        label(c),
        {in(q), in(k), in(v), in(converted(out64, dtype())), in(dout), in(converted(lse64, DType::f32)),
         out({c.batch, c.q_len, c.n_head * c.d}, dtype(), tolerance), out(kv, dtype(), tolerance),
         out(kv, dtype(), tolerance)},
        [&](Backend& b, const Tensors& t) {
          b.attention_backward(s, heads_view(t[0]), heads_view(t[1]), heads_view(t[2]), heads_view(t[3]),
                               heads_view(t[4], kSpare), t[5], heads_view(t[6]), heads_view(t[7]),
                               heads_view(t[8]));
        },
        {.same_bits_for_any_threads = false, .repeats = c.q_len == 129 && c.window < 0 ? 20 : 0});
  }
}

}  // namespace
}  // namespace flexchat
