// The host arena: alignment, reuse by size, accounting of use and peak, several threads.
#include "base/arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <thread>

#include "base/error.h"

// Under a sanitizer an impossible request must fail as it does without one, instead of ending the program.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace flexchat {
namespace {

TEST(Arena, BlocksAreAlignedApartAndWritable) {
  HostArena arena;
  std::vector<std::pair<unsigned char*, size_t>> blocks;
  for (const size_t bytes : {0, 1, 63, 64, 65, 1000, 4097, 1 << 20, (1 << 21) + 1, 5'000'000}) {
    auto* p = static_cast<unsigned char*>(arena.allocate(bytes));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(p) % 64, 0u) << bytes;
    std::memset(p, static_cast<int>(blocks.size() + 1), bytes);
    blocks.emplace_back(p, bytes);
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto [p, bytes] = blocks[i];
    for (size_t k = 0; k < bytes; k += 61) ASSERT_EQ(p[k], i + 1) << bytes;
    if (bytes > 0) {
      ASSERT_EQ(p[bytes - 1], i + 1);
    }
    arena.release(p, bytes);
  }
  EXPECT_EQ(arena.stats().in_use, 0u);
}

TEST(Arena, TheSameSequenceGetsTheSameAddresses) {
  HostArena arena;
  const auto step = [&] {
    std::vector<void*> addresses;
    for (const size_t bytes : {300, 70'000, 300, 4'000'000, 12}) addresses.push_back(arena.allocate(bytes));
    std::vector<void*> result = addresses;
    for (const size_t bytes : {12, 4'000'000, 300, 70'000, 300}) {
      arena.release(addresses.back(), bytes);
      addresses.pop_back();
    }
    return result;
  };
  const auto first = step();
  const size_t reserved = arena.stats().reserved;
  for (int i = 0; i < 5; ++i) EXPECT_EQ(step(), first);
  EXPECT_EQ(arena.stats().reserved, reserved) << "a repeated step asks the system for nothing";
}

TEST(Arena, NearEqualSizesShareBlocksAndWasteIsBounded) {
  HostArena arena;
  void* a = arena.allocate(1'000'000);
  arena.release(a, 1'000'000);
  void* b = arena.allocate(1'000'100);
  EXPECT_EQ(a, b);
  arena.release(b, 1'000'100);
  for (const size_t bytes : {1u, 100u, 1025u, 5000u, 131'073u, 1'100'000u}) {
    HostArena fresh;
    void* p = fresh.allocate(bytes);
    EXPECT_GE(fresh.stats().in_use, bytes);
    EXPECT_LE(fresh.stats().in_use, bytes + std::max<size_t>(63, bytes / 8)) << bytes;
    fresh.release(p, bytes);
  }
}

TEST(Arena, PeakIsTheHighestUseSinceTheReset) {
  HostArena arena;
  void* a = arena.allocate(4096);
  void* b = arena.allocate(8192);
  EXPECT_EQ(arena.stats().in_use, 12288u);
  EXPECT_EQ(arena.stats().peak, 12288u);
  EXPECT_EQ(arena.stats().reserved, 12288u);
  arena.release(b, 8192);
  EXPECT_EQ(arena.stats().in_use, 4096u);
  EXPECT_EQ(arena.stats().peak, 12288u);
  EXPECT_EQ(arena.stats().reserved, 12288u);
  arena.reset_peak();
  EXPECT_EQ(arena.stats().peak, 4096u);
  void* c = arena.allocate(64);
  EXPECT_EQ(arena.stats().peak, 4160u);
  arena.release(c, 64);
  arena.release(a, 4096);
  EXPECT_EQ(arena.stats().in_use, 0u);
}

TEST(Arena, OutOfMemoryNamesTheAmount) {
  HostArena arena;
  try {
    (void)arena.allocate(size_t{1} << 60);
    FAIL() << "2^60 bytes were handed out";
  } catch (const RunError& e) {
    EXPECT_NE(std::string(e.what()).find("out of memory: asked for 1048576.0 TiB"), std::string::npos)
        << e.what();
  }
  EXPECT_EQ(arena.stats().in_use, 0u);
  EXPECT_EQ(arena.stats().reserved, 0u);
}

TEST(Arena, ManyThreads) {
  HostArena arena;
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&arena, t] {
      for (int i = 0; i < 500; ++i) {
        const size_t bytes = static_cast<size_t>(64 * (1 + i % 7));
        auto* p = static_cast<unsigned char*>(arena.allocate(bytes));
        std::memset(p, t, bytes);
        for (size_t k = 0; k < bytes; ++k) ASSERT_EQ(p[k], t);
        arena.release(p, bytes);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(arena.stats().in_use, 0u);
  EXPECT_LE(arena.stats().peak, size_t{4 * 64 * 7});
}

TEST(Arena, TheHostArenaIsOne) { EXPECT_EQ(&host_arena(), &host_arena()); }

}  // namespace
}  // namespace flexchat
