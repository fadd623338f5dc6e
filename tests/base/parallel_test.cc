// parallel_for: every index once, ranges in multiples of the grain, the same split every time.
#include "base/parallel.h"

#include <gtest/gtest.h>

#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace flexchat {
namespace {

class Parallel : public testing::Test {
 protected:
  void TearDown() override { set_num_threads(before_); }
  int before_ = num_threads();
};

using Ranges = std::set<std::pair<int64_t, int64_t>>;

Ranges ranges_of(int64_t n, int64_t grain) {
  std::mutex mutex;
  Ranges ranges;
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    std::lock_guard lock(mutex);
    EXPECT_TRUE(ranges.emplace(begin, end).second);
  });
  return ranges;
}

TEST_F(Parallel, EveryIndexOnceForManyShapes) {
  for (const int threads : {1, 2, 3, 5, 8}) {
    set_num_threads(threads);
    for (const int64_t n : {0, 1, 2, 3, 7, 8, 9, 31, 64, 100, 1001}) {
      for (const int64_t grain : {1, 2, 3, 8, 64, 5000}) {
        std::vector<int> seen(
            static_cast<size_t>(n));  // ranges are disjoint, so no two threads share an element
        parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        ASSERT_EQ(seen, std::vector<int>(static_cast<size_t>(n), 1)) << n << " " << grain << " " << threads;
      }
    }
  }
}

TEST_F(Parallel, RangesAreMultiplesOfTheGrainAndAtMostOnePerThread) {
  for (const int threads : {1, 2, 3, 7}) {
    set_num_threads(threads);
    for (const int64_t n : {1, 10, 63, 64, 65, 1000}) {
      for (const int64_t grain : {1, 4, 16}) {
        const Ranges ranges = ranges_of(n, grain);
        EXPECT_LE(ranges.size(), static_cast<size_t>(threads));
        int64_t expected = 0;
        for (const auto& [begin, end] : ranges) {
          EXPECT_EQ(begin, expected);
          EXPECT_EQ(begin % grain, 0);
          EXPECT_TRUE(end % grain == 0 || end == n);
          expected = end;
        }
        EXPECT_EQ(expected, n);
        EXPECT_EQ(ranges_of(n, grain), ranges) << "the split depends on n, grain and threads alone";
      }
    }
  }
}

TEST_F(Parallel, WorkIsReallySplit) {
  set_num_threads(4);
  EXPECT_EQ(ranges_of(400, 1), (Ranges{{0, 100}, {100, 200}, {200, 300}, {300, 400}}));
  EXPECT_EQ(ranges_of(400, 400).size(), 1u);
  std::mutex mutex;
  std::set<std::thread::id> ids;
  parallel_for(4, 1, [&](int64_t, int64_t) {
    std::lock_guard lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(ids.size(), 4u);
}

TEST_F(Parallel, NothingForNoWork) {
  parallel_for(0, 1, [](int64_t, int64_t) { FAIL(); });
  parallel_for(-5, 1, [](int64_t, int64_t) { FAIL(); });
}

TEST_F(Parallel, ThreadCountIsAtLeastOne) {
  EXPECT_GE(num_threads(), 1);
  set_num_threads(0);
  EXPECT_EQ(num_threads(), 1);
  set_num_threads(3);
  EXPECT_EQ(num_threads(), 3);
}

}  // namespace
}  // namespace flexchat
