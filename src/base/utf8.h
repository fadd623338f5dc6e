// UTF-8: fast validation, a reader for text known to be valid, counting and cropping by characters, and
// replacement of what is invalid exactly as Python's bytes.decode("utf-8",
// "replace") does. "Character" means code point.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace flexchat {

struct CodePoint {
  uint32_t value;
  uint32_t bytes;  // 1..4
};

// First code point of valid, non-empty UTF-8.
inline CodePoint read_code_point(const char* text) {
  const auto* s = reinterpret_cast<const unsigned char*>(text);
  if (s[0] < 0x80) return {s[0], 1};
  if (s[0] < 0xE0) return {(s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu), 2};
  if (s[0] < 0xF0) return {(s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu), 3};
  return {(s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu), 4};
}

void append_code_point(std::string& out, uint32_t value);  // value <= 0x10FFFF and no surrogate

// Bytes at the start of `text` that are valid UTF-8 (RFC 3629); text.size() when all of it is.
size_t valid_utf8_prefix(std::string_view text);

// `text` with U+FFFD for every maximal invalid subsequence (a truncated character is one replacement, any
// other bad byte is one). Adds the number of replacements to *replaced, which may be null.
std::string replace_invalid_utf8(std::string_view text, int64_t* replaced);

// The same in place; leaves valid text untouched.
void make_valid_utf8(std::string& text, int64_t* replaced);

int64_t count_characters(std::string_view valid_text);

// The first `characters` characters of valid UTF-8; all of it when it has fewer.
std::string_view first_characters(std::string_view valid_text, int64_t characters);

}  // namespace flexchat
