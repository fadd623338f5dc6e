#include "backend/cuda/runtime.h"

#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "backend/cuda/arena.h"
#include "backend/cuda/launch_log.h"
#include "base/error.h"
#include "base/strings.h"

namespace flexchat::cuda {

bool switched_on(const char* variable) {
  const char* value = std::getenv(variable);
  return value && std::string_view(value) != "" && std::string_view(value) != "0";
}

namespace {

DeviceInfo device_info(int ordinal) {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "looking for CUDA devices");
  check(ordinal >= 0 && ordinal < count, "there is no CUDA device {}; this machine has {} of them", ordinal,
        count);
  cudaDeviceProp p{};
  check_cuda(cudaGetDeviceProperties(&p, ordinal), "reading the properties of a CUDA device");
  check(p.major >= 8, "CUDA device {} ({}) is of sm_{}{}; the kernels need sm_80 or later", ordinal, p.name,
        p.major, p.minor);
  return {ordinal,
          p.name,
          p.major,
          p.minor,
          p.multiProcessorCount,
          p.totalGlobalMem,
          static_cast<size_t>(p.l2CacheSize),
          p.sharedMemPerBlockOptin};
}

}  // namespace

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a later launch must not report it again
  if (status == cudaErrorMemoryAllocation) {
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    fail_run("{}: out of memory, {} of the device's {} are free", what,
             format_bytes(static_cast<double>(free)), format_bytes(static_cast<double>(total)));
  }
  fail_run("{}: {} ({})", what, cudaGetErrorName(status), cudaGetErrorString(status));
}

Context::Context(int ordinal)
    : device_(device_info(ordinal)),
      sync_(switched_on("FLEXCHAT_CUDA_SYNC")),
      nvtx_(std::getenv("NVTX_INJECTION64_PATH") != nullptr) {  // how tools that listen announce themselves
  check_cuda(cudaSetDevice(ordinal), "choosing the CUDA device");
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a CUDA stream");
  try {
    arena_ = make_device_arena(*this);
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
  update_observed();
}

Context::~Context() {
  cudaStreamSynchronize(stream_);  // errors were for those who asked; a destructor has nobody to tell
  log_.reset();
  arena_.reset();
  cudaStreamDestroy(stream_);
}

Arena& Context::arena() { return *arena_; }

std::string Context::last_launches() const {
  std::string text;
  const uint64_t n = std::min<uint64_t>(launches_, recent_.size());
  for (uint64_t i = 0; i < n; ++i) {
    const auto& [kernel, s] = recent_[(launches_ - 1 - i) % recent_.size()];
    text += fmt::format("{}{}", i == 0 ? "; last launches, newest first: " : ", ", kernel);
    if (s.threads > 0) text += fmt::format(" ({}x{}x{} blocks of {})", s.x, s.y, s.z, s.threads);
  }
  return text;
}

void Context::check(cudaError_t status, const char* what) const {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail_run("{}: {} ({}){}{}", what, cudaGetErrorName(status), cudaGetErrorString(status), last_launches(),
           sync_ ? "" : "; with FLEXCHAT_CUDA_SYNC=1 the newest is the one at fault");
}

void Context::synchronize() {
  forbid_in_capture("waiting for the device");
  check(cudaStreamSynchronize(stream_), "the work on the device failed");
}

// ---- launches ---------------------------------------------------------------------------------------------

void Context::update_observed() { observed_ = sync_ || nvtx_ || log_ || capturing_; }

void Context::begin_observed(const char* kernel, const Work& work) {
  if (nvtx_) nvtxRangePushA(kernel);
  if (capturing_) {  // the launch runs later, as part of a graph
    captured_.bytes += work.bytes;
    captured_.flops += work.flops;
  } else if (log_) {
    log_->begin(kernel, work, stream_);
  }
}

void Context::end_observed(const char* kernel, cudaError_t status) {
  if (nvtx_) nvtxRangePop();
  if (status != cudaSuccess) check(status, fmt::format("launching {} failed", kernel).c_str());
  if (capturing_) return;
  if (log_) log_->end(stream_);
  if (sync_) check(cudaStreamSynchronize(stream_), fmt::format("{} failed", kernel).c_str());
}

void Context::start_log(std::unique_ptr<LaunchTimer> timer) {
  log_ = std::make_unique<LaunchLog>(std::move(timer));
  update_observed();
}

std::vector<LaunchRecord> Context::stop_log() {
  synchronize();
  const std::unique_ptr<LaunchLog> log = std::move(log_);
  update_observed();
  return log ? log->finish() : std::vector<LaunchRecord>{};
}

// ---- capture ----------------------------------------------------------------------------------------------

void Context::forbid_in_capture(const char* what) const {
  if (capturing_) fail_run("{} inside a captured step: a CUDA graph holds kernels alone", what);
}

void Context::begin_capture() {
  forbid_in_capture("capturing a step");
  // Relaxed: the arena may map memory meanwhile. What must not happen, this class forbids by itself.
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "starting the capture of a graph");
  captured_ = {};
  capturing_ = true;
  update_observed();
}

cudaGraph_t Context::end_capture(Work* total) {
  cudaGraph_t graph = nullptr;
  const cudaError_t status = cudaStreamEndCapture(stream_, &graph);
  capturing_ = false;
  update_observed();
  check(status, "capturing a graph");
  *total = captured_;
  return graph;
}

void Context::abort_capture() noexcept {
  cudaGraph_t graph = nullptr;
  (void)cudaStreamEndCapture(stream_, &graph);
  if (graph) cudaGraphDestroy(graph);
  (void)cudaGetLastError();
  capturing_ = false;
  update_observed();
}

}  // namespace flexchat::cuda
