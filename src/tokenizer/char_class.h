// What the split patterns ask of a character: letter (\p{L}), number (\p{N}), white space (\s) or none of
// these, for every code point, by Unicode 16.0.
//
// The tables are our own because ids must not depend on the Unicode version of an installed library, and
// because a lookup is several times faster than a regular expression engine.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace flexchat {

// `newline` is "\r" and "\n"; `space` is all other White_Space.
enum class CharClass : uint8_t { other = 0, letter = 1, number = 2, space = 3, newline = 4 };

class CharClasses {
 public:
  static const CharClasses& get();

  // Any code point from U+0080 on.
  CharClass wide(uint32_t code) const {
    return static_cast<CharClass>(packed_[code / 4] >> (code % 4 * 2) & 3);
  }

 private:
  CharClasses();
  std::array<uint8_t, 0x110000 / 4> packed_{};  // two bits a code point
};

// Class of an ASCII character; 0xFF for the lead bytes of longer ones.
constexpr uint8_t kWide = 0xFF;
constexpr std::array<uint8_t, 256> kAsciiClass = [] {
  std::array<uint8_t, 256> table{};
  const auto set = [&](int first, int last, uint8_t value) {
    for (int c = first; c <= last; ++c) table[static_cast<size_t>(c)] = value;
  };
  set('A', 'Z', static_cast<uint8_t>(CharClass::letter));
  set('a', 'z', static_cast<uint8_t>(CharClass::letter));
  set('0', '9', static_cast<uint8_t>(CharClass::number));
  set('\t', '\r', static_cast<uint8_t>(CharClass::space));
  set(' ', ' ', static_cast<uint8_t>(CharClass::space));
  set('\n', '\n', static_cast<uint8_t>(CharClass::newline));
  set('\r', '\r', static_cast<uint8_t>(CharClass::newline));
  set(0x80, 0xFF, kWide);
  return table;
}();

}  // namespace flexchat
