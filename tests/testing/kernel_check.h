// One kernel on the CPU backend against the double-precision reference, for every number of threads and SIMD
// instruction set worth telling apart; and, where there is a device, on the CUDA backend, with operands that
// vector accesses fit and with ones they do not. Outputs start as NaN and every operand stands between
// fences, so an element left out, read too early or written beside its tensor shows.
#pragma once

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda_loader.h"
#include "testing/tensors.h"

namespace flexchat {

using Tensors = std::vector<Tensor>;
using Kernel = std::function<void(Backend&, const Tensors&)>;

// An element may be off by
//   |expected| * (u + relative) + scale * (of_scale + (roundings - 1) * u),
// u the unit roundoff of the output's dtype, scale the largest |expected| of the tensor (at least
// least_scale). The reference starts from the very operands the CPU gets, so a result rounded once to its
// dtype accounts for one u; an in-place result that is rounded again on the way adds one each. `relative` and
// `of_scale` pay for f32 arithmetic inside the kernel (unit roundoff 6e-8): a sum of n products is off by
// some sqrt(n) * 6e-8 of the size of its terms, a few 1e-6 for the sizes used here.
struct Tolerance {
  int roundings = 1;
  double relative = 2e-6;
  double of_scale = 2e-6;
  double least_scale = 0;
};

inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return 0x1p-8;  // 8 significant bits
    case DType::f16:
      return 0x1p-11;  // 11 significant bits
    default:
      return 0x1p-24;
  }
}

struct Operand {
  enum Role {
    input,    // must not change
    output,   // overwritten: NaN before
    update,   // has a value before, compared after
    scratch,  // has a value before, anything after
  };
  Role role;
  Tensor value;  // output: its shape and dtype alone count
  Tolerance tolerance;
};
inline Operand in(Tensor value) { return {Operand::input, std::move(value), {}}; }
inline Operand out(Shape shape, DType dtype, Tolerance tolerance = {}) {
  return {Operand::output, filled_tensor(std::move(shape), dtype, std::numeric_limits<double>::quiet_NaN()),
          tolerance};
}
inline Operand update(Tensor value, Tolerance tolerance = {}) {
  return {Operand::update, std::move(value), tolerance};
}
inline Operand scratch(Tensor value) { return {Operand::scratch, std::move(value), {}}; }

// Checks every element; infinities must be equal.
inline void expect_near(const Tensor& actual, const Tensor& expected, const Tolerance& tolerance,
                        const std::string& where) {
  ASSERT_EQ(actual.numel(), expected.numel()) << where;
  const double u = unit_roundoff(actual.dtype());
  double scale = tolerance.least_scale;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    if (std::isfinite(expected.get(i))) scale = std::max(scale, std::abs(expected.get(i)));
  }
  double absolute = scale * (tolerance.of_scale + (tolerance.roundings - 1) * u);
  if (actual.dtype() == DType::f16) absolute += 0x1p-24;  // the step of subnormals
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double a = actual.get(i), e = expected.get(i);
    if (a == e) continue;
    const double allowed = std::abs(e) * (u + tolerance.relative) + absolute;
    ASSERT_TRUE(std::abs(a - e) <= allowed && std::isfinite(e))
        << where << ": element " << i << " of " << shape_string(expected.shape()) << " "
        << dtype_name(actual.dtype()) << " is " << a << ", expected " << e << " +- " << allowed;
  }
}

// Elements before and behind a tensor. No vector load is aligned behind an odd number of them.
constexpr int64_t kOddFence = 37, kAlignedFence = 64;

// A copy of a tensor between two fences.
class Fenced {
 public:
  explicit Fenced(const Tensor& x, int64_t fence = kOddFence)
      : whole_(filled_tensor({x.numel() + 2 * fence}, x.dtype(), kMark)), fence_(fence) {
    tensor_ = whole_.rows(fence, x.numel()).reshape(x.shape());
    std::memcpy(tensor_.data(), x.data(), static_cast<size_t>(x.bytes()));
  }
  const Tensor& tensor() const { return tensor_; }
  const Tensor& whole() const { return whole_; }  // with its fences
  bool intact() const {
    for (int64_t i = 0; i < fence_; ++i) {
      if (whole_.get(i) != kMark || whole_.get(whole_.numel() - 1 - i) != kMark) return false;
    }
    return true;
  }

 private:
  static constexpr double kMark = -7;
  Tensor whole_, tensor_;
  int64_t fence_;
};

// The same in the memory of a device.
class FencedOnDevice {
 public:
  FencedOnDevice(Backend& device, const Tensor& x, int64_t fence)
      : device_(&device), host_(x, fence), whole_(device.to_device(host_.whole())) {
    tensor_ = whole_.rows(fence, x.numel()).reshape(x.shape());
  }
  const Tensor& tensor() const { return tensor_; }
  // As the device has it now.
  const Fenced& fetch() {
    device_->copy(whole_, host_.whole());
    return host_;
  }

 private:
  Backend* device_;
  Fenced host_;
  Tensor whole_, tensor_;
};

// The one CUDA backend of the process; null where there is no device. Never freed, for the driver may be gone
// when static objects are.
inline Backend* cuda_backend() {
  static Backend* const instance = cuda_available() ? make_cuda_backend().release() : nullptr;
  return instance;
}

// The backends that compute in f32, bf16 and f16: the CPU's, and CUDA's where there is a device. For tests
// that call a kernel themselves, on operands moved by to_device and results moved back by to_host.
inline std::vector<Backend*> tested_backends() {
  static const std::unique_ptr<Backend> cpu = make_cpu_backend();
  std::vector<Backend*> all = {cpu.get()};
  if (cuda_backend()) all.push_back(cuda_backend());
  return all;
}

// Restricts Highway's kernels to a set of instruction sets for as long as it lives.
class SimdTargets {
 public:
  explicit SimdTargets(int64_t targets) { hwy::GetChosenTarget().Update(targets); }
  ~SimdTargets() { hwy::GetChosenTarget().Update(hwy::SupportedTargets()); }
  SimdTargets(const SimdTargets&) = delete;
  SimdTargets& operator=(const SimdTargets&) = delete;

  // All that this machine has; on x86 also those up to AVX2, and those below it.
  static std::vector<int64_t> all() {
    const int64_t supported = hwy::SupportedTargets();
    std::vector<int64_t> sets = {supported};
#if HWY_ARCH_X86
    for (const int64_t left_out : {HWY_AVX2 - 1, 2 * HWY_AVX2 - 1}) {  // a lower bit is a better target
      if ((supported & ~left_out) != sets.back()) sets.push_back(supported & ~left_out);
    }
#endif
    return sets;
  }
};

struct KernelCheck {
  // Element-wise kernels and their sums must not depend on the number of threads by a single bit. oneDNN's
  // products may, so there only the tolerance holds.
  bool same_bits_for_any_threads = true;
  int repeats = 0;      // extra runs on two threads that must give the same bits again
  bool on_cuda = true;  // false: a case that only backends in host memory serve
};

class KernelRun {
 public:
  KernelRun(std::vector<Operand> operands, Kernel kernel, KernelCheck check)
      : operands_(std::move(operands)), kernel_(std::move(kernel)), check_(check) {}

  void run(const std::string& where) {
    const auto reference = make_reference_backend();
    for (const Operand& o : operands_) {
      expected_.push_back(o.value.dtype() == DType::i32 ? duplicate(o.value)
                                                        : converted(o.value, DType::f64));
    }
    kernel_(*reference, expected_);
    const std::vector<int64_t> targets = SimdTargets::all();
    for (size_t i = 1; i < targets.size(); ++i) {
      const SimdTargets scope(targets[i]);
      compare(on_cpu(1, where), where + fmt::format(", instruction sets {:#x}", targets[i]));
    }
    const Tensors one = on_cpu(1, where);
    compare(one, where);
    run_threads(one, where);
    if (cuda_backend() && check_.on_cuda) run_cuda(*cuda_backend(), where);
  }

 private:
  void run_threads(const Tensors& one, const std::string& where) {
    for (const int threads : {2, 3}) {
      const std::string with = where + fmt::format(", {} threads", threads);
      const Tensors many = on_cpu(threads, with);
      if (!check_.same_bits_for_any_threads) compare(many, with);
      if (check_.same_bits_for_any_threads) expect_same(many, one, with);
      if (threads != 2) continue;
      for (int i = 0; i < check_.repeats; ++i) expect_same(on_cpu(2, with), many, with + ", repeated");
    }
  }
  void run_cuda(Backend& cuda, const std::string& where) {
    for (const int64_t fence : {kAlignedFence, kOddFence}) {
      const std::string with = where + (fence == kOddFence ? ", CUDA, not aligned" : ", CUDA, aligned");
      const Tensors first = on_device(cuda, fence, with);
      compare(first, with);
      expect_same(on_device(cuda, fence, with), first, with + ", repeated");
    }
  }
  Tensors on_cpu(int threads, const std::string& where) {
    const Threads scope(threads);
    std::vector<Fenced> fenced;
    Tensors tensors;
    for (const Operand& o : operands_) tensors.push_back(fenced.emplace_back(o.value).tensor());
    kernel_(*cpu_, tensors);
    for (size_t i = 0; i < operands_.size(); ++i) expect_unharmed(i, fenced[i], where);
    return tensors;
  }
  // The operands after one run, in host memory.
  Tensors on_device(Backend& device, int64_t fence, const std::string& where) {
    std::vector<FencedOnDevice> fenced;
    Tensors tensors, results;
    for (const Operand& o : operands_) {
      tensors.push_back(fenced.emplace_back(device, o.value, fence).tensor());
    }
    kernel_(device, tensors);
    for (size_t i = 0; i < operands_.size(); ++i) {
      const Fenced& after = fenced[i].fetch();
      expect_unharmed(i, after, where);
      results.push_back(after.tensor());
    }
    return results;
  }
  void expect_unharmed(size_t i, const Fenced& after, const std::string& where) const {
    EXPECT_TRUE(after.intact()) << where << ": wrote beside operand " << i;
    if (operands_[i].role != Operand::input) return;
    EXPECT_TRUE(same_bits(after.tensor(), operands_[i].value)) << where << ": changed operand " << i;
  }
  bool compared(size_t i) const {
    return operands_[i].role == Operand::output || operands_[i].role == Operand::update;
  }
  void compare(const Tensors& actual, const std::string& where) const {
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (!compared(i)) continue;
      expect_near(actual[i], expected_[i], operands_[i].tolerance, where + fmt::format(", operand {}", i));
    }
  }
  void expect_same(const Tensors& actual, const Tensors& before, const std::string& where) const {
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (!compared(i)) continue;
      EXPECT_TRUE(same_bits(actual[i], before[i])) << where << ": other bits in operand " << i;
    }
  }

  std::vector<Operand> operands_;
  Kernel kernel_;
  KernelCheck check_;
  Tensors expected_;
  std::unique_ptr<Backend> cpu_ = make_cpu_backend();
};

// kernel(backend, tensors) gets the operands' tensors in their order.
inline void check_kernel(const std::string& where, std::vector<Operand> operands, Kernel kernel,
                         KernelCheck check = {}) {
  KernelRun(std::move(operands), std::move(kernel), check).run(where);
}

// Tests of kernels that compute in any of the CPU's dtypes.
class KernelTest : public testing::TestWithParam<DType> {
 protected:
  DType dtype() const { return GetParam(); }
  Rng rng{2024};
};
inline std::string dtype_test_name(const testing::TestParamInfo<DType>& info) {
  return std::string(dtype_name(info.param));
}
#define FLEXCHAT_FOR_EVERY_DTYPE(suite)                                                         \
  INSTANTIATE_TEST_SUITE_P(DTypes, suite, testing::Values(DType::f32, DType::bf16, DType::f16), \
                           dtype_test_name)

// Sizes around the ends of vectors and unrolled loops.
inline const std::vector<int64_t> kAwkward = {1, 3, 7, 17, 33, 63, 65, 127, 129};
// Widths of rows that 16-byte accesses fit, for every way in which GPU kernels keep a row in registers.
inline const std::vector<int64_t> kWide = {8, 64, 264, 1280, 2048, 2056, 8200};

}  // namespace flexchat
