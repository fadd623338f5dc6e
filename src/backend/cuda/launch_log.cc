#include "backend/cuda/launch_log.h"

#include <algorithm>
#include <map>
#include <string_view>
#include <utility>

namespace flexchat::cuda {
namespace {

class EventTimer final : public LaunchTimer {
 public:
  EventTimer() = default;
  EventTimer(const EventTimer&) = delete;
  EventTimer& operator=(const EventTimer&) = delete;
  ~EventTimer() override {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  void begin(cudaStream_t stream) override { record(stream); }
  void end(cudaStream_t stream) override { record(stream); }
  std::vector<LaunchTime> times() override {
    std::vector<LaunchTime> all;
    for (size_t i = 0; i + 1 < events_.size(); i += 2) {
      float ms = 0;
      check_cuda(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]), "reading the time of a launch");
      all.push_back({static_cast<double>(ms) * 1e-3, ""});
    }
    return all;
  }

 private:
  void record(cudaStream_t stream) {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreate(&event), "making an event");
    events_.push_back(event);
    check_cuda(cudaEventRecord(event, stream), "recording an event");
  }
  std::vector<cudaEvent_t> events_;
};

}  // namespace

std::unique_ptr<LaunchTimer> make_event_timer() { return std::make_unique<EventTimer>(); }

void LaunchLog::begin(const char* name, const Work& work, cudaStream_t stream) {
  records_.push_back({name, work, {}});
  if (timer_) timer_->begin(stream);
}

void LaunchLog::end(cudaStream_t stream) {
  if (timer_) timer_->end(stream);
}

std::vector<LaunchRecord> LaunchLog::finish() {
  if (timer_) {
    std::vector<LaunchTime> times = timer_->times();
    for (size_t i = 0; i < std::min(times.size(), records_.size()); ++i)
      records_[i].time = std::move(times[i]);
  }
  return std::exchange(records_, {});
}

std::vector<KernelTotal> totals(const std::vector<LaunchRecord>& records) {
  std::map<std::pair<std::string_view, std::string_view>, KernelTotal> alike;
  for (const LaunchRecord& r : records) {
    KernelTotal& total = alike[{r.name, r.time.kernels}];
    total.name = r.name;
    total.kernels = r.time.kernels;
    ++total.launches;
    total.bytes += r.work.bytes;
    total.flops += r.work.flops;
    total.seconds += r.time.seconds;
  }
  std::vector<KernelTotal> all;
  for (auto& [key, total] : alike) all.push_back(std::move(total));
  std::stable_sort(all.begin(), all.end(),
                   [](const KernelTotal& a, const KernelTotal& b) { return a.seconds > b.seconds; });
  return all;
}

}  // namespace flexchat::cuda
