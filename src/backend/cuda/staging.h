// Transfers between pageable host memory and the device through a ring of pinned slots: the CPU fills or
// empties one slot while the copy engine works on others. An upload returns when its last bytes are in a
// slot, so that the CPU can run ahead of the device by as many small uploads as there are slots.
#pragma once

#include <array>
#include <cstddef>

#include "backend/cuda/runtime.h"
#include "base/tensor.h"

namespace flexchat::cuda {

class Staging {
 public:
  explicit Staging(Context& context);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Errors: inside a captured step.
  void upload(const void* host, void* device, size_t bytes);
  void download(const void* device, void* host, size_t bytes);  // has arrived on return

 private:
  static constexpr size_t kSlotBytes = size_t{4} << 20, kSlots = 16;
  char* slot(size_t i) { return memory_ + i % kSlots * kSlotBytes; }
  void wait_for(size_t i);

  Context& context_;
  char* memory_ = nullptr;
  std::array<cudaEvent_t, kSlots> done_{};  // the last copy of each slot
  size_t next_ = 0;
};

// Both in host memory; converts dtypes.
void copy_on_host(const Tensor& source, const Tensor& out);

}  // namespace flexchat::cuda
