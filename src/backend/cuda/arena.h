// Device memory. FLEXCHAT_ALLOC chooses how it comes from the driver:
//   expandable  (default) a large range of addresses, behind which physical pages are mapped as it grows; no
//               block can be too large for a hole that only address space would have filled
//   malloc      cudaMalloc, blocks kept for reuse by size
//   async       the driver's stream-ordered pool; cannot be captured in a graph
//
// All work is in one stream, so memory that was released may be handed out again at once: what uses it next
// runs after what used it last. The same sequence of calls gives the same addresses (not with async). What a
// graph is captured with stays its own as long as it lives: each replay writes there.
//
// FLEXCHAT_POISON=1, for tests, fills every new block with bytes 0xff, NaN in all float types: what reads
// memory that nobody wrote then gives results that no check lets pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "backend/cuda/runtime.h"
#include "base/arena.h"

namespace flexchat::cuda {

class DeviceArena : public Arena {
 public:
  explicit DeviceArena(Context& context);
  bool host() const final { return false; }
  void* allocate(size_t bytes) final;
  // Waits for the work so far.
  void read(const void* from, void* host_memory, size_t bytes) const final;
  void reset_peak() final;

  // Around the capture of a graph. All that was allocated in between, released since or not, is kept from
  // others until release_graph(id).
  virtual void begin_graph() = 0;  // Error where the arena cannot
  virtual uint64_t end_graph() = 0;
  virtual void release_graph(uint64_t id) = 0;

 protected:
  virtual void* take(size_t bytes) = 0;                 // allocate()
  [[noreturn]] void out_of_memory(size_t bytes) const;  // with mutex_ held
  void count(size_t taken, size_t given_back);          // into stats_
  // A graph in the making may use blocks that were released since.
  bool may_return_memory() const { return !context_.capturing(); }

  Context& context_;
  mutable std::mutex mutex_;
  Stats stats_;

 private:
  const bool poison_;
};

// By FLEXCHAT_ALLOC and FLEXCHAT_POISON. Errors: an unknown word, a device that cannot do it.
std::unique_ptr<DeviceArena> make_device_arena(Context& context);

}  // namespace flexchat::cuda
