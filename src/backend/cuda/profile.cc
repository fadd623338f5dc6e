// The profile of everything a backend runs (backend/profile.h).
#include <algorithm>
#include <array>
#include <chrono>
#include <functional>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cupti.h"
#include "backend/profile.h"

namespace flexchat::cuda {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds of the fastest of a few runs, after two to warm up.
double fastest(Context& context, const std::function<void()>& work) {
  constexpr int kWarmUp = 2, kRuns = 8;
  std::array<cudaEvent_t, kRuns + 1> events{};
  for (cudaEvent_t& event : events) check_cuda(cudaEventCreate(&event), "making an event");
  for (int i = 0; i < kWarmUp; ++i) work();
  double best = 0;
  for (size_t i = 0; i < events.size(); ++i) {
    if (i > 0) work();
    check_cuda(cudaEventRecord(events[i], context.stream()), "recording an event");
  }
  context.synchronize();
  for (size_t i = 1; i < events.size(); ++i) {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, events[i - 1], events[i]), "reading a time");
    best = i == 1 ? static_cast<double>(ms) : std::min(best, static_cast<double>(ms));
  }
  for (const cudaEvent_t event : events) cudaEventDestroy(event);
  return best * 1e-3;
}

}  // namespace

void CudaBackend::start_profile() {
  profile_ = std::make_unique<DeviceProfile>();
  DeviceProfile& found = *profile_;
  found.device = context_.device().name;
  {
    constexpr int64_t kBytes = int64_t{512} << 20, kSide = 8192;  // far beyond any L2
    const Tensor from = empty({kBytes}, DType::u8), to = empty({kBytes}, DType::u8);
    found.copy_rate = 2.0 * static_cast<double>(kBytes) / fastest(context_, [&] {
                        check_cuda(cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(kBytes),
                                                   cudaMemcpyDeviceToDevice, context_.stream()),
                                   "copying within the device");
                      });
    const Tensor a = empty({kSide, kSide}, DType::bf16), b = empty({kSide, kSide}, DType::bf16);
    const Tensor out = empty({kSide, kSide}, DType::bf16);
    draw({Distribution::normal, 0, 1}, 1, 1, a);
    draw({Distribution::normal, 0, 1}, 1, 2, b);
    const double flops = 2.0 * kSide * kSide * kSide;
    found.product_rate = flops / fastest(context_, [&] { matmul(a, Trans::no, b, Trans::yes, 0, out); });
  }
  arena().reset_peak();
  std::string why;
  std::unique_ptr<LaunchTimer> timer = make_cupti_timer(&why);
  found.timer = timer ? "CUPTI" : "CUDA events (no CUPTI: " + why + ")";
  context_.start_log(timer ? std::move(timer) : make_event_timer());
  profile_start_ = Clock::now();
}

void CudaBackend::stop_profile() {
  if (!profile_) return;
  const std::unique_ptr<DeviceProfile> profile = std::move(profile_);
  profile->kernels = totals(context_.stop_log());
  profile->seconds = std::chrono::duration<double>(Clock::now() - profile_start_).count();
  add_profile(std::move(*profile));
}

}  // namespace flexchat::cuda
