#include "backend/profile.h"

#include <utility>

namespace flexchat {
namespace {

bool enabled = false;
std::vector<DeviceProfile>& profiles() {
  static std::vector<DeviceProfile> all;
  return all;
}

}  // namespace

void set_profiling(bool on) { enabled = on; }
bool profiling() { return enabled; }
void add_profile(DeviceProfile profile) { profiles().push_back(std::move(profile)); }
std::vector<DeviceProfile> take_profiles() { return std::exchange(profiles(), {}); }

}  // namespace flexchat
