// The bookkeeping under device arenas, against a model that keeps one flag a granule.
#include "backend/suballocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

constexpr size_t kGranule = 512;

// Best fit by trying everything.
class Model {
 public:
  explicit Model(size_t granules) : used_(granules, false) {}

  std::optional<size_t> allocate(size_t bytes) {
    const size_t n = granules(bytes), end = top();
    size_t best = used_.size(), best_size = used_.size() + 1;
    for (size_t i = 0; i < end;) {
      size_t j = i;
      while (j < end && !used_[j]) ++j;
      if (j - i >= n && j - i < best_size) best = i, best_size = j - i;
      i = j + 1;
    }
    if (best == used_.size()) best = end;
    if (best + n > used_.size()) return std::nullopt;
    std::fill_n(used_.begin() + static_cast<long>(best), n, true);
    return best * kGranule;
  }
  void release(size_t offset, size_t bytes) {
    std::fill_n(used_.begin() + static_cast<long>(offset / kGranule), granules(bytes), false);
  }
  size_t take_free(size_t begin, size_t end) {
    size_t taken = 0;
    for (size_t i = begin / kGranule; i < granules(end); ++i) taken += !used_[i], used_[i] = true;
    return taken * kGranule;
  }
  size_t top() const {
    size_t end = used_.size();
    while (end > 0 && !used_[end - 1]) --end;
    return end;
  }
  size_t in_use() const { return static_cast<size_t>(std::count(used_.begin(), used_.end(), true)); }
  size_t largest_hole() const {
    size_t largest = 0, run = 0;
    for (size_t i = 0; i < top(); ++i) largest = std::max(largest, run = used_[i] ? 0 : run + 1);
    return largest;
  }

 private:
  static size_t granules(size_t bytes) { return std::max<size_t>(1, (bytes + kGranule - 1) / kGranule); }
  std::vector<bool> used_;
};

struct Block {
  size_t offset, bytes;
};

TEST(Suballocator, AgreesWithTheModel) {
  for (const uint64_t seed : {1, 2, 3}) {
    Rng rng(seed);
    constexpr size_t kGranules = 300;
    Suballocator allocator(kGranules * kGranule);
    Model model(kGranules);
    std::vector<Block> blocks;
    int refused = 0;
    for (int step = 0; step < 3000; ++step) {
      const uint64_t wish = step / 500 % 2 == 0 ? 6 : 4;  // fill up, then empty, over and over
      if (blocks.empty() || rng.below(10) < wish) {
        const size_t bytes = rng.below(rng.below(4) == 0 ? 60 * kGranule : 5 * kGranule);
        const auto got = allocator.allocate(bytes), expected = model.allocate(bytes);
        ASSERT_EQ(got, expected) << "seed " << seed << ", step " << step << ", " << bytes << " bytes";
        if (got) blocks.push_back({*got, bytes});
        refused += !got;
      } else if (rng.below(20) == 0) {
        const size_t begin = rng.below(kGranules - 20) * kGranule,
                     end = begin + (1 + rng.below(20)) * kGranule;
        size_t taken = 0;
        for (const auto& span : allocator.take_free(begin, end)) {
          ASSERT_TRUE(begin <= span.begin && span.begin < span.end && span.end <= end);
          blocks.push_back({span.begin, span.end - span.begin});
          taken += blocks.back().bytes;
        }
        ASSERT_EQ(taken, model.take_free(begin, end));
      } else {
        const size_t i = rng.below(blocks.size());
        allocator.release(blocks[i].offset, blocks[i].bytes);
        model.release(blocks[i].offset, blocks[i].bytes);
        blocks.erase(blocks.begin() + static_cast<long>(i));
      }
      ASSERT_EQ(allocator.in_use(), model.in_use() * kGranule);
      ASSERT_EQ(allocator.top(), model.top() * kGranule);
      ASSERT_EQ(allocator.largest_hole(), model.largest_hole() * kGranule);
      ASSERT_EQ(allocator.hole_bytes(), allocator.top() - allocator.in_use());
    }
    EXPECT_GT(refused, 0) << "the range never filled: the test shows less than it should";
    for (const Block& block : blocks) allocator.release(block.offset, block.bytes);
    EXPECT_EQ(allocator.top(), 0u);
    EXPECT_TRUE(allocator.holes().empty());
  }
}

// What a training step does: the same sizes in the same order, after a first step of other sizes.
TEST(Suballocator, ARepeatedStepRepeatsItsAddresses) {
  Suballocator allocator(size_t{1} << 40);
  std::vector<Block> weights;
  for (const size_t bytes : {1000, 70000, 512, 3}) weights.push_back({*allocator.allocate(bytes), bytes});
  const auto step = [&] {
    std::vector<size_t> offsets;
    std::vector<Block> kept;
    Rng rng(9);
    for (int i = 0; i < 200; ++i) {
      const size_t bytes = 1 + rng.below(100000);
      kept.push_back({*allocator.allocate(bytes), bytes});
      offsets.push_back(kept.back().offset);
      if (rng.below(3) == 0) {
        const size_t j = rng.below(kept.size());
        allocator.release(kept[j].offset, kept[j].bytes);
        kept.erase(kept.begin() + static_cast<long>(j));
      }
    }
    for (const Block& block : kept) allocator.release(block.offset, block.bytes);
    return offsets;
  };
  const auto first = step();
  EXPECT_EQ(step(), first);
  allocator.release(weights[1].offset, weights[1].bytes);  // a hole below: other addresses, but stable again
  const auto moved = step();
  EXPECT_NE(moved, first);
  EXPECT_EQ(step(), moved);
}

TEST(Suballocator, RefusesWhatWasNotAllocated) {
  Suballocator allocator(100 * kGranule);
  const size_t a = *allocator.allocate(3 * kGranule), b = *allocator.allocate(kGranule);
  EXPECT_EQ(message_of<RunError>([&] { allocator.release(b, 2 * kGranule); }),
            "released 1024 bytes at offset 1536 that were not allocated");
  allocator.release(a, 3 * kGranule);
  EXPECT_THROW(allocator.release(a, 3 * kGranule), RunError);                 // twice
  EXPECT_THROW(allocator.release(a + kGranule, kGranule), RunError);          // inside a hole
  EXPECT_THROW(allocator.release(a + 2 * kGranule, 2 * kGranule), RunError);  // across a border
  allocator.release(b, kGranule);
  EXPECT_THROW(allocator.release(b, kGranule), RunError);
}

TEST(Suballocator, RoundsAndEnds) {
  Suballocator allocator(4 * kGranule + 100);
  EXPECT_EQ(allocator.rounded(0), kGranule);
  EXPECT_EQ(allocator.rounded(513), 2 * kGranule);
  EXPECT_EQ(allocator.allocate(~size_t{0}), std::nullopt);
  EXPECT_EQ(allocator.allocate(5 * kGranule), std::nullopt);
  EXPECT_EQ(allocator.allocate(4 * kGranule), std::optional<size_t>(0));
  EXPECT_EQ(allocator.allocate(0), std::nullopt);
}

}  // namespace
}  // namespace flexchat
