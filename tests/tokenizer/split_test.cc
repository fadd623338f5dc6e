// Splitting: known cases, the scanner against PCRE2, the character tables, other patterns.
#include "tokenizer/split.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/error.h"
#include "support/temp_folder.h"
#include "tokenizer/reference.h"

namespace flexchat {
namespace {

using Pieces = std::vector<std::string>;

Pieces split(const Splitter& splitter, std::string_view text) {
  Pieces pieces;
  splitter.for_each(text, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}

// The same expression, but unknown by name: it runs on PCRE2.
Splitter by_pcre2(const char* pattern) { return Splitter("(?:" + std::string(pattern) + ")"); }

TEST(Split, KnownTexts) {
  const Splitter s("nanochat");
  EXPECT_EQ(s.pattern(), kNanochatPattern);
  EXPECT_EQ(split(s, ""), Pieces{});
  EXPECT_EQ(split(s, "Hello world!"), (Pieces{"Hello", " world", "!"}));
  EXPECT_EQ(split(s, "I'm IT'S we'll 'Re"), (Pieces{"I", "'m", " IT", "'S", " we", "'ll", " '", "Re"}));
  EXPECT_EQ(split(s, "don't'sx"), (Pieces{"don", "'t", "'s", "x"}));
  EXPECT_EQ(split(s, "a'\u017Fb"), (Pieces{"a", "'\u017F", "b"}));
  EXPECT_EQ(split(s, "12345 3.14"), (Pieces{"12", "34", "5", " ", "3", ".", "14"}));
  EXPECT_EQ(split(s, "a  b   c"), (Pieces{"a", " ", " b", "  ", " c"}));
  EXPECT_EQ(split(s, "x \n\n  y"), (Pieces{"x", " \n\n", " ", " y"}));
  EXPECT_EQ(split(s, "end   "), (Pieces{"end", "   "}));
  EXPECT_EQ(split(s, " ..\r\n\r\nnext"), (Pieces{" ..\r\n\r\n", "next"}));
  EXPECT_EQ(split(s, "\tx(y)"), (Pieces{"\tx", "(y", ")"}));
  EXPECT_EQ(split(s, "\u4F60\u597D\uFF0C1"), (Pieces{"\u4F60\u597D", "\uFF0C", "1"}));
  EXPECT_EQ(split(Splitter("gpt4"), "12345"), (Pieces{"123", "45"}));
}

TEST(Split, WhiteSpaceIsTheUnicodeProperty) {
  const Splitter s("nanochat");
  for (const char* space :
       {"\u0085", "\u00A0", "\u1680", "\u2000", "\u2028", "\u202F", "\u205F", "\u3000", "\v"}) {
    EXPECT_EQ(split(s, std::string(space) + space + "1"), (Pieces{space, space, "1"})) << space;
  }
  for (const char* other : {"\u180E", "\u200B", "\x1C", "\x1F", "\uFEFF"}) {
    EXPECT_EQ(split(s, std::string(other) + other + "1"), (Pieces{std::string(other) + other, "1"}));
  }
}

TEST(Split, TablesAgreeWithPcre2OnEveryAssignedCharacter) {
  std::string all;
  for (uint32_t code = 0; code < 0x110000; ++code) {
    if (code < 0xD800 || code >= 0xE000) append_code_point(all, code);
  }
  const auto mark = [&](const char* pattern, uint8_t value, std::vector<uint8_t>& out) {
    Splitter(pattern).for_each(
        all, [&](std::string_view piece) { out[read_code_point(piece.data()).value] = value; });
  };
  std::vector<uint8_t> expected(0x110000), unassigned(0x110000);
  mark(R"(\p{L})", 1, expected);
  mark(R"(\p{N})", 2, expected);
  mark(R"(\s)", 3, expected);
  mark(R"(\p{Cn})", 1, unassigned);
  int counts[4] = {};
  for (uint32_t code = 0; code < 0x110000; ++code) {
    const auto ours = static_cast<uint8_t>(CharClasses::get().wide(code));
    ++counts[ours];
    if (ours == expected[code]) continue;
    // One of the two Unicode versions does not know the character yet.
    EXPECT_TRUE(unassigned[code] || ours == 0) << std::hex << code;
  }
  EXPECT_EQ(counts[1], 141028);  // letters, numbers and white space of Unicode 16.0
  EXPECT_EQ(counts[2], 1911);
  EXPECT_EQ(counts[3], 25);
}

TEST(Split, ScannerEqualsPcre2) {
  for (const char* pattern : {kNanochatPattern, kGpt4Pattern}) {
    const Splitter scanner(pattern), pcre2 = by_pcre2(pattern);
    Rng rng(7);
    for (int i = 0; i < 20000; ++i) {
      const std::string text = reference::random_text(rng, rng.below(16));
      ASSERT_EQ(split(scanner, text), split(pcre2, text)) << testing::PrintToString(text);
    }
    const std::string big = reference::random_text(rng, 20000);
    EXPECT_EQ(split(scanner, big), split(pcre2, big));
  }
}

TEST(Split, LongRunsNeedNoStack) {
  for (const char* run : {"a", " ", "\n", "!", "1", "\u4F60"}) {
    std::string text;
    for (int i = 0; i < 100000; ++i) text += run;
    text += "x";
    EXPECT_EQ(split(Splitter("nanochat"), text), split(by_pcre2(kNanochatPattern), text)) << run;
  }
}

TEST(Split, OtherPatterns) {
  // Text between matches is in no piece; empty matches make none.
  EXPECT_EQ(split(Splitter(R"(\p{L}+)"), "ab 12 \u00E9t\u00E9."), (Pieces{"ab", "\u00E9t\u00E9"}));
  EXPECT_EQ(split(Splitter("x*"), "\u00E9xx\u00E9x"), (Pieces{"xx", "x"}));
  EXPECT_EQ(split(Splitter(R"(\S+$)"), "a b\n"), Pieces{});  // $ is only the very end
  EXPECT_EQ(split(Splitter(R"([^\S]+)"), "a\u180E \v"), (Pieces{" \v"}));
  EXPECT_EQ(split(Splitter(R"('s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"), "it's 2024  ok"),
            (Pieces{"it", "'s", " 2024", " ", " ok"}));
}

TEST(Split, BadPatternsAreNamed) {
  const auto error = [](const std::string& pattern) {
    return message_of<Error>([&] { Splitter s(pattern); });
  };
  EXPECT_NE(error("").find("empty"), std::string::npos);
  EXPECT_NE(error("(a").find("'(a'"), std::string::npos);
  EXPECT_NE(error(R"(a\w+)").find("\\w at byte 1"), std::string::npos);
  EXPECT_NE(error("a\\").find("lone backslash"), std::string::npos);
  EXPECT_NE(error("\xFF").find("UTF-8"), std::string::npos);
  EXPECT_NE(error(R"(\p{Nope})").find("Nope"), std::string::npos);
}

}  // namespace
}  // namespace flexchat
