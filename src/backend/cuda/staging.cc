#include "backend/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"

namespace flexchat::cuda {
namespace {

// One core does not keep up with the bus.
void copy_bytes(void* to, const void* from, size_t bytes) {
  parallel_for(static_cast<int64_t>(bytes), 1 << 19, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<size_t>(end - begin));
  });
}

}  // namespace

void copy_on_host(const Tensor& source, const Tensor& out) {
  if (source.dtype() == out.dtype()) {
    return copy_bytes(out.data(), source.data(), static_cast<size_t>(out.bytes()));
  }
  parallel_for(out.numel(), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out.set(i, source.get(i));
  });
}

Staging::Staging(Context& context) : context_(context) {
  void* memory = nullptr;
  check_cuda(cudaMallocHost(&memory, kSlots * kSlotBytes), "taking pinned host memory");
  memory_ = static_cast<char*>(memory);
  for (cudaEvent_t& event : done_) {
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  }
}

Staging::~Staging() {
  cudaStreamSynchronize(context_.stream());  // copies may still read the slots
  for (const cudaEvent_t event : done_) cudaEventDestroy(event);
  cudaFreeHost(memory_);
}

void Staging::wait_for(size_t i) {
  context_.check(cudaEventSynchronize(done_[i % kSlots]), "a copy between host and device failed");
}

void Staging::upload(const void* host, void* device, size_t bytes) {
  context_.forbid_in_capture("a copy from host memory");
  for (size_t begin = 0; begin < bytes; begin += kSlotBytes, ++next_) {
    const size_t n = std::min(kSlotBytes, bytes - begin);
    wait_for(next_);
    copy_bytes(slot(next_), static_cast<const char*>(host) + begin, n);
    context_.begin_launch("copy_from_host", {static_cast<double>(n), 0});
    context_.check(cudaMemcpyAsync(static_cast<char*>(device) + begin, slot(next_), n, cudaMemcpyHostToDevice,
                                   context_.stream()),
                   "copying to the device");
    context_.end_launch("copy_from_host");
    context_.check(cudaEventRecord(done_[next_ % kSlots], context_.stream()), "recording an event");
  }
}

void Staging::download(const void* device, void* host, size_t bytes) {
  context_.forbid_in_capture("a copy to host memory");
  const size_t pieces = (bytes + kSlotBytes - 1) / kSlotBytes, first = next_;
  const auto size = [&](size_t piece) { return std::min(kSlotBytes, bytes - piece * kSlotBytes); };
  for (size_t piece = 0; piece < pieces + kSlots / 2; ++piece) {  // half the ring is on its way
    if (piece < pieces) {
      const size_t n = size(piece);
      wait_for(next_);
      context_.begin_launch("copy_to_host", {static_cast<double>(n), 0});
      context_.check(cudaMemcpyAsync(slot(next_), static_cast<const char*>(device) + piece * kSlotBytes, n,
                                     cudaMemcpyDeviceToHost, context_.stream()),
                     "copying from the device");
      context_.end_launch("copy_to_host");
      context_.check(cudaEventRecord(done_[next_ % kSlots], context_.stream()), "recording an event");
      ++next_;
    }
    if (piece >= kSlots / 2 && piece - kSlots / 2 < pieces) {
      const size_t arrived = piece - kSlots / 2;
      wait_for(first + arrived);
      copy_bytes(static_cast<char*>(host) + arrived * kSlotBytes, slot(first + arrived), size(arrived));
    }
  }
}

}  // namespace flexchat::cuda
