#include "backend/device_options.h"

#include "base/parallel.h"

namespace flexchat {

DeviceOptions::DeviceOptions() : threads(num_threads()) {}

void DeviceOptions::declare(Options& o, const char* group) {
  const auto add = [&](const char* name, Option::Target target, const char* help) -> Option& {
    Option& option = o.add(name, target, help);
    return group ? option.group(group) : option;
  };
  add("--device", &device, "where to compute: cpu, cuda, cuda:N, or reference (slow, in f64)");
  add("--dtype", &dtype, "compute dtype; weights and optimizer stay f32").choices({"f32", "bf16", "f16"});
  add("--threads", &threads, "CPU threads").at_least(1);
}

std::unique_ptr<Backend> DeviceOptions::open() const {
  set_num_threads(static_cast<int>(threads));
  return make_backend(device);
}

DType DeviceOptions::compute_dtype() const { return device == "reference" ? DType::f64 : parse_dtype(dtype); }

}  // namespace flexchat
