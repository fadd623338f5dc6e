// relu^2, learned mixes, smear and value-embedding gates: forward and backward.
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

class Elementwise : public KernelTest {
 protected:
  Tensor random(Shape shape) { return random_tensor(rng, std::move(shape), dtype()); }
  Tensor master(Shape shape) { return random_tensor(rng, std::move(shape), DType::f32); }
  static std::vector<int64_t> sizes() {
    std::vector<int64_t> sizes = kAwkward;
    sizes.push_back(3 * 16384 + 5);  // several threads, the last with a rest
    return sizes;
  }
};
FLEXCHAT_FOR_EVERY_DTYPE(Elementwise);

TEST_P(Elementwise, ReluSquared) {
  for (const int64_t n : sizes()) {
    check_kernel(fmt::format("{}", n), {in(random({1, n})), out({1, n}, dtype())},
                 [](Backend& b, const Tensors& t) { b.relu_squared(t[0], t[1]); });
  }
}

TEST_P(Elementwise, ReluSquaredBackward) {
  for (const int64_t n : sizes()) {
    check_kernel(fmt::format("{}", n), {update(random({1, n})), update(random({1, n}))},
                 [](Backend& b, const Tensors& t) { b.relu_squared_backward(t[0], t[1]); }, {.repeats = 2});
  }
}

TEST_P(Elementwise, Mix) {
  for (const int64_t n : sizes()) {
    check_kernel(
        fmt::format("{} with learned factors", n),
        {in(master({3})), in(master({1})), in(random({1, n})), in(random({1, n})), out({1, n}, dtype())},
        [](Backend& b, const Tensors& t) {
          b.mix({&t[0], 2, 1.5}, t[2], {&t[1], 0, -1.0}, t[3], t[4]);
        });
    check_kernel(fmt::format("{} with constants, x twice", n), {in(random({1, n})), out({1, n}, dtype())},
                 [](Backend& b, const Tensors& t) {
                   b.mix({nullptr, 0, 0.75}, t[0], {}, t[0], t[1]);
                 });
  }
}

TEST_P(Elementwise, MixBackward) {
  for (const bool accumulate_x : {false, true}) {
    for (const bool accumulate_y : {false, true}) {
      for (const auto& [rows, c] :
           {std::pair<int64_t, int64_t>{1, 1}, {1, 7}, {17, 33}, {70, 129}, {40, 1280}}) {
        const auto gradient = [&, n = rows, width = c](bool accumulate) {
          return accumulate ? update(random({n, width})) : out({n, width}, dtype());
        };
        // da and db add up rows * c products of size 1.
        const Tolerance sums = {.least_scale = std::sqrt(static_cast<double>(rows * c))};
        check_kernel(fmt::format("({}, {}) {} {}", rows, c, accumulate_x, accumulate_y),
                     {in(random({rows, c})), in(master({3})), in(random({rows, c})), in(master({2})),
                      in(random({rows, c})), gradient(accumulate_x), gradient(accumulate_y),
                      update(master({3}), sums), update(master({2}), sums)},
                     [=](Backend& b, const Tensors& t) {
                       b.mix_backward(t[0], {&t[1], 2, 1.5}, t[2], {&t[3], 1, -1.0}, t[4], accumulate_x, t[5],
                                      accumulate_y, t[6], &t[7], &t[8]);
                     },
                     {.repeats = rows == 70 ? 5 : 0});
      }
    }
  }
}

// x and y the same: dx is written, then dy adds to it.
TEST_P(Elementwise, MixBackwardIntoOneGradient) {
  for (const bool accumulate : {false, true}) {
    const Tolerance twice = {.roundings = 2};
    check_kernel(fmt::format("accumulate {}", accumulate),
                 {in(random({17, 33})), in(master({1})), in(random({17, 33})),
                  accumulate ? update(random({17, 33}), twice) : out({17, 33}, dtype(), twice),
                  update(master({1}), {.least_scale = 25})},
                 [=](Backend& b, const Tensors& t) {
                   b.mix_backward(t[0], {nullptr, 0, 0.5}, t[2], {&t[1], 0, 2.0}, t[2], accumulate, t[3],
                                  true, t[3], nullptr, &t[4]);
                 });
  }
}

struct SmearCase {
  int64_t batch, t_len, c, channels;
};
const SmearCase kSmear[] = {{1, 1, 1, 1},   {2, 1, 24, 24},   {3, 2, 25, 24},
                            {1, 17, 33, 7}, {2, 33, 65, 24},  {1, 70, 129, 24},
                            {2, 3, 17, 17}, {2, 9, 1280, 24}, {1, 5, 2056, 24}};

TEST_P(Elementwise, Smear) {
  for (const SmearCase& k : kSmear) {
    check_kernel(fmt::format("({}, {}, {})", k.batch, k.t_len, k.c),
                 {in(random({k.batch, k.t_len, k.c})), in(master({1, k.channels})), in(master({1})),
                  out({k.batch, k.t_len, k.c}, dtype()), out({k.batch, k.t_len}, DType::f32)},
                 [](Backend& b, const Tensors& t) { b.smear(t[0], nullptr, t[1], t[2], t[3], t[4]); });
  }
}

// `previous` counts for single tokens only; a longer chunk starts without.
TEST_P(Elementwise, SmearAfterPreviousToken) {
  for (const int64_t t_len : {1, 2}) {
    for (const int64_t batch : {1, 19}) {
      check_kernel(
          fmt::format("({}, {})", batch, t_len),
          {in(random({batch, t_len, 33})), in(master({1, 24})), in(master({1})),
           out({batch, t_len, 33}, dtype()), out({batch, t_len}, DType::f32), in(random({batch, 33}))},
          [](Backend& b, const Tensors& t) { b.smear(t[0], &t[5], t[1], t[2], t[3], t[4]); });
    }
  }
  const auto cpu = make_cpu_backend();
  const Tensor e = random({1, 1, 24}), previous = random({1, 24}), gate = master({1, 24}),
               one = filled_tensor({1}, DType::f32, 1);
  const Tensor with = duplicate(e), without = duplicate(e), sigmoid(host_arena(), {1, 1}, DType::f32);
  cpu->smear(e, &previous, gate, one, with, sigmoid);
  cpu->smear(e, nullptr, gate, one, without, sigmoid);
  EXPECT_TRUE(same_bits(without, e));
  EXPECT_GT(max_difference(with, e), 1e-3);
}

TEST_P(Elementwise, SmearBackward) {
  for (const SmearCase& k : kSmear) {
    const Shape shape = {k.batch, k.t_len, k.c};
    const Tolerance sums = {
        .relative = 4e-6, .of_scale = 4e-6, .least_scale = std::sqrt(static_cast<double>(k.c))};
    check_kernel(fmt::format("({}, {}, {})", k.batch, k.t_len, k.c),
                 {in(random(shape)), in(random(shape)), in(master({1, k.channels})), in(master({1})),
                  in(uniform_tensor(rng, {k.batch, k.t_len}, DType::f32, 0.05, 0.95)),
                  out(shape, dtype(), {.roundings = 2}), update(master({1, k.channels}), sums),
                  update(master({1}), sums)},
                 [](Backend& b, const Tensors& t) {
                   b.smear_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]);
                 },
                 {.repeats = k.t_len == 70 ? 20 : 0});
  }
}

struct GateCase {
  int64_t tokens, vocab, heads, d, c, channels, q_width;
};
const GateCase kGates[] = {{1, 1, 1, 2, 12, 12, 2},       {5, 2, 2, 6, 13, 12, 12},
                           {17, 250, 4, 8, 33, 1, 64},    {33, 3, 1, 80, 17, 12, 80},
                           {70, 250, 2, 32, 129, 12, 64}, {19, 7, 8, 2, 12, 7, 17},
                           {70, 5, 5, 128, 640, 12, 640}};

TEST_P(Elementwise, ValueGate) {
  for (const GateCase& k : kGates) {
    const int64_t kv = k.heads * k.d;
    check_kernel(fmt::format("{} tokens, {} heads of {}", k.tokens, k.heads, k.d),
                 {in(master({k.vocab, kv})), in(random_ids(rng, {k.tokens}, k.vocab)),
                  in(random({k.tokens, k.c})), in(master({k.heads, k.channels})),
                  update(random({k.tokens, k.q_width + 2 * kv})), out({k.tokens, k.heads}, DType::f32)},
                 [](Backend& b, const Tensors& t) { b.value_gate(t[0], t[1], t[2], t[3], t[4], t[5]); });
  }
}

TEST_P(Elementwise, ValueGateBackward) {
  for (const GateCase& k : kGates) {
    const int64_t kv = k.heads * k.d;
    // One rounding of dh a head; products of D and of N terms.
    const Tolerance dh = {
        .roundings = static_cast<int>(k.heads), .relative = 4e-6, .of_scale = 4e-6, .least_scale = 4};
    const Tolerance sums = {
        .relative = 4e-6, .of_scale = 4e-6, .least_scale = std::sqrt(static_cast<double>(k.tokens * k.d))};
    check_kernel(fmt::format("{} tokens, {} heads of {}", k.tokens, k.heads, k.d),
                 {in(random({k.tokens, k.q_width + 2 * kv})), in(master({k.vocab, kv})),
                  in(random_ids(rng, {k.tokens}, k.vocab)), in(random({k.tokens, k.c})),
                  in(master({k.heads, k.channels})),
                  in(uniform_tensor(rng, {k.tokens, k.heads}, DType::f32, 0.1, 2.9)),
                  update(master({k.vocab, kv}), sums), update(master({k.heads, k.channels}), sums),
                  update(random({k.tokens, k.c}), dh)},
                 [](Backend& b, const Tensors& t) {
                   b.value_gate_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]);
                 },
                 {.repeats = k.tokens == 70 ? 20 : 0});
  }
}

}  // namespace
}  // namespace flexchat
