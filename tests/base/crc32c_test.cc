// Published check values, both ways of computing, and pieces of any length.
#include "base/crc32c.h"

#include <gtest/gtest.h>

#include <string>

#include "base/rng.h"

namespace flexchat {
namespace {

TEST(Crc32c, PublishedValues) {
  const std::string digits = "123456789", zeros(32, '\0'), ones(32, '\xff');
  std::string ascending;
  for (int i = 0; i < 32; ++i) ascending += static_cast<char>(i);
  EXPECT_EQ(crc32c(digits.data(), digits.size()), 0xE3069283u);
  EXPECT_EQ(crc32c(zeros.data(), zeros.size()), 0x8A9136AAu);  // RFC 3720, B.4
  EXPECT_EQ(crc32c(ones.data(), ones.size()), 0x62A8AB43u);
  EXPECT_EQ(crc32c(ascending.data(), ascending.size()), 0x46DD794Eu);
  EXPECT_EQ(crc32c(nullptr, 0), 0u);
}

TEST(Crc32c, PortableAndDefaultAgreeAtEveryLengthAndOffset) {
  Rng rng(7);
  std::string bytes;
  for (int i = 0; i < 200; ++i) bytes += static_cast<char>(rng.next_u32());
  for (size_t offset = 0; offset < 9; ++offset) {
    for (size_t n = 0; n + offset <= bytes.size(); ++n) {
      ASSERT_EQ(crc32c(bytes.data() + offset, n), crc32c_portable(bytes.data() + offset, n))
          << offset << " " << n;
    }
  }
}

TEST(Crc32c, PiecesGiveTheSameValue) {
  const std::string text = "the same bytes, cut anywhere, have the same checksum";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Crc32c crc;
    crc.update(text.data(), cut);
    crc.update(text.data() + cut, text.size() - cut);
    EXPECT_EQ(crc.value(), crc32c(text.data(), text.size()));
  }
}

TEST(Crc32c, EveryFlippedBitChangesIt) {
  std::string text = "a short record";
  const uint32_t good = crc32c(text.data(), text.size());
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    std::string bad = text;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
    EXPECT_NE(crc32c(bad.data(), bad.size()), good) << bit;
  }
}

}  // namespace
}  // namespace flexchat
