// Products: every transpose, dtype mix, beta and the change from gemv to oneDNN.
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

struct Mix {
  DType a, b, out;
};
// The combinations the GPT and Muon use, and some that only the general path serves.
const Mix kMixes[] = {{DType::f32, DType::f32, DType::f32},   {DType::bf16, DType::bf16, DType::bf16},
                      {DType::bf16, DType::bf16, DType::f32}, {DType::f16, DType::f16, DType::f16},
                      {DType::f16, DType::f16, DType::f32},   {DType::bf16, DType::f32, DType::bf16},
                      {DType::f32, DType::bf16, DType::f32},  {DType::bf16, DType::bf16, DType::f16},
                      {DType::f32, DType::f32, DType::bf16}};

class Matmul : public testing::TestWithParam<Mix> {
 protected:
  void check(int64_t m, int64_t n, int64_t k, Trans ta, Trans tb, double beta) {
    const auto [a, b, c] = GetParam();
    const Shape shape_a = ta == Trans::no ? Shape{m, k} : Shape{k, m};
    const Shape shape_b = tb == Trans::no ? Shape{k, n} : Shape{n, k};
    // f32 products of the same value may be summed in any order: sqrt(k) terms of size 1, each 6e-8 off.
    const Tolerance tolerance = {1, 2e-6, 2e-6, std::sqrt(static_cast<double>(k))};
    check_kernel(fmt::format("({} x {}) by ({} x {}){}{} beta {}", m, k, k, n, ta == Trans::yes ? " a^T" : "",
                             tb == Trans::yes ? " b^T" : "", beta),
                 {in(random_tensor(rng, shape_a, a)), in(random_tensor(rng, shape_b, b)),
                  beta == 0 ? out({m, n}, c, tolerance) : update(random_tensor(rng, {m, n}, c), tolerance)},
                 [=](Backend& backend, const Tensors& t) { backend.matmul(t[0], ta, t[1], tb, beta, t[2]); },
                 {.same_bits_for_any_threads = false, .repeats = 1});
  }
  Rng rng{7};
};

TEST_P(Matmul, EveryTransposeAndBeta) {
  for (const Trans ta : {Trans::no, Trans::yes}) {
    for (const Trans tb : {Trans::no, Trans::yes}) {
      for (const double beta : {0.0, 1.0, -0.5}) {
        for (const int64_t m : {1, 4, 5, 33}) {
          check(m, 17, 7, ta, tb, beta);
          check(m, 3, 65, ta, tb, beta);
        }
        check(1, 1, 1, ta, tb, beta);
        check(7, 1, 3, ta, tb, beta);
        check(65, 63, 129, ta, tb, beta);
      }
    }
  }
}

// Few rows against a weight matrix: decoding. The product changes kernels between 4 and 5 rows.
TEST_P(Matmul, FewRows) {
  for (int64_t m = 1; m <= 6; ++m) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 7}, {3, 16}, {4, 129}, {127, 33}, {1030, 63}}) {
      for (const double beta : {0.0, 1.0}) check(m, n, k, Trans::no, Trans::yes, beta);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, Matmul, testing::ValuesIn(kMixes), [](const auto& mix) {
  return fmt::format("{}_{}_{}", dtype_name(mix.param.a), dtype_name(mix.param.b), dtype_name(mix.param.out));
});

TEST_P(Matmul, Batched) {
  const auto [a, b, c] = GetParam();
  const Tolerance tolerance = {1, 2e-6, 2e-6, 3};
  for (const Trans ta : {Trans::no, Trans::yes}) {
    for (const Trans tb : {Trans::no, Trans::yes}) {
      check_kernel(
          "batched",
          {in(random_tensor(rng, ta == Trans::no ? Shape{3, 5, 9} : Shape{3, 9, 5}, a)),
           in(random_tensor(rng, tb == Trans::no ? Shape{3, 9, 7} : Shape{3, 7, 9}, b)),
           update(random_tensor(rng, {3, 5, 7}, c), tolerance)},
          [=](Backend& backend, const Tensors& t) { backend.matmul_batched(t[0], ta, t[1], tb, -0.5, t[2]); },
          {.same_bits_for_any_threads = false});
    }
  }
}

// The transposed product of a matrix with itself reads one tensor twice (Muon's Gram matrix).
TEST(MatmulAliased, GramMatrix) {
  Rng rng(3);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    check_kernel("gram", {in(random_tensor(rng, {33, 65}, dtype)), out({33, 33}, dtype)},
                 [](Backend& b, const Tensors& t) { b.matmul(t[0], Trans::no, t[0], Trans::yes, 0, t[1]); },
                 {.same_bits_for_any_threads = false});
  }
}

}  // namespace
}  // namespace flexchat
