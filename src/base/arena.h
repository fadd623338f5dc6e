// Where tensors get their memory. An arena hands out 64-byte aligned blocks and keeps freed ones for
// reuse by size, so a training step that repeats its shapes repeats its addresses and never reaches the
// operating system. Thread safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace flexchat {

class Arena {
 public:
  virtual ~Arena() = default;
  virtual bool host() const = 0;  // can the CPU read and write its memory?
  virtual void read(const void* from, void* host_memory, size_t bytes) const = 0;
  virtual void* allocate(size_t bytes) = 0;  // throws RunError naming the amount when memory is out
  virtual void release(void* block, size_t bytes) = 0;

  struct Stats {
    size_t in_use = 0;         // bytes handed out now
    size_t peak = 0;           // highest in_use since the last reset_peak()
    size_t reserved = 0;       // bytes held from the system
    double fragmentation = 0;  // 1 - largest free block / all free memory; 0 where it is not known
  };
  virtual Stats stats() const = 0;
  virtual void reset_peak() = 0;
};

class HostArena final : public Arena {
 public:
  ~HostArena() override;
  bool host() const override { return true; }
  void read(const void* from, void* host_memory, size_t bytes) const override;
  void* allocate(size_t bytes) override;
  void release(void* block, size_t bytes) override;
  Stats stats() const override;
  void reset_peak() override;

 private:
  mutable std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;  // rounded size -> blocks
  Stats stats_;
};

// The process-wide host arena.
Arena& host_arena();

}  // namespace flexchat
