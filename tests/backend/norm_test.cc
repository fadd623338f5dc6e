// RMSNorm, embedding with norm, rotary embedding with norm: forward and backward.
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

class Norm : public KernelTest {
 protected:
  Tensor random(Shape shape) { return random_tensor(rng, std::move(shape), dtype()); }
  // Positive factors as 1/rms would be; the backward formulas hold for any.
  Tensor random_rstd(Shape shape) { return uniform_tensor(rng, std::move(shape), DType::f32, 0.5, 1.5); }
};
FLEXCHAT_FOR_EVERY_DTYPE(Norm);

TEST_P(Norm, RmsNorm) {
  for (const int64_t n : {1, 2, 17, 70}) {
    for (const int64_t c : kAwkward) {
      check_kernel(fmt::format("({}, {})", n, c),
                   {in(random({n, c})), out({n, c}, dtype()), out({n}, DType::f32)},
                   [](Backend& b, const Tensors& t) { b.rms_norm(t[0], t[1], t[2]); });
    }
  }
}

TEST_P(Norm, RmsNormOfWideRows) {
  for (const int64_t c : kWide) {
    check_kernel(fmt::format("(9, {})", c), {in(random({9, c})), out({9, c}, dtype()), out({9}, DType::f32)},
                 [](Backend& b, const Tensors& t) { b.rms_norm(t[0], t[1], t[2]); });
  }
}

// A row of zeros and rows whose squares leave only the epsilon.
TEST_P(Norm, RmsNormOfTinyRows) {
  const Tensor x = filled_tensor({3, 65}, dtype(), 0);
  for (int64_t i = 0; i < 65; ++i) {
    x.set(65 + i, 1e-3);
    x.set(130 + i, 3e-5);
  }
  check_kernel("tiny", {in(x), out({3, 65}, dtype()), out({3}, DType::f32)},
               [](Backend& b, const Tensors& t) { b.rms_norm(t[0], t[1], t[2]); });
}

TEST_P(Norm, RmsNormBackward) {
  for (const bool accumulate : {false, true}) {
    for (const int64_t n : {1, 17, 70}) {
      for (const int64_t c : kAwkward) {
        const Tolerance tolerance = {.least_scale = 1};  // at c = 1 the terms may cancel
        check_kernel(
            fmt::format("({}, {}) accumulate {}", n, c, accumulate),
            {in(random({n, c})), in(random({n, c})), in(random_rstd({n})),
             accumulate ? update(random({n, c}), tolerance) : out({n, c}, dtype(), tolerance)},
            [=](Backend& b, const Tensors& t) { b.rms_norm_backward(t[0], t[1], t[2], accumulate, t[3]); },
            {.repeats = n == 70 && c == 129 ? 10 : 0});
      }
    }
  }
}

TEST_P(Norm, RmsNormBackwardOfWideRows) {
  for (const bool accumulate : {false, true}) {
    for (const int64_t c : kWide) {
      check_kernel(
          fmt::format("(9, {}) accumulate {}", c, accumulate),
          {in(random({9, c})), in(random({9, c})), in(random_rstd({9})),
           accumulate ? update(random({9, c})) : out({9, c}, dtype())},
          [=](Backend& b, const Tensors& t) { b.rms_norm_backward(t[0], t[1], t[2], accumulate, t[3]); });
    }
  }
}

TEST_P(Norm, EmbedNormOfWideRows) {
  for (const int64_t c : kWide) {
    check_kernel(fmt::format("{} columns", c),
                 {in(random_tensor(rng, {5, c}, DType::f32)), in(random_ids(rng, {9}, 5)),
                  out({9, c}, dtype()), out({9}, DType::f32)},
                 [](Backend& b, const Tensors& t) { b.embed_norm(t[0], t[1], t[2], t[3]); });
  }
}

// Many tokens: runs of equal ids that are longer than what a GPU's block sums, that cross its borders or end
// at them; and rows wider than its threads.
TEST_P(Norm, EmbedNormBackwardOfManyTokens) {
  struct Case {
    int64_t n, v, c;
  };
  for (const auto& [n, v, c] : {Case{200, 1, 64},
                                {200, 3, 1288},
                                {333, 50, 40},
                                {256, 400, 264},
                                {64, 2, 33},
                                {70, 3, 4104},
                                {70, 3, 521}}) {
    check_kernel(fmt::format("{} ids below {}, {} columns", n, v, c),
                 {in(random({n, c})), in(random_tensor(rng, {v, c}, DType::f32)), in(random_ids(rng, {n}, v)),
                  in(random_rstd({n})), update(random_tensor(rng, {v, c}, DType::f32), {.least_scale = 10})},
                 [](Backend& b, const Tensors& t) { b.embed_norm_backward(t[0], t[1], t[2], t[3], t[4]); });
  }
}

TEST_P(Norm, EmbedNorm) {
  for (const int64_t n : {1, 5, 70}) {
    for (const int64_t c : kAwkward) {
      for (const int64_t v : {1, 2, 250}) {
        check_kernel(fmt::format("{} ids below {}, {} columns", n, v, c),
                     {in(random_tensor(rng, {v, c}, DType::f32)), in(random_ids(rng, {n}, v)),
                      out({n, c}, dtype()), out({n}, DType::f32)},
                     [](Backend& b, const Tensors& t) { b.embed_norm(t[0], t[1], t[2], t[3]); });
      }
    }
  }
}

// Repeated ids add up in token order whatever the threads; rows that no token names stay as they were.
TEST_P(Norm, EmbedNormBackward) {
  for (const int64_t n : {1, 19, 70}) {
    for (const int64_t c : n == 70 ? std::vector<int64_t>{129} : kAwkward) {
      for (const int64_t v : {1, 2, 250}) {
        check_kernel(
            fmt::format("{} ids below {}, {} columns", n, v, c),
            {in(random({n, c})), in(random_tensor(rng, {v, c}, DType::f32)), in(random_ids(rng, {n}, v)),
             in(random_rstd({n})), update(random_tensor(rng, {v, c}, DType::f32), {.least_scale = 4})},
            [](Backend& b, const Tensors& t) { b.embed_norm_backward(t[0], t[1], t[2], t[3], t[4]); },
            {.repeats = n == 70 ? 20 : 0});
      }
    }
  }
}

// Columns behind the rotated heads must stay as they were.
struct RopeCase {
  int64_t batch, t_len, heads, d, extra, q_offset;
  double scale;
};
const RopeCase kRope[] = {{1, 1, 1, 2, 0, 0, 1.0},       {1, 1, 3, 6, 4, 5, 1.2},
                          {2, 5, 2, 8, 8, 0, 1.2},       {2, 17, 3, 32, 5, 7, 1.0},
                          {3, 23, 4, 80, 1, 2, 1.2},     {1, 33, 2, 128, 128, 40, 1.2},
                          {2, 5, 20, 128, 1280, 3, 1.2}, {1, 9, 7, 64, 64, 0, 1.0},
                          {1, 3, 5, 96, 96, 1, 1.2},     {1, 3, 3, 256, 0, 0, 1.0}};

Tensor rope_table(int64_t length, int64_t half, double (*fn)(double)) {
  const Tensor t(host_arena(), {length, half}, DType::f32);
  for (int64_t p = 0; p < length; ++p) {
    for (int64_t j = 0; j < half; ++j) {
      const double angle =
          static_cast<double>(p) * std::pow(100.0, -static_cast<double>(j) / static_cast<double>(half));
      t.set(p * half + j, fn(angle));
    }
  }
  return t;
}

TEST_P(Norm, RopeNorm) {
  for (const RopeCase& k : kRope) {
    const int64_t length = k.q_offset + k.t_len;
    check_kernel(fmt::format("D {} T {}", k.d, k.t_len),
                 {update(random({k.batch, k.t_len, k.heads * k.d + k.extra})),
                  in(rope_table(length, k.d / 2, std::cos)), in(rope_table(length, k.d / 2, std::sin)),
                  out({k.batch * k.t_len, k.heads}, DType::f32)},
                 [&](Backend& b, const Tensors& t) {
                   b.rope_norm(t[0], t[1], t[2], k.heads, k.q_offset, k.scale, t[3]);
                 });
  }
}

TEST_P(Norm, RopeNormBackward) {
  for (const RopeCase& k : kRope) {
    const int64_t length = k.q_offset + k.t_len;
    const Shape shape = {k.batch, k.t_len, k.heads * k.d + k.extra};
    check_kernel(fmt::format("D {} T {}", k.d, k.t_len),
                 {in(random(shape)), in(rope_table(length, k.d / 2, std::cos)),
                  in(rope_table(length, k.d / 2, std::sin)), in(random_rstd({k.batch * k.t_len, k.heads})),
                  update(random(shape))},
                 [&](Backend& b, const Tensors& t) {
                   b.rope_norm_backward(t[0], t[1], t[2], k.heads, k.q_offset, k.scale, t[3], t[4]);
                 },
                 {.repeats = k.d == 80 ? 20 : 0});
  }
}

}  // namespace
}  // namespace flexchat
