#include "backend/cuda/jit.h"

#include "backend/cuda/aot.h"
#include "base/error.h"
#include "base/strings.h"

namespace flexchat::cuda {

Jit& Jit::of(const Context& context) {
  static std::mutex mutex;
  static auto* const instances = new std::map<int, std::unique_ptr<Jit>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<Jit>& instance = (*instances)[context.device().ordinal];
  if (instance == nullptr) instance.reset(new Jit(context.device()));
  return *instance;
}

Jit::Jit(const DeviceInfo& device)
    : device_(device), compiler_(device.major, device.minor, embedded_cubins()) {}

// A key is computed from all headers, which takes longer than some launches, so that known kernels are found
// by what is cheap to compare; the headers, whose texts live as long as the program, by where they lie.
std::string Jit::quick_key(const JitSource& source, const std::string& entry) {
  std::string key = fmt::format("{} {}", static_cast<const void*>(source.headers.data()), entry);
  for (const std::string& option : source.options) key += ' ' + option;
  return key + '\n' + source.text;
}

const JitKernel& Jit::get(const Context& context, const JitSource& source, const std::string& entry,
                          std::span<const JitEntry> companions) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = quick_.find(quick_key(source, entry)); found != quick_.end()) {
      JitCompiler::count_memory_hit();
      return *found->second;
    }
  }
  context.forbid_in_capture("loading a kernel");
  for (const JitEntry& companion : companions) {
    if (companion.at_once) compiler_.compile_ahead(companion.source);
  }
  const JitKernel& kernel = get_loaded(source, entry);
  for (const JitEntry& companion : companions) {
    if (compiler_.compile_ahead(companion.source)) get_loaded(companion.source, companion.entry);
  }
  return kernel;
}

const JitKernel& Jit::get_loaded(const JitSource& source, const std::string& entry) {
  const std::pair<std::string, std::string> key = {jit_key(source, compiler_.arch()), entry};
  const std::string& cubin = compiler_.cubin(source);  // outside the lock: other kernels need not wait
  const std::lock_guard lock(mutex_);
  std::unique_ptr<JitKernel>& place = kernels_[key];
  if (place == nullptr) place = std::make_unique<JitKernel>(load(key.first, cubin, entry));
  quick_[quick_key(source, entry)] = place.get();
  return *place;
}

JitKernel Jit::load(const std::string& key, const std::string& cubin, const std::string& entry) {
  const std::string what = fmt::format("loading kernel {}", entry);
  cudaLibrary_t& library = libraries_[key];
  if (library == nullptr) {
    check_cuda(cudaLibraryLoadData(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
               what.c_str());
  }
  JitKernel kernel;
  kernel.name = entry;
  check_cuda(cudaLibraryGetKernel(&kernel.handle, library, entry.c_str()), what.c_str());

  // Reading the attributes loads the code, which would otherwise happen in the first launch.
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, static_cast<const void*>(kernel.handle)), what.c_str());
  kernel.registers = attributes.numRegs;
  kernel.static_shared = attributes.sharedSizeBytes;
  kernel.local = attributes.localSizeBytes;
  kernel.max_shared = device_.shared_per_block - attributes.sharedSizeBytes;
  // A permission, not a reservation: what a launch takes is what it asks for.
  check_cuda(cudaKernelSetAttributeForDevice(kernel.handle, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(kernel.max_shared), device_.ordinal),
             what.c_str());
  return kernel;
}

void launch_jit(Context& context, const JitKernel& kernel, const Work& work, dim3 grid, dim3 block,
                size_t shared_bytes, void** arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // nothing to do
  if (shared_bytes > kernel.max_shared) {
    fail_run("kernel {} asks for {} of shared memory; {} are left on {}", kernel.name,
             format_bytes(static_cast<double>(shared_bytes)),
             format_bytes(static_cast<double>(kernel.max_shared)), context.device().name);
  }
  context.begin_launch(kernel.name.c_str(), work,
                       {grid.x, grid.y, grid.z, int64_t{1} * block.x * block.y * block.z});
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream();
  // What fails stays the last error, which end_launch reports.
  cudaLaunchKernelExC(&config, static_cast<const void*>(kernel.handle), arguments);
  context.end_launch(kernel.name.c_str());
}

}  // namespace flexchat::cuda
