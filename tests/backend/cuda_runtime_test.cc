// Memory, products and graphs on a GPU, against plain loops and the reference backend. Skipped where there is
// no GPU, but for what every backend has in common.
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>

#include "backend/cuda_loader.h"
#include "base/error.h"
#include "support/temp_folder.h"
#include "testing/kernel_check.h"

namespace flexchat {
namespace {

constexpr DType kStored[] = {DType::f64, DType::f32, DType::bf16, DType::f16,
                             DType::i64, DType::i32, DType::u8};
constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

class CudaRuntime : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (cuda_available()) cuda_ = make_cuda_backend().release();
  }
  static void TearDownTestSuite() {
    delete cuda_;
    cuda_ = nullptr;
  }
  void SetUp() override {
    std::string why;
    if (!cuda_available(&why)) GTEST_SKIP() << why;
  }
  static Backend& cuda() { return *cuda_; }
  Tensor device(const Tensor& host) {
    const Tensor t = cuda().empty(host.shape(), host.dtype());
    cuda().copy(host, t);
    return t;
  }
  Tensor host(const Tensor& x) { return cuda().to_host(x); }

  static Backend* cuda_;
  Rng rng{11};
};
Backend* CudaRuntime::cuda_ = nullptr;

// A copy of a tensor in an arena, `offset` elements after the start of its block, with marks around it.
class Placed {
 public:
  Placed(Backend& backend, Arena& arena, const Tensor& value, int64_t offset)
      : backend_(backend), offset_(offset), whole_(arena, {value.numel() + offset + kAfter}, value.dtype()) {
    backend.copy(filled_tensor(whole_.shape(), value.dtype(), kMark), whole_);
    tensor_ = whole_.rows(offset, value.numel()).reshape(value.shape());
    backend.copy(value, tensor_);
  }
  const Tensor& tensor() const { return tensor_; }
  Tensor value() const { return duplicate(backend_.to_host(tensor_)); }
  bool intact() const {
    const Tensor all = backend_.to_host(whole_);
    for (int64_t i = 0; i < all.numel(); ++i) {
      const bool mine = i >= offset_ && i < offset_ + tensor_.numel();
      if (!mine && all.get(i) != kMark) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kAfter = 21;
  static constexpr double kMark = 7;
  Backend& backend_;
  int64_t offset_;
  Tensor whole_, tensor_;
};

bool same_values(const Tensor& a, const Tensor& b, int64_t* where) {
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double x = a.get(i), y = b.get(i);
    if (x != y && !(std::isnan(x) && std::isnan(y))) return *where = i, false;
  }
  return true;
}

// Values of any dtype; for floats also ties, ends of ranges, subnormals, infinities and NaN.
Tensor stored_values(Rng& rng, int64_t n, DType dtype) {
  const Tensor t(host_arena(), {n}, dtype);
  for (int64_t i = 0; i < n; ++i) t.set(i, static_cast<double>(rng.below(100)));
  if (!is_float(dtype)) return t;
  for (int64_t i = 0; i < n; ++i) t.set(i, t.get(i) + rng.uniform());
  int64_t i = 0;
  for (const double x : {65504.0, 65519.0, 65520.0, 1e30, 6e-8, 2.9e-8, 0x1p-25, 3e-39, 1 + 0x1p-8,
                         1 + 0x3p-8, 1 + 0x1p-11, HUGE_VAL, std::nan("")}) {
    if (i + 1 < n) t.set(i++, x), t.set(i++, -x);
  }
  return t;
}

TEST_F(CudaRuntime, CopiesBetweenAllPlacesAndDtypes) {
  for (const int64_t n : {1, 7, 129, 4099}) {
    for (const DType from : kStored) {
      for (const DType to : kStored) {
        if (is_float(from) && !is_float(to) && n > 1) continue;  // NaN and 1e30 are no integers
        const Tensor source = stored_values(rng, n, from), expected = converted(source, to);
        for (const bool device_source : {false, true}) {
          for (const bool device_out : {false, true}) {
            for (const auto& [a, b] : {std::pair<int64_t, int64_t>{0, 0}, {16, 32}, {3, 1}, {1, 8}}) {
              const Placed x(cuda(), device_source ? cuda().arena() : host_arena(), source, a);
              const Placed y(cuda(), device_out ? cuda().arena() : host_arena(), filled_tensor({n}, to, 3),
                             b);
              cuda().copy(x.tensor(), y.tensor());
              int64_t where = 0;
              ASSERT_TRUE(same_values(y.value(), expected, &where))
                  << dtype_name(from) << " to " << dtype_name(to) << ", " << n << " elements, "
                  << device_source << " to " << device_out << " at " << a << ", " << b << ": element "
                  << where << " is " << y.value().get(where) << ", expected " << expected.get(where);
              EXPECT_TRUE(x.intact() && y.intact()) << "wrote beside the tensor";
            }
          }
        }
      }
    }
  }
}

// More than the ring of pinned slots holds, with an end that fills none, and conversion in several pieces.
TEST_F(CudaRuntime, LargeTransfersArriveWhole) {
  const int64_t n = (int64_t{70} << 18) + 12345;  // 70 MiB of f32
  const Tensor source(host_arena(), {n}, DType::f32);
  for (int64_t i = 0; i < n; ++i) source.as<float>()[i] = static_cast<float>(i % 65521 - 30000);
  const Tensor there = device(source), back = host(there);
  EXPECT_TRUE(same_bits(back, source));
  const Tensor half = cuda().empty({n}, DType::bf16), wide(host_arena(), {n}, DType::f32);
  cuda().copy(source, half);
  cuda().copy(half, wide);
  for (int64_t i = 0; i < n; i += 997) {
    ASSERT_EQ(wide.get(i), static_cast<double>(to_float(to_bf16(source.as<float>()[i])))) << i;
  }
}

// The caller may change its memory as soon as the copy returns, however far the device is behind.
TEST_F(CudaRuntime, AnUploadHasReadItsSource) {
  std::vector<Tensor> copies;
  const Tensor source(host_arena(), {1000}, DType::i32);
  for (int i = 0; i < 100; ++i) {
    cuda().fill(source, i);
    copies.push_back(device(source));
  }
  for (int i = 0; i < 100; ++i) {
    const Tensor got = host(copies[static_cast<size_t>(i)]);
    EXPECT_EQ(got.get(0), i);
    EXPECT_EQ(got.get(999), i);
  }
}

TEST_F(CudaRuntime, FillsAllOfItAndNoMore) {
  for (const DType dtype : kStored) {
    for (const double value : {0.0, 2.0, 113.0}) {
      for (const int64_t n : {1, 5, 31, 64, 1001, 100003}) {
        for (const int64_t offset : {0, 1, 3, 8}) {
          const Tensor expected = filled_tensor({n}, dtype, value);
          const Placed got(cuda(), cuda().arena(), filled_tensor({n}, dtype, 9), offset);
          cuda().fill(got.tensor(), value);
          ASSERT_TRUE(same_bits(got.value(), expected))
              << dtype_name(dtype) << " " << value << ", " << n << " at " << offset;
          EXPECT_TRUE(got.intact()) << dtype_name(dtype) << " " << n << " at " << offset;
        }
      }
    }
  }
  cuda().fill(cuda().empty({0}, DType::f32), 1);
}

TEST_F(CudaRuntime, CopiesRows) {
  const auto reference = make_reference_backend();
  for (const DType dtype : {DType::f32, DType::bf16, DType::u8}) {
    for (const int64_t width : {1, 7, 16, 33, 128, 1000}) {
      for (const auto& [more_from, more_to, at_from, at_to] :
           {std::array<int64_t, 4>{3, 9, 2, 5}, {16, 32, 16, 0}, {8, 8, 4, 8}, {0, 0, 0, 0}}) {
        for (const int64_t offset : {0, 1, 4}) {
          const int64_t batch = 3, tokens = 5;
          const Tensor source = uniform_tensor(rng, {batch, tokens + 2, width + more_from}, dtype, 0, 100);
          const Tensor target = uniform_tensor(rng, {batch, tokens + 1, width + more_to}, dtype, 0, 100);
          const Placed x(cuda(), cuda().arena(), source, offset), y(cuda(), cuda().arena(), target, offset);
          const int64_t first = std::min(at_from, more_from), put = std::min(at_to, more_to);
          const auto from = [&](const Tensor& t) { return heads_view(t, first); };
          const auto to = [&](const Tensor& t) { return heads_view(t, put); };
          cuda().copy_rows(batch, tokens, width, from(x.tensor()), to(y.tensor()));
          reference->copy_rows(batch, tokens, width, from(source), to(target));
          ASSERT_TRUE(same_bits(y.value(), target)) << dtype_name(dtype) << ", width " << width;
          EXPECT_TRUE(y.intact());
        }
      }
    }
  }
}

TEST_F(CudaRuntime, FindsTheFirstNonfinite) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t n : {1, 33, 5000, 1000003}) {
      const Tensor x = filled_tensor({n}, dtype, 1.5);
      EXPECT_EQ(cuda().first_nonfinite(device(x)), -1) << dtype_name(dtype) << " " << n;
      for (const int64_t at : {n - 1, n / 2, int64_t{0}}) {
        x.set(at, at % 2 ? std::nan("") : -HUGE_VAL);
        EXPECT_EQ(cuda().first_nonfinite(device(x)), at) << dtype_name(dtype) << " " << n;
      }
    }
  }
  EXPECT_EQ(cuda().first_nonfinite(device(filled_tensor({9}, DType::i32, 1))), -1);
}

// ---- products
// -----------------------------------------------------------------------------------------------

class CudaProducts : public CudaRuntime {
 protected:
  struct Case {
    int64_t batch, m, n, k;  // batch 0: matmul
    Trans ta, tb;
    double beta;
    int64_t offset;  // of every operand from its block, in elements
  };
  void check(const Case& c, DType a_dtype, DType b_dtype, DType out_dtype, int calls = 1) {
    const auto shaped = [&](int64_t rows, int64_t columns, Trans t) {
      if (t == Trans::yes) std::swap(rows, columns);
      return c.batch > 0 ? Shape{c.batch, rows, columns} : Shape{rows, columns};
    };
    const Tensor a = random_tensor(rng, shaped(c.m, c.k, c.ta), a_dtype);
    const Tensor b = random_tensor(rng, shaped(c.k, c.n, c.tb), b_dtype);
    const Shape out_shape = shaped(c.m, c.n, Trans::no);
    const Tensor before = c.beta != 0 ? random_tensor(rng, out_shape, out_dtype)
                                      : filled_tensor(out_shape, out_dtype, std::nan(""));
    const auto product = [&](Backend& backend, const Tensor& x, const Tensor& y, const Tensor& z) {
      c.batch > 0 ? backend.matmul_batched(x, c.ta, y, c.tb, c.beta, z)
                  : backend.matmul(x, c.ta, y, c.tb, c.beta, z);
    };
    const Tensor expected = converted(before, DType::f64);
    product(*make_reference_backend(), converted(a, DType::f64), converted(b, DType::f64), expected);
    const auto where =
        fmt::format("{} of ({} x {}) by ({} x {}){}{} beta {} at {}, {} {} {}", c.batch, c.m, c.k, c.k, c.n,
                    c.ta == Trans::yes ? " a^T" : "", c.tb == Trans::yes ? " b^T" : "", c.beta, c.offset,
                    dtype_name(a_dtype), dtype_name(b_dtype), dtype_name(out_dtype));
    const Placed x(cuda(), cuda().arena(), a, c.offset), y(cuda(), cuda().arena(), b, c.offset);
    Tensor first;
    for (int call = 0; call < calls; ++call) {
      const Placed z(cuda(), cuda().arena(), before, c.offset);
      product(cuda(), x.tensor(), y.tensor(), z.tensor());
      const Tensor got = z.value();
      if (call == 0) {
        // Some of cuBLASLt's kernels round the product before they add beta * out to it, and then again.
        const int roundings = c.beta != 0 && dtype_size(out_dtype) == 2 ? 2 : 1;
        expect_near(got, expected, {roundings, 2e-6, 2e-6, std::sqrt(static_cast<double>(c.k))}, where);
        first = got;
      }
      EXPECT_TRUE(same_bits(got, first)) << where << ": other bits in call " << call;
      EXPECT_TRUE(z.intact()) << where << ": wrote beside the result";
    }
    EXPECT_TRUE(x.intact() && same_bits(x.value(), a) && same_bits(y.value(), b)) << where;
  }
};

TEST_F(CudaProducts, EveryTransposeDtypeAndOddSize) {
  struct Mix {
    DType a, b, out;
  };
  std::vector<Mix> mixes = {{DType::f64, DType::f64, DType::f64}};
  for (const DType a : kFloats) {
    for (const DType b : kFloats) {
      for (const DType out : kFloats) mixes.push_back({a, b, out});
    }
  }
  for (const auto& [a, b, out] : mixes) {
    for (const Trans ta : {Trans::no, Trans::yes}) {
      for (const Trans tb : {Trans::no, Trans::yes}) {
        for (const double beta : {0.0, 1.0, -0.5}) {
          for (const int64_t offset : {0, 1}) check({0, 33, 17, 7, ta, tb, beta, offset}, a, b, out);
          for (const int64_t offset : {0, 8}) check({0, 64, 40, 96, ta, tb, beta, offset}, a, b, out);
          check({0, 1, 1, 1, ta, tb, beta, 0}, a, b, out);
          check({0, 1, 130, 65, ta, tb, beta, 0}, a, b, out);
          check({0, 129, 1, 3, ta, tb, beta, 3}, a, b, out);
        }
      }
    }
  }
}

TEST_F(CudaProducts, Batched) {
  for (const DType dtype : kFloats) {
    for (const Trans ta : {Trans::no, Trans::yes}) {
      for (const Trans tb : {Trans::no, Trans::yes}) {
        for (const double beta : {0.0, 1.0}) {
          for (const int64_t offset : {0, 3}) {
            check({3, 17, 9, 5, ta, tb, beta, offset}, dtype, dtype, dtype);
            check({1, 32, 64, 48, ta, tb, beta, offset}, dtype, dtype, DType::f32);
            check({5, 64, 64, 32, ta, tb, beta, offset}, dtype, dtype, dtype);
          }
        }
      }
    }
  }
}

// Large enough to be tuned at the second call, which must not change a bit.
TEST_F(CudaProducts, TuningChangesNoBit) {
  check({0, 5, 1032, 4100, Trans::no, Trans::yes, 0, 0}, DType::bf16, DType::bf16, DType::bf16, 4);
  check({0, 5, 1032, 4100, Trans::no, Trans::yes, 1, 0}, DType::f16, DType::f16, DType::f32, 4);
  check({0, 9, 4104, 1032, Trans::no, Trans::no, 1, 0}, DType::bf16, DType::bf16, DType::f32, 4);
  check({0, 3, 520, 4100, Trans::no, Trans::yes, 0, 1}, DType::f32, DType::f32, DType::f32, 4);
}

TEST_F(CudaProducts, EmptyAndMisplacedOperands) {
  const Tensor none = cuda().empty({3, 0}, DType::f32), out = device(filled_tensor({3, 5}, DType::f32, 2));
  cuda().matmul(none, Trans::no, cuda().empty({0, 5}, DType::f32), Trans::no, 1, out);
  EXPECT_EQ(host(out).get(14), 2);
  cuda().matmul(none, Trans::no, cuda().empty({0, 5}, DType::f32), Trans::no, 0, out);
  EXPECT_EQ(host(out).get(14), 0);
  const Tensor there = cuda().empty({3, 3}, DType::f32);
  EXPECT_EQ(message_of<Error>([&] {
              cuda().matmul(filled_tensor({3, 3}, DType::f32, 1), Trans::no, there, Trans::no, 0, there);
            }),
            "matmul on cuda: a tensor of shape (3, 3) is in host memory");
}

// ---- the arena --------------------------------------------------------------------------------------------

class CudaArena : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string why;
    if (!cuda_available(&why)) GTEST_SKIP() << why;
    setenv("FLEXCHAT_ALLOC", GetParam(), 1);
    cuda = make_cuda_backend();
  }
  void TearDown() override { unsetenv("FLEXCHAT_ALLOC"); }
  std::string kind() const { return GetParam(); }
  std::unique_ptr<Backend> cuda;
};
INSTANTIATE_TEST_SUITE_P(Kinds, CudaArena, testing::Values("expandable", "malloc", "async"),
                         [](const auto& kind) { return std::string(kind.param); });

// Blocks never overlap: each keeps its own number while others come and go.
TEST_P(CudaArena, BlocksKeepTheirValues) {
  Rng rng(3);
  std::vector<std::pair<Tensor, int>> held;
  for (int i = 0; i < 300; ++i) {
    const auto n = static_cast<int64_t>(1 + rng.below(rng.below(5) == 0 ? 3000000 : 5000));
    held.emplace_back(cuda->empty({n}, DType::i32), i);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(held.back().first.data()) % 256, 0u);
    cuda->fill(held.back().first, i);
    if (held.size() < 20 && rng.below(3) > 0) continue;
    const size_t out = rng.below(held.size());
    const auto& [tensor, value] = held[out];
    const Tensor back = cuda->to_host(tensor);
    ASSERT_EQ(back.get(0), value);
    ASSERT_EQ(back.get(back.numel() - 1), value);
    held.erase(held.begin() + static_cast<long>(out));
  }
  const Arena::Stats stats = cuda->arena().stats();
  EXPECT_GT(stats.in_use, 0u);
  EXPECT_GE(stats.peak, stats.in_use);
  EXPECT_GE(stats.reserved, stats.in_use);
  EXPECT_GE(stats.fragmentation, 0);
  EXPECT_LE(stats.fragmentation, 1);
  held.clear();
  EXPECT_LT(cuda->arena().stats().in_use, size_t{65} << 20);  // what the backend holds for itself
  cuda->arena().reset_peak();
  EXPECT_EQ(cuda->arena().stats().peak, cuda->arena().stats().in_use);
}

TEST_P(CudaArena, ARepeatedStepRepeatsItsAddresses) {
  if (kind() == "async") GTEST_SKIP() << "the driver's pool promises no addresses";
  const auto step = [&] {
    Rng rng(4);
    std::vector<void*> addresses;
    std::vector<Tensor> kept;
    for (int i = 0; i < 200; ++i) {
      kept.push_back(cuda->empty({static_cast<int64_t>(1 + rng.below(1000000))}, DType::f32));
      addresses.push_back(kept.back().data());
      if (rng.below(2) == 0) kept.erase(kept.begin() + static_cast<long>(rng.below(kept.size())));
    }
    while (!kept.empty()) kept.pop_back();
    return addresses;
  };
  step();
  const auto second = step();
  const size_t reserved = cuda->arena().stats().reserved;
  EXPECT_EQ(step(), second);
  EXPECT_EQ(cuda->arena().stats().reserved, reserved);
}

TEST_P(CudaArena, OutOfMemorySaysWhatWasAskedAndHelps) {
  const Tensor kept = cuda->zeros({1000}, DType::f32);
  for (int i = 0; i < 2; ++i) {
    const std::string message = message_of<RunError>([&] { cuda->empty({int64_t{1} << 50}, DType::u8); });
    EXPECT_NE(message.find("asked 1024.0 TiB"), std::string::npos) << message;
    EXPECT_NE(message.find("--device-batch-size"), std::string::npos) << message;
  }
  cuda->fill(cuda->empty({1000000}, DType::f32), 1);
  EXPECT_EQ(cuda->to_host(kept).get(999), 0);
}

// A device filled with blocks of which every second is then released still has room for one that fits no
// hole: memory moves behind other addresses.
TEST_P(CudaArena, HolesDoNotStrandMemory) {
  if (kind() != "expandable") GTEST_SKIP() << "only mapped memory can move";
  constexpr int64_t kBlock = int64_t{4} << 30;
  std::vector<Tensor> blocks;
  try {
    for (;;) blocks.push_back(cuda->empty({kBlock}, DType::u8));
  } catch (const RunError&) {
  }
  if (blocks.size() < 4) GTEST_SKIP() << "the device has too little free memory for the test";
  cuda->fill(blocks[0].rows(kBlock - 5, 5), 3);
  for (size_t i = 1; i < blocks.size(); i += 2) blocks[i] = Tensor();
  const auto released = static_cast<int64_t>(blocks.size() / 2);
  const Tensor large = cuda->empty({released * kBlock}, DType::u8);
  cuda->fill(large.rows(0, 100), 1);
  cuda->fill(large.rows(large.numel() - 100, 100), 1);
  cuda->synchronize();
  EXPECT_EQ(cuda->to_host(blocks[0].rows(kBlock - 5, 5)).get(4), 3);
}

TEST(CudaArenaChoice, AnUnknownWordIsAnError) {
  std::string why;
  if (!cuda_available(&why)) GTEST_SKIP() << why;
  setenv("FLEXCHAT_ALLOC", "expandabel", 1);
  const std::string message = message_of<Error>([] { make_cuda_backend(); });
  unsetenv("FLEXCHAT_ALLOC");
  EXPECT_EQ(
      message,
      "FLEXCHAT_ALLOC is 'expandabel' (did you mean 'expandable'?); allowed: expandable, malloc, async");
}

// ---- graphs
// -------------------------------------------------------------------------------------------------

// total += 2 * product(x, y), with temporaries, a conversion and a fill on the way.
void accumulate(Backend& backend, const Tensor& x, const Tensor& y, const Tensor& total) {
  const Tensor product = backend.empty({x.dim(0), y.dim(1)}, DType::bf16);
  backend.matmul(x, Trans::no, y, Trans::no, 0, product);
  const Tensor wide = backend.zeros(product.shape(), DType::f32), again = backend.clone(wide);
  backend.copy(product, wide);
  backend.axpby(2, wide, 1, again);
  backend.axpby(1, again, 1, total);
}

TEST_F(CudaRuntime, AGraphRunsWhenItIsReplayed) {
  const Tensor x = device(random_tensor(rng, {40, 72}, DType::bf16));
  const Tensor y = device(random_tensor(rng, {72, 24}, DType::bf16));
  const Tensor total = cuda().zeros({40, 24}, DType::f32), expected = cuda().zeros({40, 24}, DType::f32);
  const auto graph = cuda().capture([&] { accumulate(cuda(), x, y, total); });
  EXPECT_EQ(max_abs(host(total)), 0) << "capture ran the step";
  for (int i = 0; i < 3; ++i) {
    graph->replay();
    accumulate(cuda(), x, y, expected);
    EXPECT_TRUE(same_bits(host(total), host(expected))) << "replay " << i;
  }
  cuda().copy(random_tensor(rng, {40, 72}, DType::bf16), x);  // other numbers in the same memory
  graph->replay();
  accumulate(cuda(), x, y, expected);
  EXPECT_TRUE(same_bits(host(total), host(expected)));
}

TEST_F(CudaRuntime, WhatAGraphCannotHoldIsAnError) {
  const Tensor x = device(filled_tensor({10}, DType::f32, 1)), y(host_arena(), {10}, DType::f32);
  const Tensor half(host_arena(), {10}, DType::bf16);
  const std::pair<const char*, std::function<void()>> cases[] = {
      {"a copy between host and device", [&] { cuda().copy(x, y); }},
      {"a copy between host and device", [&] { cuda().copy(y, x); }},
      {"a copy between host and device", [&] { cuda().copy(half, x); }},
      {"waiting for the device", [&] { cuda().synchronize(); }},
      {"capturing a step", [&] { cuda().capture([] {}); }},
      {"a copy between host and device", [&] { (void)cuda().first_nonfinite(x); }}};
  for (const auto& one : cases) {
    const auto bad = [&] {
      cuda().fill(x, 5);
      one.second();
    };
    EXPECT_EQ(message_of<RunError>([&] { cuda().capture(bad); }),
              fmt::format("{} inside a captured step: a CUDA graph holds kernels alone", one.first));
    EXPECT_EQ(host(x).get(9), 1) << "the failed capture ran";
  }
  const auto graph = cuda().capture([&] { cuda().fill(x, 6); });
  graph->replay();
  EXPECT_EQ(host(x).get(9), 6);
}

// What a graph allocated is not handed to others while it lives: not its temporaries, and not a tensor that
// outlived the capture and was dropped later.
TEST_P(CudaArena, AGraphKeepsItsMemory) {
  if (kind() == "async") GTEST_SKIP() << "cannot be captured";
  const auto others = [&](double value) {
    std::vector<Tensor> tensors;
    for (const int64_t n : {100, 5000, 400000, 400000, 5000, 100, 3000000}) {
      tensors.push_back(cuda->empty({n}, DType::f32));
      cuda->fill(tensors.back(), value);
    }
    return tensors;
  };
  cuda->capture([] {});  // the backend takes its workspace
  others(0);             // memory to be had again
  const Tensor out = cuda->zeros({400000}, DType::f32);
  cuda->synchronize();
  const size_t before = cuda->arena().stats().in_use;
  Tensor result;
  auto graph = cuda->capture([&] {
    const Tensor small = cuda->empty({100}, DType::f32);
    cuda->fill(small, 2);
    Tensor large = cuda->empty({400000}, DType::f32);
    cuda->fill(large, 3);
    cuda->copy(large, out);
    large = Tensor();
    result = cuda->empty({5000}, DType::f32);
    cuda->fill(result, 4);
  });
  EXPECT_GT(cuda->arena().stats().in_use, before);
  for (int round = 0; round < 3; ++round) {
    if (round == 1) result = Tensor();
    cuda->fill(out, 0);
    const std::vector<Tensor> tensors = others(5);
    graph->replay();
    EXPECT_EQ(cuda->to_host(out).get(399999), 3);
    for (const Tensor& t : tensors) {
      const Tensor host = cuda->to_host(t);
      for (int64_t i = 0; i < host.numel(); ++i) ASSERT_EQ(host.as<float>()[i], 5.0f) << "round " << round;
    }
  }
  graph.reset();
  EXPECT_EQ(cuda->arena().stats().in_use, before);
}

TEST(CudaGraphs, TheDriversPoolCannotBeCaptured) {
  std::string why;
  if (!cuda_available(&why)) GTEST_SKIP() << why;
  setenv("FLEXCHAT_ALLOC", "async", 1);
  const auto cuda = make_cuda_backend();
  unsetenv("FLEXCHAT_ALLOC");
  EXPECT_EQ(
      message_of<Error>([&] { cuda->capture([] {}); }),
      "a step cannot be captured in a CUDA graph with FLEXCHAT_ALLOC=async; allowed: expandable, malloc");
}

TEST(StepGraphs, BackendsOfTheHostCallTheStepAtEveryReplay) {
  for (const auto& backend : {make_cpu_backend(), make_reference_backend()}) {
    int calls = 0;
    const auto graph = backend->capture([&] { ++calls; });
    EXPECT_EQ(calls, 0);
    graph->replay();
    graph->replay();
    EXPECT_EQ(calls, 2);
    backend->synchronize();
  }
}

}  // namespace
}  // namespace flexchat
