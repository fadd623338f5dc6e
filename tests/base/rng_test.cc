// Philox against the known answers of Random123, and the Rng stream on top of it.
#include "base/rng.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace flexchat {
namespace {

using Block = std::array<uint32_t, 4>;

TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, 0), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, ~uint64_t{0}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Rng, DrawsThePhiloxBlocksInOrder) {
  const uint64_t seed = 0x0123456789abcdef, stream = 0xfedcba9876543210;
  Rng rng(seed, stream);
  for (uint32_t block = 0; block < 5; ++block) {
    const Block expected = philox4x32({block, 0, 0x76543210, 0xfedcba98}, seed);
    for (const uint32_t word : expected) EXPECT_EQ(rng.next_u32(), word);
  }
  EXPECT_EQ(rng.position(), 20u);
}

TEST(Rng, BlockNumbersAbove32BitsCount) {
  Rng rng(7, 9);
  rng.seek((uint64_t{5} << 34) + 4 * 3 + 2);
  EXPECT_EQ(rng.next_u32(), philox4x32({3, 5, 9, 0}, 7)[2]);
}

TEST(Rng, SeedAndStreamChangeTheBits) {
  Rng a(1, 0), b(1, 0), other_seed(2, 0), other_stream(1, 1);
  int equal_seed = 0, equal_stream = 0;
  for (int i = 0; i < 1000; ++i) {
    const uint32_t x = a.next_u32();
    EXPECT_EQ(x, b.next_u32());
    equal_seed += x == other_seed.next_u32();
    equal_stream += x == other_stream.next_u32();
  }
  EXPECT_LE(equal_seed, 1);
  EXPECT_LE(equal_stream, 1);
}

TEST(Rng, SeekResumesTheSameBits) {
  Rng rng(42, 3);
  std::vector<uint64_t> positions;
  std::vector<double> normals, uniforms;
  std::vector<uint64_t> picks;
  for (int i = 0; i < 200; ++i) {
    positions.push_back(rng.position());
    if (i % 3 == 0) rng.next_u32();  // so that positions fall on all four words of a block
    normals.push_back(rng.normal());
    uniforms.push_back(rng.uniform());
    picks.push_back(rng.below(1000));
  }
  for (const size_t i : {size_t{0}, size_t{1}, size_t{57}, size_t{100}, size_t{199}, size_t{3}}) {
    Rng resumed(42, 3);
    resumed.seek(positions[i]);
    if (i % 3 == 0) resumed.next_u32();
    EXPECT_EQ(resumed.normal(), normals[i]);
    EXPECT_EQ(resumed.uniform(), uniforms[i]);
    EXPECT_EQ(resumed.below(1000), picks[i]);
    rng.seek(positions[i]);  // also backwards, on a generator that has a block at hand
    if (i % 3 == 0) rng.next_u32();
    EXPECT_EQ(rng.normal(), normals[i]);
  }
}

TEST(Rng, UniformLimitsAndMoments) {
  EXPECT_EQ(unit_float(0), 0.0f);
  EXPECT_EQ(unit_float(~0u), 1.0f - 0x1p-24f);
  Rng rng(11);
  double sum = 0, squares = 0;
  const int n = 200'000;
  for (int i = 0; i < n; ++i) {
    const double x = rng.uniform();
    ASSERT_GE(x, 0.0);
    ASSERT_LT(x, 1.0);
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / n, 1.0 / 2, 5 * std::sqrt(1.0 / 12 / n));
  EXPECT_NEAR(squares / n, 1.0 / 3, 5 * std::sqrt(4.0 / 45 / n));
}

// Each moment within five standard errors of the normal distribution's.
TEST(Rng, NormalMoments) {
  Rng rng(12);
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, lag = 0, before = 0;
  int beyond_two = 0;
  const int n = 200'000;
  for (int i = 0; i < n; ++i) {
    const double x = rng.normal();
    ASSERT_TRUE(std::isfinite(x));
    m1 += x;
    m2 += x * x;
    m3 += x * x * x;
    m4 += x * x * x * x;
    lag += x * before;
    before = x;
    beyond_two += std::abs(x) > 2;
  }
  EXPECT_NEAR(m1 / n, 0, 5 * std::sqrt(1.0 / n));
  EXPECT_NEAR(m2 / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(m3 / n, 0, 5 * std::sqrt(15.0 / n));
  EXPECT_NEAR(m4 / n, 3, 5 * std::sqrt(96.0 / n));
  EXPECT_NEAR(lag / n, 0, 5 * std::sqrt(1.0 / n));
  const double p = 0.0455002638963584;  // P(|x| > 2)
  EXPECT_NEAR(static_cast<double>(beyond_two) / n, p, 5 * std::sqrt(p * (1 - p) / n));
}

TEST(Rng, BelowIsUniformAndInRange) {
  Rng rng(13);
  for (const uint64_t bound : {uint64_t{1}, uint64_t{2}, uint64_t{7}, uint64_t{10}}) {
    std::vector<int> counts(bound);
    const int n = 20'000;
    for (int i = 0; i < n; ++i) ++counts.at(rng.below(bound));
    const double p = 1.0 / static_cast<double>(bound);
    for (const int count : counts) EXPECT_NEAR(count, n * p, 5 * std::sqrt(n * p * (1 - p)) + 1e-9);
  }
  // With a bound of 3/4 of 2^64 a plain remainder would hit the lowest third twice as often as the others.
  const uint64_t big = uint64_t{3} << 62;
  int low = 0;
  const int n = 20'000;
  for (int i = 0; i < n; ++i) {
    const uint64_t x = rng.below(big);
    ASSERT_LT(x, big);
    low += x < big / 3;
  }
  EXPECT_NEAR(low, n / 3.0, 5 * std::sqrt(n * 2.0 / 9));
  EXPECT_LT(rng.below(~uint64_t{0}), ~uint64_t{0});
}

}  // namespace
}  // namespace flexchat
