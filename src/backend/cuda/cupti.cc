// Every launch runs between the push and the pop of an external correlation id, its number. CUPTI then
// records which driver calls fell in between, and of each kernel which call launched it, when it began and
// ended. Buffers of records come back in a thread of CUPTI's own, so what they say is collected under a lock.
#include "backend/cuda/cupti.h"

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/error.h"

namespace flexchat::cuda {
namespace {

constexpr const char* kLibrary = "libcupti.so.13";
constexpr size_t kBufferBytes = size_t{4} << 20;
constexpr auto kCorrelation = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY,
                                         CUPTI_ACTIVITY_KIND_MEMSET,
                                         CUPTI_ACTIVITY_KIND_RUNTIME,
                                         CUPTI_ACTIVITY_KIND_DRIVER,
                                         CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION};

struct Api {
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityDisable) disable = nullptr;
  decltype(&cuptiActivityFlushAll) flush = nullptr;
  decltype(&cuptiActivityGetNextRecord) next_record = nullptr;
  decltype(&cuptiActivityPushExternalCorrelationId) push = nullptr;
  decltype(&cuptiActivityPopExternalCorrelationId) pop = nullptr;
  std::string why;  // empty when all is there
};

Api open_api() {
  Api api;
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = dlerror();
    api.why = error ? error : kLibrary;
    return api;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (!function) api.why = fmt::format("{} lacks {}", kLibrary, name);
  };
  find(api.register_callbacks, "cuptiActivityRegisterCallbacks");
  find(api.enable, "cuptiActivityEnable");
  find(api.disable, "cuptiActivityDisable");
  find(api.flush, "cuptiActivityFlushAll");
  find(api.next_record, "cuptiActivityGetNextRecord");
  find(api.push, "cuptiActivityPushExternalCorrelationId");
  find(api.pop, "cuptiActivityPopExternalCorrelationId");
  return api;
}
const Api& api() {
  static const Api opened = open_api();
  return opened;
}

// One kernel, copy or fill on the device; times in ns.
struct Activity {
  uint64_t start = 0, end = 0;
  std::string name;
};

struct Records {
  std::mutex mutex;
  bool taken = false;                                   // by a living timer
  std::unordered_map<uint32_t, uint64_t> launch_of;     // correlation id: number of the launch
  std::vector<std::pair<uint32_t, Activity>> activity;  // by correlation id
};
// Never destroyed: CUPTI's thread may still hand over a buffer when the program ends.
Records& records() {
  static auto* all = new Records;
  return *all;
}

// "void a::b<int>(float*)" without the result and the parameters; namespaces too, they are all ours.
std::string short_name(const char* mangled) {
  if (!mangled) return "?";
  int status = 0;
  char* readable = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : mangled;
  std::free(readable);
  if (status != 0) return name;
  for (const std::string_view part : {"void ", "flexchat::", "cuda::", "(anonymous namespace)::"}) {
    for (size_t at = 0; (at = name.find(part)) != std::string::npos;) name.erase(at, part.size());
  }
  return name.substr(0, name.find('('));
}

void note(const CUpti_Activity* record) {
  Records& all = records();
  switch (record->kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
      const auto& r = *reinterpret_cast<const CUpti_ActivityKernel10*>(record);
      all.activity.push_back({r.correlationId, {r.start, r.end, short_name(r.name)}});
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto& r = *reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
      all.activity.push_back({r.correlationId, {r.start, r.end, "memcpy"}});
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto& r = *reinterpret_cast<const CUpti_ActivityMemset4*>(record);
      all.activity.push_back({r.correlationId, {r.start, r.end, "memset"}});
      break;
    }
    case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: {
      const auto& r = *reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(record);
      if (r.externalKind == kCorrelation) all.launch_of[r.correlationId] = r.externalId;
      break;
    }
    default:
      break;
  }
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size = *buffer ? kBufferBytes : 0;
  *max_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  {
    const std::lock_guard lock(records().mutex);
    CUpti_Activity* record = nullptr;
    while (valid > 0 && api().next_record(buffer, valid, &record) == CUPTI_SUCCESS) note(record);
  }
  std::free(buffer);
}

class CuptiTimer final : public LaunchTimer {
 public:
  CuptiTimer() = default;
  CuptiTimer(const CuptiTimer&) = delete;
  CuptiTimer& operator=(const CuptiTimer&) = delete;
  ~CuptiTimer() override {
    for (const CUpti_ActivityKind kind : kKinds) api().disable(kind);
    api().flush(0);
    const std::lock_guard lock(records().mutex);
    records().launch_of.clear();
    records().activity.clear();
    records().taken = false;
  }
  void begin(cudaStream_t) override { api().push(kCorrelation, launches_++); }
  void end(cudaStream_t) override {
    uint64_t last = 0;
    api().pop(kCorrelation, &last);
  }
  std::vector<LaunchTime> times() override {
    api().flush(0);
    std::vector<std::vector<Activity>> by_launch(launches_);
    {
      const std::lock_guard lock(records().mutex);
      for (auto& [correlation, activity] : records().activity) {
        const auto launch = records().launch_of.find(correlation);
        if (launch != records().launch_of.end() && launch->second < launches_)
          by_launch[launch->second].push_back(std::move(activity));
      }
      records().activity.clear();
    }
    std::vector<LaunchTime> all;
    for (std::vector<Activity>& parts : by_launch) {
      std::sort(parts.begin(), parts.end(),
                [](const Activity& a, const Activity& b) { return a.start < b.start; });
      LaunchTime& time = all.emplace_back();
      for (const Activity& part : parts) {
        time.seconds += static_cast<double>(part.end - part.start) * 1e-9;
        time.kernels += (time.kernels.empty() ? "" : " + ") + part.name;
      }
    }
    return all;
  }

 private:
  uint64_t launches_ = 0;
};

}  // namespace

std::unique_ptr<LaunchTimer> make_cupti_timer(std::string* why) {
  *why = api().why;
  if (!why->empty()) return nullptr;
  {
    const std::lock_guard lock(records().mutex);
    if (records().taken) {
      *why = "CUPTI already measures another device";
      return nullptr;
    }
    records().taken = true;
  }
  auto timer = std::make_unique<CuptiTimer>();  // gives CUPTI back when what follows fails
  CUptiResult status = api().register_callbacks(give_buffer, take_buffer);
  for (const CUpti_ActivityKind kind : kKinds) {
    if (status == CUPTI_SUCCESS) status = api().enable(kind);
  }
  if (status == CUPTI_SUCCESS) return timer;
  *why = fmt::format("CUPTI refuses to record (its error {})", static_cast<int>(status));
  return nullptr;
}

}  // namespace flexchat::cuda
