// Splitting text into pieces before byte-pair merging: leftmost matches of a GPT-4 style regular expression.
//
// The two patterns with names run on a hand-written scanner over our own Unicode 16.0 tables. Any other
// pattern runs on PCRE2 (JIT), with \s and \S meaning the White_Space property, "$" only the very end and \d
// \p{..} Unicode, as in the Rust engines the reference tokenizers use; escapes whose meaning differs there
// are refused. Text between matches belongs to no piece and is dropped, as the reference does; the named
// patterns match everything. Pieces are never empty.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tokenizer/char_class.h"
#include "base/utf8.h"

namespace flexchat {

// nanochat's pattern: digits in runs of at most two.
extern const char* const kNanochatPattern;
// The same with digits in runs of at most three, as GPT-4 has them.
extern const char* const kGpt4Pattern;

class Splitter {
 public:
  // "nanochat", "gpt4" or a regular expression. Throws Error saying where a pattern is wrong.
  explicit Splitter(std::string_view pattern);

  const std::string& pattern() const { return pattern_; }  // the regular expression, never the name

  // fn(std::string_view piece) for every piece of valid UTF-8, in order. Pieces are views into `text`.
  // Thread safe. Throws Error if PCRE2 gives up on the text.
  template <class Fn>
  void for_each(std::string_view text, Fn&& fn) const {
    if (max_digits_ > 0) {
      const char* p = text.data();
      const char* const end = p + text.size();
      while (p < end) {
        const char* const next = scan(p, end);
        fn(std::string_view(p, static_cast<size_t>(next - p)));
        p = next;
      }
      return;
    }
    Search search(*regex_, text);
    for (std::string_view piece; search.next(piece);) fn(piece);
  }

 private:
  class Regex;
  class Search {  // one pass of PCRE2 over one text
   public:
    Search(const Regex& regex, std::string_view text);
    ~Search();
    Search(const Search&) = delete;
    Search& operator=(const Search&) = delete;
    bool next(std::string_view& piece);

   private:
    const Regex& regex_;
    std::string_view text_;
    size_t position_ = 0;
    void* match_data_;
  };

  struct Seen {
    CharClass kind;
    uint32_t bytes;
  };
  Seen look(const char* p) const {
    const uint8_t ascii = kAsciiClass[static_cast<unsigned char>(*p)];
    if (ascii != kWide) return {static_cast<CharClass>(ascii), 1};
    const CodePoint c = read_code_point(p);
    return {classes_->wide(c.value), c.bytes};
  }
  const char* skip(const char* p, const char* end, CharClass kind) const;
  const char* scan_white_space(const char* p, const char* end) const;
  const char* scan(const char* p, const char* end) const;

  std::string pattern_;
  int max_digits_ = 0;  // of a named pattern; 0: PCRE2
  const CharClasses* classes_ = nullptr;
  std::shared_ptr<const Regex> regex_;
};

// End of the run of `kind` that starts at p.
inline const char* Splitter::skip(const char* p, const char* end, CharClass kind) const {
  while (p < end) {
    const Seen c = look(p);
    if (c.kind != kind) break;
    p += c.bytes;
  }
  return p;
}

// "\s*[\r\n] | \s+(?!\S) | \s+" at white space: through the last line break of the run; without one, the run
// up to its last character, which goes with what follows; the whole run at the end of the text or if it is
// one character.
inline const char* Splitter::scan_white_space(const char* p, const char* end) const {
  const char* const begin = p;
  const char *after_break = nullptr, *last = p;
  while (p < end) {
    const Seen c = look(p);
    if (c.kind != CharClass::space && c.kind != CharClass::newline) break;
    last = p;
    p += c.bytes;
    if (c.kind == CharClass::newline) after_break = p;
  }
  if (after_break) return after_break;
  return p == end || last == begin ? p : last;
}

// End of the piece that starts at p < end: the alternatives of the pattern in order.
inline const char* Splitter::scan(const char* p, const char* end) const {
  const Seen first = look(p);
  const char* const q = p + first.bytes;
  switch (first.kind) {
    case CharClass::letter:  // [^\r\n\p{L}\p{N}]?+\p{L}+
      return skip(q, end, CharClass::letter);
    case CharClass::number: {  // \p{N}{1,2}
      const char* r = q;
      for (int digits = 1; digits < max_digits_ && r < end; ++digits) {
        const Seen c = look(r);
        if (c.kind != CharClass::number) break;
        r += c.bytes;
      }
      return r;
    }
    case CharClass::newline:
      return scan_white_space(p, end);
    default:
      break;
  }
  if (*p == '\'' && q < end) {  // '(?i:[sdmt]|ll|ve|re); U+017F is a case of s
    const auto lower = [](char c) { return static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c); };
    const char a = lower(*q), b = end - q >= 2 ? lower(q[1]) : '\0';
    if (a == 's' || a == 'd' || a == 'm' || a == 't') return q + 1;
    if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return q + 2;
    if (a == '\xC5' && b == '\xBF') return q + 2;
  }
  const Seen second = q < end ? look(q) : Seen{CharClass::newline, 0};
  if (second.kind == CharClass::letter) return skip(q + second.bytes, end, CharClass::letter);
  const char* r = p;
  if (first.kind == CharClass::other) {  //  ?[^\s\p{L}\p{N}]++[\r\n]*
    r = q;
  } else if (*p == ' ' && second.kind == CharClass::other) {
    r = q + second.bytes;
  } else {
    return scan_white_space(p, end);
  }
  r = skip(r, end, CharClass::other);
  while (r < end && (*r == '\r' || *r == '\n')) ++r;
  return r;
}

}  // namespace flexchat
