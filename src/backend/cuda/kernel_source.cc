#include "backend/cuda/kernel_source.h"

#include <string>
#include <vector>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat::cuda {

std::string_view kernel_source(std::string_view name) {
  std::vector<std::string> names;
  for (const KernelSource& source : kernel_sources()) {
    if (source.name == name) return source.text;
    names.emplace_back(source.name);
  }
  fail("no kernel source '{}' in the CUDA library; it has: {}", name, join(names));
}

}  // namespace flexchat::cuda
