#include "backend/backend.h"

#include <charconv>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda_loader.h"
#include "backend/reference/reference_backend.h"
#include "base/error.h"
#include "base/strings.h"

namespace flexchat {

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }
std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

namespace {

// 1 of "cuda:1", 0 of "cuda"; -1 of any other name.
int cuda_ordinal(std::string_view name) {
  if (name == "cuda") return 0;
  if (!name.starts_with("cuda:")) return -1;
  name.remove_prefix(5);
  int ordinal = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), ordinal);
  return error == std::errc() && end == name.data() + name.size() ? ordinal : -1;
}

}  // namespace

std::unique_ptr<Backend> make_backend(std::string_view name) {
  if (name == "cpu") return make_cpu_backend();
  if (name == "reference") return make_reference_backend();
  if (const int ordinal = cuda_ordinal(name); ordinal >= 0) return make_cuda_backend(ordinal);
  fail("unknown device '{}'{}; allowed: cpu, reference, cuda, cuda:N with N from 0", name,
       did_you_mean(name, {"cpu", "reference", "cuda"}));
}

}  // namespace flexchat
