// The two-bit table is filled once, from ranges.
#include "tokenizer/char_class.h"

namespace flexchat {
namespace {

struct CodeRange {
  uint32_t first, last;  // inclusive
};
#include "tokenizer/unicode_classes.inc"

// The White_Space property; unchanged since Unicode 6.3.
constexpr CodeRange kSpaceRanges[] = {{0x09, 0x0D},     {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},
                                      {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F},
                                      {0x205F, 0x205F}, {0x3000, 0x3000}};

}  // namespace

CharClasses::CharClasses() {
  const auto mark = [&](const auto& ranges, CharClass value) {
    for (const CodeRange& range : ranges) {
      for (uint32_t code = range.first; code <= range.last; ++code) {
        packed_[code / 4] |= static_cast<uint8_t>(static_cast<unsigned>(value) << (code % 4 * 2));
      }
    }
  };
  mark(kLetterRanges, CharClass::letter);
  mark(kNumberRanges, CharClass::number);
  mark(kSpaceRanges, CharClass::space);
}

const CharClasses& CharClasses::get() {
  static const CharClasses classes;
  return classes;
}

}  // namespace flexchat
