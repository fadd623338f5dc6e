// Validation goes 16 ASCII bytes at a time; everything else one sequence at a time by RFC 3629.
#include "base/utf8.h"

#include <cstring>

namespace flexchat {
namespace {

struct Sequence {
  size_t bytes;  // of the character, or of the invalid subsequence that one replacement stands for
  bool valid;
};

// What stands at text[i]. A lead byte fixes the length and the range of the second byte (RFC 3629 table 3-7),
// which excludes overlong forms, surrogates and values above U+10FFFF.
Sequence sequence_at(std::string_view text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return {1, true};
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t k = 1; k < length; ++k) {
    const bool second = k == 1;
    if (i + k >= text.size() || byte(i + k) < (second ? low : 0x80) || byte(i + k) > (second ? high : 0xBF)) {
      return {k, false};
    }
  }
  return {length, true};
}

}  // namespace

void append_code_point(std::string& out, uint32_t value) {
  const auto push = [&](uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (value < 0x80) {
    push(value);
  } else if (value < 0x800) {
    push(0xC0u | value >> 6);
    push(0x80u | (value & 0x3Fu));
  } else if (value < 0x10000) {
    push(0xE0u | value >> 12);
    push(0x80u | (value >> 6 & 0x3Fu));
    push(0x80u | (value & 0x3Fu));
  } else {
    push(0xF0u | value >> 18);
    push(0x80u | (value >> 12 & 0x3Fu));
    push(0x80u | (value >> 6 & 0x3Fu));
    push(0x80u | (value & 0x3Fu));
  }
}

size_t valid_utf8_prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    while (i + 16 <= text.size()) {  // most text is ASCII
      uint64_t words[2];
      std::memcpy(words, text.data() + i, 16);
      if ((words[0] | words[1]) & 0x8080808080808080u) break;
      i += 16;
    }
    if (i >= text.size()) break;
    const Sequence s = sequence_at(text, i);
    if (!s.valid) return i;
    i += s.bytes;
  }
  return text.size();
}

std::string replace_invalid_utf8(std::string_view text, int64_t* replaced) {
  std::string out;
  out.reserve(text.size());
  for (;;) {
    const size_t good = valid_utf8_prefix(text);
    out.append(text.substr(0, good));
    if (good == text.size()) return out;
    out += "\xEF\xBF\xBD";
    if (replaced) ++*replaced;
    text.remove_prefix(good + sequence_at(text, good).bytes);
  }
}

void make_valid_utf8(std::string& text, int64_t* replaced) {
  if (valid_utf8_prefix(text) != text.size()) text = replace_invalid_utf8(text, replaced);
}

int64_t count_characters(std::string_view valid_text) {
  int64_t n = 0;
  for (const char c : valid_text) n += static_cast<signed char>(c) >= -64 ? 1 : 0;  // not 10xxxxxx
  return n;
}

std::string_view first_characters(std::string_view valid_text, int64_t characters) {
  if (static_cast<int64_t>(valid_text.size()) <= characters) return valid_text;
  size_t i = 0;
  for (; characters > 0 && i < valid_text.size(); --characters)
    i += read_code_point(valid_text.data() + i).bytes;
  return valid_text.substr(0, i);
}

}  // namespace flexchat
