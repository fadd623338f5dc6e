#include "backend/cuda/launch_log.h"

#include <algorithm>
#include <map>
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
  std::vector<double> seconds() override {
    std::vector<double> all;
    for (size_t i = 0; i + 1 < events_.size(); i += 2) {
      float ms = 0;
      check_cuda(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]), "reading the time of a launch");
      all.push_back(static_cast<double>(ms) * 1e-3);
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

void LaunchLog::begin(const char* kernel, const Work& work, cudaStream_t stream) {
  records_.push_back({kernel, work, 0});
  if (timer_) timer_->begin(stream);
}

void LaunchLog::end(cudaStream_t stream) {
  if (timer_) timer_->end(stream);
}

std::vector<LaunchRecord> LaunchLog::finish() {
  if (timer_) {
    const std::vector<double> seconds = timer_->seconds();
    for (size_t i = 0; i < std::min(seconds.size(), records_.size()); ++i) records_[i].seconds = seconds[i];
  }
  return std::exchange(records_, {});
}

std::vector<LaunchTotal> totals(const std::vector<LaunchRecord>& records) {
  std::map<std::string, LaunchTotal> by_name;
  for (const LaunchRecord& r : records) {
    LaunchTotal& total = by_name[r.kernel];
    total.kernel = r.kernel;
    ++total.launches;
    total.work.bytes += r.work.bytes;
    total.work.flops += r.work.flops;
    total.seconds += r.seconds;
  }
  std::vector<LaunchTotal> all;
  for (auto& [name, total] : by_name) all.push_back(std::move(total));
  std::stable_sort(all.begin(), all.end(),
                   [](const LaunchTotal& a, const LaunchTotal& b) { return a.seconds > b.seconds; });
  return all;
}

}  // namespace flexchat::cuda
