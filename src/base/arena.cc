#include "base/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Sizes are rounded so that near-equal requests share a free list: 64 B steps, then 1/8 of a power of two.
size_t round_size(size_t bytes) {
  size_t step = 64;
  while (step * 16 < bytes) step *= 2;
  return std::max<size_t>((bytes + step - 1) / step * step, 64);
}

}  // namespace

HostArena::~HostArena() {
  for (auto& [size, blocks] : free_) {
    for (void* block : blocks) std::free(block);
  }
}

void HostArena::read(const void* from, void* host_memory, size_t bytes) const {
  std::memcpy(host_memory, from, bytes);
}

void* HostArena::allocate(size_t bytes) {
  const size_t size = round_size(bytes);
  std::lock_guard lock(mutex_);
  void* block = nullptr;
  if (auto it = free_.find(size); it != free_.end() && !it->second.empty()) {
    block = it->second.back();
    it->second.pop_back();
  } else {
    const size_t alignment = size >= kHugePage ? kHugePage : 64;
    block = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    if (!block) {
      fail_run("out of memory: asked for {}, {} in use, {} held", format_bytes(static_cast<double>(bytes)),
               format_bytes(static_cast<double>(stats_.in_use)),
               format_bytes(static_cast<double>(stats_.reserved)));
    }
    if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);  // fewer TLB misses when streaming weights
    stats_.reserved += size;
  }
  stats_.in_use += size;
  stats_.peak = std::max(stats_.peak, stats_.in_use);
  return block;
}

void HostArena::release(void* block, size_t bytes) {
  const size_t size = round_size(bytes);
  std::lock_guard lock(mutex_);
  free_[size].push_back(block);
  stats_.in_use -= size;
}

Arena::Stats HostArena::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

void HostArena::reset_peak() {
  std::lock_guard lock(mutex_);
  stats_.peak = stats_.in_use;
}

Arena& host_arena() {
  static HostArena* arena = new HostArena;  // never destroyed: tensors in statics may outlive it
  return *arena;
}

}  // namespace flexchat
