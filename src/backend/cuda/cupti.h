// Kernel times and names from CUPTI's activity records. The library is opened when a profile is asked for.
#pragma once

#include <memory>
#include <string>

#include "backend/cuda/launch_log.h"

namespace flexchat::cuda {

// A timer that names the kernels behind each launch and times them alone, copies and fills included. Null
// when CUPTI cannot be opened or another timer of this kind lives; then *why says so in one line.
std::unique_ptr<LaunchTimer> make_cupti_timer(std::string* why);

}  // namespace flexchat::cuda
