// Ops: chunks of the loss, logits for inference, and what misuse is told.
#include "ops/ops.h"

#include <gtest/gtest.h>

#include "support/temp_folder.h"
#include "testing/gradient_check.h"

namespace flexchat {
namespace {

struct Loss {
  Tensor nll, dh, dhead;
};

Loss loss_of(Backend& backend, DType dtype, const Tensor& h, const Tensor& head, const Tensor& targets,
             int64_t vocab) {
  const Tensor value = converted(head, backend.master_dtype());
  const Weight weight{value, backend.zeros(head.shape(), backend.master_dtype()), converted(head, dtype)};
  Tape tape(backend, true);
  const Var x = Tape::leaf(converted(h, dtype));
  const Tensor nll = linear_cross_entropy(tape, x, weight, targets, vocab, 15, 0.5);
  tape.backward();
  return {nll, x->grad, weight.grad};
}

// 300 rows of so large a vocabulary are cut in three; the cuts must not show.
TEST(LinearCrossEntropy, ChunksGiveWhatTheWholeGives) {
  const int64_t n = 300, c = 3, vocab = 8200, padded = 8256;
  Rng rng(1);
  const Tensor h = converted(random_tensor(rng, {n, c}, DType::bf16), DType::f64),
               head = converted(random_tensor(rng, {padded, c}, DType::bf16), DType::f64),
               targets = random_ids(rng, {n}, vocab);
  for (int64_t i = 5; i < n; i += 7) targets.set(i, -1);
  targets.set(127, -1);  // beside a cut
  targets.set(256, vocab - 1);

  const auto reference = make_reference_backend(), cpu = make_cpu_backend();
  const Tensor logits = reference->empty({n, vocab}, DType::f64), nll = reference->empty({n}, DType::f64),
               dh = reference->empty({n, c}, DType::f64), dhead = reference->zeros({padded, c}, DType::f64);
  reference->matmul(h, Trans::no, head.rows(0, vocab), Trans::yes, 0, logits);
  reference->cross_entropy(logits, targets, 15, 0.5, nll, &logits);
  reference->matmul(logits, Trans::no, head.rows(0, vocab), Trans::no, 0, dh);
  reference->matmul(logits, Trans::yes, h, Trans::no, 1, dhead.rows(0, vocab));

  const Loss exact = loss_of(*reference, DType::f64, h, head, targets, vocab);
  EXPECT_LT(max_difference(exact.nll, nll), 1e-12);
  EXPECT_LT(max_difference(exact.dh, dh), 1e-12);
  EXPECT_LT(max_difference(exact.dhead, dhead), 1e-12);
  EXPECT_EQ(max_abs(exact.dhead.rows(vocab, padded - vocab)), 0) << "padded rows have no gradient";

  const Loss f32 = loss_of(*cpu, DType::f32, h, head, targets, vocab);
  EXPECT_LT(max_difference(f32.nll, nll), 1e-5);
  EXPECT_LT(max_difference(f32.dh, dh), 2e-6 * max_abs(dh));
  EXPECT_LT(max_difference(f32.dhead, dhead), 2e-6 * max_abs(dhead));
  // Logits and sums are f32, but the gradient of each logit is rounded to bf16.
  const Loss bf16 = loss_of(*cpu, DType::bf16, h, head, targets, vocab);
  EXPECT_LT(max_difference(bf16.nll, nll), 1e-5);
  EXPECT_LT(max_difference(bf16.dh, dh), 0x1p-7 * max_abs(dh));
  EXPECT_LT(max_difference(bf16.dhead, dhead), 0x1p-7 * max_abs(dhead));
  EXPECT_EQ(bf16.nll.get(127), 0);
}

TEST(LinearCrossEntropy, WithoutRecordingTheLossIsTheSame) {
  Rng rng(2);
  const auto cpu = make_cpu_backend();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor h = random_tensor(rng, {33, 7}, DType::f32), head = random_tensor(rng, {64, 7}, DType::f32),
                 targets = random_ids(rng, {33}, 63);
    const Loss recorded = loss_of(*cpu, dtype, h, head, targets, 63);
    Tape tape(*cpu, false);
    const Weight weight{head, {}, converted(head, dtype)};
    const Tensor nll =
        linear_cross_entropy(tape, Tape::leaf(converted(h, dtype)), weight, targets, 63, 15, 1);
    EXPECT_TRUE(same_bits(nll, recorded.nll));
  }
}

TEST(HeadLogits, AreWhatTheLossSees) {
  Rng rng(3);
  const auto reference = make_reference_backend();
  const Weight head = random_weight(rng, {64, 7});
  const Tensor h = random_tensor(rng, {9, 7}, DType::f64), targets = random_ids(rng, {9}, 50);
  Tape tape(*reference, false);
  const Tensor logits = head_logits(tape, Tape::leaf(h), head, 50, 4);
  ASSERT_EQ(logits.shape(), (Shape{9, 50}));
  EXPECT_LE(max_abs(logits), 4);
  const Tensor nll = linear_cross_entropy(tape, Tape::leaf(h), head, targets, 50, 4, 1);
  for (int64_t n = 0; n < 9; ++n) {
    double sum = 0;
    for (int64_t j = 0; j < 50; ++j) sum += std::exp(logits.get(n * 50 + j));
    EXPECT_NEAR(nll.get(n), std::log(sum) - logits.get(n * 50 + static_cast<int64_t>(targets.get(n))), 1e-12);
  }
}

class Misuse : public testing::Test {
 protected:
  Var var(Shape shape) { return Tape::leaf(filled_tensor(std::move(shape), DType::f64, 0.5)); }
  Weight weight(const Shape& shape) { return random_weight(rng, shape); }
  Rng rng{5};
  std::unique_ptr<Backend> backend = make_reference_backend();
  Tape tape{*backend, true}, inference{*backend, false};
};

TEST_F(Misuse, ProductsThatDoNotFit) {
  const Weight w = weight({4, 5});
  const std::string expected = "linear: input (2, 3) does not fit weight (4, 5) (out, in)";
  EXPECT_EQ(message_of<Error>([&] { linear(tape, var({2, 3}), w); }), expected);
  EXPECT_EQ(message_of<Error>([&] { linear_add(tape, var({2, 4}), var({2, 3}), w); }), expected);
  EXPECT_EQ(message_of<Error>([&] { mlp_add(tape, var({2, 3}), var({2, 3}), w, weight({3, 4})); }), expected);
  EXPECT_EQ(message_of<Error>([&] {
              mlp_add(tape, var({2, 5}), var({2, 5}), w, weight({5, 3}));
            }),
            "mlp: proj (5, 3) does not fit fc (4, 5)");
  EXPECT_EQ(message_of<Error>([&] {
              linear_add(tape, var({2, 3}), var({2, 5}), w);
            }),
            "linear: (2, 4) cannot be added to (2, 3)");
  EXPECT_EQ(message_of<Error>([&] {
              mlp_add(tape, var({3, 5}), var({2, 5}), w, weight({5, 4}));
            }),
            "linear: (2, 5) cannot be added to (3, 5)");
}

TEST_F(Misuse, SecondReaders) {
  const Weight head = weight({4, 5});
  const Var h = var({2, 5});
  linear_cross_entropy(tape, h, head, filled_tensor({2}, DType::i32, 1), 4, 0, 1);
  h->grad = filled_tensor({2, 5}, DType::f64, 0);
  EXPECT_EQ(message_of<Error>([&] { tape.backward(); }),
            "linear_cross_entropy must be the only reader of its input");
  const Var e = var({2, 5});
  const Weight gate = weight({1, 3}), lambda = weight({1});
  const Var smeared = smear(tape, e, 1, nullptr, gate, lambda);
  weighted_sum(tape, smeared);
  e->grad = filled_tensor({2, 5}, DType::f64, 0);
  EXPECT_EQ(message_of<Error>([&] { tape.backward(); }), "smear must be the only reader of its input");
}

TEST_F(Misuse, ShapesOfTheOthers) {
  const Weight gate = weight({2, 12}), one = weight({1});
  EXPECT_EQ(message_of<Error>([&] {
              mix(tape, {}, var({2, 3}), {}, var({3, 2}));
            }),
            "mix: (2, 3) and (3, 2) differ");
  EXPECT_EQ(message_of<Error>([&] {
              smear(tape, var({2, 8}), 1, nullptr, gate, one);
            }),
            "smear reads 12 channels of 8");
  EXPECT_EQ(
      message_of<Error>([&] {
        value_gate(tape, var({2, 12}), var({2, 8}), weight({3, 4}), gate, filled_tensor({2}, DType::i32, 0));
      }),
      "value_gate reads 12 channels of 8");
  const RopeTables tables{filled_tensor({5, 1}, DType::f64, 1), filled_tensor({5, 1}, DType::f64, 0)};
  EXPECT_EQ(message_of<Error>([&] {
              rope_norm(tape, var({6, 2}), tables, 2, 1, 3, 1);
            }),
            "position 5 is beyond the rotary table of 5 positions");
  rope_norm(inference, var({6, 2}), tables, 2, 1, 2, 1);  // the last position is 4
  EXPECT_EQ(message_of<Error>([&] {
              head_logits(tape, var({2, 12}), gate, 2, 15);
            }),
            "head_logits has no backward");
  EXPECT_EQ(message_of<Error>([&] {
              linear_cross_entropy(tape, var({2, 12}), gate, filled_tensor({3}, DType::i32, 0), 2, 15, 1);
            }),
            "linear_cross_entropy: 3 targets for 2 rows");
}

}  // namespace
}  // namespace flexchat
