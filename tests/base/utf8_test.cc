// UTF-8: validation, replacement as Python does it, cropping by characters.
#include "base/utf8.h"

#include <gtest/gtest.h>

namespace flexchat {
namespace {

std::string replaced_text(std::string_view text, int64_t* n) { return replace_invalid_utf8(text, n); }

TEST(Utf8, ReplacesMaximalSubsequencesLikePython) {
  // Expected: len(b.decode("utf-8", "replace").split("\ufffd")) - 1 and the text, from CPython 3.11.
  const std::string bad = "\uFFFD";
  const struct {
    std::string bytes, text;
  } cases[] = {
      {"", ""},
      {"plain", "plain"},
      {"\u00E9\u20AC\U0001F600", "\u00E9\u20AC\U0001F600"},
      {"\xE4\xBD", bad},
      {"a\xE4\xBDz", "a" + bad + "z"},
      {"\xF0\x9F\x98", bad},
      {"\xF0\x9F\x98\xF0", bad + bad},
      {"\xC0\xAF", bad + bad},
      {"\xE0\x80\x80", bad + bad + bad},
      {"\xED\xA0\x80", bad + bad + bad},
      {"\xF4\x90\x80\x80", bad + bad + bad + bad},
      {"\xFF\xFE", bad + bad},
      {"\x80", bad},
      {"\xC3\xC3\xA9", bad + "\u00E9"},
      {"\xF1\x80\x80\xE1\x80\xC2"
       "b\x80",
       bad + bad + bad + "b" + bad},
      {"\xEF\xBF", bad},
      {"0123456789abcdef0123456789abcdef\xFF", "0123456789abcdef0123456789abcdef" + bad},
  };
  for (const auto& c : cases) {
    int64_t n = 0;
    EXPECT_EQ(replaced_text(c.bytes, &n), c.text) << testing::PrintToString(c.bytes);
    int64_t expected = 0;
    for (size_t at = c.text.find(bad); at != std::string::npos; at = c.text.find(bad, at + 3)) ++expected;
    EXPECT_EQ(n, expected) << testing::PrintToString(c.bytes);
    EXPECT_EQ(valid_utf8_prefix(c.bytes) == c.bytes.size(), expected == 0);
    EXPECT_EQ(replace_invalid_utf8(c.bytes, nullptr), c.text);
  }
}

TEST(Utf8, EveryCodePointIsReadBack) {
  std::string all;
  for (uint32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    std::string one;
    append_code_point(one, code);
    ASSERT_EQ(valid_utf8_prefix(one), one.size());
    const CodePoint read = read_code_point(one.data());
    ASSERT_EQ(read.value, code);
    ASSERT_EQ(read.bytes, one.size());
    all += one;
  }
  EXPECT_EQ(valid_utf8_prefix(all), all.size());
  EXPECT_EQ(count_characters(all), 0x110000 - 0x800);
}

TEST(Utf8, ThePrefixEndsBeforeTheFirstBadByteWhereverItStands) {
  for (size_t at = 0; at < 40; ++at) {
    std::string text(40, 'x');
    text[at] = '\xC3';
    EXPECT_EQ(valid_utf8_prefix(text), at);
  }
}

TEST(Utf8, CroppingCountsCharacters) {
  const std::string text = "a\u00E9\u20AC\U0001F600z";
  EXPECT_EQ(count_characters(text), 5);
  EXPECT_EQ(first_characters(text, 0), "");
  EXPECT_EQ(first_characters(text, 3), "a\u00E9\u20AC");
  EXPECT_EQ(first_characters(text, 4), "a\u00E9\u20AC\U0001F600");
  EXPECT_EQ(first_characters(text, 5), text);
  EXPECT_EQ(first_characters(text, 1000), text);
}

}  // namespace
}  // namespace flexchat
