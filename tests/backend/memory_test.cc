// Copies, fills and conversions between dtypes, and how backends are named.
#include <gtest/gtest.h>

#include "support/temp_folder.h"
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

constexpr DType kFloats[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

TEST(Memory, CopyConvertsAsScalarsDo) {
  const auto cpu = make_cpu_backend(), reference = make_reference_backend();
  for (const int64_t n : {1, 3, 17, 127, 4099, 70000}) {
    for (const DType from : kFloats) {
      Rng rng(static_cast<uint64_t>(n));
      const Tensor source = random_tensor(rng, {n}, from, 10);
      if (n > 17) {  // ends of the ranges, ties, subnormals of f16 and bf16, overflow
        int64_t i = 0;
        for (const double x : {65504.0, 65519.0, 65520.0, 1e30, 6e-8, 2.9e-8, 0x1p-25, 3e-39, 1 + 0x1p-8,
                               1 + 0x3p-8, 1 + 0x1p-11, 0.0}) {
          source.set(i++, x);
          source.set(i++, -x);
        }
      }
      for (const DType to : kFloats) {
        const Tensor expected = converted(source, to);
        for (Backend* backend : {cpu.get(), reference.get()}) {
          const Fenced got(filled_tensor({n}, to, std::nan("")));
          backend->copy(source, got.tensor());
          EXPECT_EQ(max_difference(got.tensor(), got.tensor()) > 0, max_difference(expected, expected) > 0);
          for (int64_t i = 0; i < n; ++i) {
            ASSERT_EQ(got.tensor().get(i), expected.get(i))
                << backend->name() << " " << dtype_name(from) << " to " << dtype_name(to) << ", " << i
                << " of " << n << ": " << source.get(i);
          }
          EXPECT_TRUE(got.intact());
        }
      }
    }
  }
}

TEST(Memory, CopyIsTheSameForEveryInstructionSet) {
  const auto cpu = make_cpu_backend();
  Rng rng(5);
  const Tensor source = random_tensor(rng, {133}, DType::f32, 3);
  source.set(0, 65519.0);
  source.set(1, 6e-8);
  source.set(132, std::nan(""));
  for (const int64_t targets : SimdTargets::all()) {
    const SimdTargets scope(targets);
    for (const DType to : {DType::bf16, DType::f16}) {
      const Tensor expected = converted(source, to), got(host_arena(), {133}, to),
                   back(host_arena(), {133}, DType::f32);
      cpu->copy(source, got);
      cpu->copy(got, back);
      for (int64_t i = 0; i < 132; ++i) {
        EXPECT_EQ(got.get(i), expected.get(i)) << dtype_name(to) << " of " << source.get(i);
        EXPECT_EQ(back.get(i), expected.get(i)) << dtype_name(to) << " of " << source.get(i);
      }
      EXPECT_TRUE(std::isnan(got.get(132)) && std::isnan(back.get(132))) << dtype_name(to);
    }
  }
}

TEST(Memory, FillWritesAllOfItAndNoMore) {
  for (const auto& backend : {make_cpu_backend(), make_reference_backend()}) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16, DType::i32}) {
      for (const double value : {0.0, 2.5, -1.0}) {
        const Fenced got(filled_tensor({3, 7}, dtype, 9));
        backend->fill(got.tensor(), value);
        const Tensor expected = filled_tensor({3, 7}, dtype, value);
        EXPECT_TRUE(same_bits(got.tensor(), expected)) << backend->name() << " " << dtype_name(dtype);
        EXPECT_TRUE(got.intact());
      }
    }
    const Tensor zeros = backend->zeros({2, 3}, DType::f32);
    EXPECT_EQ(max_abs(zeros), 0);
    const Tensor clone = backend->clone(zeros);
    EXPECT_TRUE(same_bits(clone, zeros));
    EXPECT_NE(clone.data(), zeros.data());
  }
}

class CopyRows : public KernelTest {};
FLEXCHAT_FOR_EVERY_DTYPE(CopyRows);

TEST_P(CopyRows, BetweenBuffersOfOtherStrides) {
  for (const int64_t width : {1, 7, 16, 33}) {
    for (const int64_t batch : {1, 3}) {
      for (const int64_t tokens : {1, 5}) {
        check_kernel(fmt::format("{} rows of {}", tokens, width),
                     {in(random_tensor(rng, {batch, tokens + 2, width + 3}, dtype())),
                      update(random_tensor(rng, {batch, tokens + 1, width + 9}, dtype()), {1, 0, 0})},
                     [=](Backend& b, const Tensors& t) {
                       b.copy_rows(batch, tokens, width, heads_view(t[0], 2), heads_view(t[1], 9));
                     });
      }
    }
  }
}

TEST(Backends, ByName) {
  EXPECT_EQ(make_backend("cpu")->name(), "cpu");
  EXPECT_EQ(make_backend("cpu")->master_dtype(), DType::f32);
  EXPECT_EQ(make_backend("reference")->name(), "reference");
  EXPECT_EQ(make_backend("reference")->master_dtype(), DType::f64);
  EXPECT_EQ(
      message_of<Error>([] { make_backend("cpus"); }),
      "unknown device 'cpus' (did you mean 'cpu'?); allowed: cpu, reference, cuda, cuda:N with N from 0");
}

TEST(Backends, CpuNamesTheDtypesItComputesIn) {
  const auto cpu = make_cpu_backend();
  const Tensor x = filled_tensor({2, 3}, DType::f64, 1), rstd = filled_tensor({2}, DType::f32, 1);
  EXPECT_EQ(message_of<Error>([&] { cpu->rms_norm(x, x, rstd); }),
            "the cpu backend has no kernel for f64 (it computes in f32, bf16, f16)");
}

}  // namespace
}  // namespace flexchat
