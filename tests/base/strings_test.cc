// Text helpers: nearest names, number formats, UTF-8 replacement.
#include "base/strings.h"
#include "base/utf8.h"

#include <gtest/gtest.h>

#include <limits>

namespace flexchat {
namespace {

const std::string kBad = "\xEF\xBF\xBD";  // U+FFFD

TEST(Strings, NearestNamePicksTheSmallestDistance) {
  const std::vector<std::string> names = {"--depth", "--device", "--data", "--dtype"};
  EXPECT_EQ(nearest_name("--detph", names), "--depth");
  EXPECT_EQ(nearest_name("--devise", names), "--device");
  EXPECT_EQ(nearest_name("--data", names), "--data");
  EXPECT_EQ(nearest_name("--total-batch-size", names), "");
  EXPECT_EQ(nearest_name("x", {}), "");
  EXPECT_EQ(did_you_mean("modren", {"classic", "modern"}), " (did you mean 'modern'?)");
  EXPECT_EQ(did_you_mean("zzzzzz", {"classic", "modern"}), "");
}

TEST(Strings, Join) {
  EXPECT_EQ(join({}), "");
  EXPECT_EQ(join({"a"}), "a");
  EXPECT_EQ(join({"a", "", "c"}, "-"), "a--c");
}

TEST(Strings, FormatBytes) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1536), "1.5 KiB");
  EXPECT_EQ(format_bytes(1024.0 * 1024), "1.0 MiB");
  EXPECT_EQ(format_bytes(3.25 * 1024 * 1024 * 1024), "3.2 GiB");
  EXPECT_EQ(format_bytes(5e15), "4547.5 TiB");
}

TEST(Strings, FormatCount) {
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(999), "999");
  EXPECT_EQ(format_count(1000), "1,000");
  EXPECT_EQ(format_count(1234567), "1,234,567");
  EXPECT_EQ(format_count(-45678), "-45,678");
  EXPECT_EQ(format_count(std::numeric_limits<int64_t>::max()), "9,223,372,036,854,775,807");
  EXPECT_EQ(format_count(std::numeric_limits<int64_t>::min()), "-9,223,372,036,854,775,808");
}

TEST(Strings, FormatDuration) {
  EXPECT_EQ(format_duration(4.2), "4.2s");
  EXPECT_EQ(format_duration(75), "1m15s");
  EXPECT_EQ(format_duration(3600), "1h00m");
  EXPECT_EQ(format_duration(3723), "1h02m");
  EXPECT_EQ(format_duration(std::numeric_limits<double>::infinity()), "?");
}

struct Utf8Case {
  std::string in, out;
  int64_t replaced;
};

TEST(Strings, InvalidUtf8IsReplacedAndCounted) {
  const Utf8Case cases[] = {
      {"", "", 0},
      {"plain", "plain", 0},
      {"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x90\x88", "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x90\x88", 0},
      {"\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF",
       "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF", 0},  // the limits
      {"a\xFFz", "a" + kBad + "z", 1},
      {"\x80", kBad, 1},                                   // a continuation alone
      {"\xC0\xAF", kBad + kBad, 2},                        // overlong '/'
      {"\xE0\x9F\xBF", kBad + kBad + kBad, 3},             // overlong
      {"\xED\xA0\x80", kBad + kBad + kBad, 3},             // a surrogate
      {"\xF4\x90\x80\x80", kBad + kBad + kBad + kBad, 4},  // above U+10FFFF
      {"\xE2\x82", kBad, 1},                               // cut off: one replacement
      {"\xE2\x82z", kBad + "z", 1},
      {"\xF0\x9F\x90", kBad, 1},
      {"\xC3\xC3\xA9", kBad + "\xC3\xA9", 1},  // goes on at the next possible start
  };
  for (const auto& c : cases) {
    int64_t replaced = 10;
    EXPECT_EQ(replace_invalid_utf8(c.in, &replaced), c.out);
    EXPECT_EQ(replaced, 10 + c.replaced) << testing::PrintToString(c.in);
    EXPECT_EQ(replace_invalid_utf8(c.in, nullptr), c.out);
  }
}

TEST(Strings, ReplacedTextIsValidAndStays) {
  std::string all;
  for (int a = 0; a < 256; ++a) {
    for (int b = 0; b < 256; b += 5)
      all += {static_cast<char>(a), static_cast<char>(b), static_cast<char>(a ^ b)};
  }
  int64_t first = 0, second = 0;
  const std::string once = replace_invalid_utf8(all, &first);
  EXPECT_GT(first, 0);
  EXPECT_EQ(replace_invalid_utf8(once, &second), once);
  EXPECT_EQ(second, 0);
}

}  // namespace
}  // namespace flexchat
