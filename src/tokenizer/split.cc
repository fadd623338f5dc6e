// Names and translation of split patterns, and matching by PCRE2. The scanner is in the header, inlined.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/split.h"

#include <pcre2.h>

#include <array>

#include "base/error.h"

namespace flexchat {

const char* const kNanochatPattern =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";
const char* const kGpt4Pattern =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";

namespace {

struct Named {
  std::string_view name, pattern;
  int max_digits;
};
const std::array<Named, 2>& named_patterns() {
  static const std::array<Named, 2> list = {{{"nanochat", kNanochatPattern, 2}, {"gpt4", kGpt4Pattern, 3}}};
  return list;
}

std::string pcre2_message(int code) {
  PCRE2_UCHAR buffer[256];
  if (pcre2_get_error_message(code, buffer, sizeof buffer) < 0) return "error " + std::to_string(code);
  return reinterpret_cast<const char*>(buffer);
}

// The pattern with \s and \S spelled as the White_Space property (PCRE2's own \s differs in U+180E). Other
// escapes pass only if both engines read them alike.
std::string translate(const std::string& pattern) {
  std::string out;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\') {
      out += pattern[i];
      continue;
    }
    check(i + 1 < pattern.size(), "split pattern '{}' ends in a lone backslash", pattern);
    const char c = pattern[++i];
    if (c == 's' || c == 'S') {
      out += c == 's' ? R"(\p{White_Space})" : R"(\P{White_Space})";
      continue;
    }
    const bool alphanumeric = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    check(!alphanumeric || std::string_view("pPdDrntfx").find(c) != std::string_view::npos,
          "split pattern '{}': the escape \\{} at byte {} is not supported; allowed: \\p \\P \\s \\S \\d \\D "
          "\\r \\n "
          "\\t \\f \\x and escaped punctuation",
          pattern, c, i - 1);
    out += '\\';
    out += c;
  }
  return out;
}

}  // namespace

class Splitter::Regex {
 public:
  explicit Regex(const std::string& pattern) {
    check(valid_utf8_prefix(pattern) == pattern.size(), "the split pattern is not valid UTF-8");
    const std::string translated = translate(pattern);
    const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
        pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int code = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_DOLLAR_ENDONLY | PCRE2_NEVER_BACKSLASH_C, &code,
                              &offset, context.get()));
    check(code_ != nullptr, "split pattern '{}': {} near '{}'", pattern, pcre2_message(code),
          translated.substr(0, offset));
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without a JIT for this CPU the interpreter matches
  }
  const pcre2_code* code() const { return code_.get(); }

 private:
  std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code_{nullptr, &pcre2_code_free};
};

Splitter::Splitter(std::string_view pattern) : pattern_(pattern) {
  check(!pattern.empty(), "the split pattern is empty; give 'nanochat', 'gpt4' or a regular expression");
  for (const Named& named : named_patterns()) {
    if (pattern == named.name || pattern == named.pattern) {
      pattern_ = named.pattern;
      max_digits_ = named.max_digits;
      classes_ = &CharClasses::get();
      return;
    }
  }
  regex_ = std::make_shared<const Regex>(pattern_);
}

Splitter::Search::Search(const Regex& regex, std::string_view text)
    : regex_(regex), text_(text), match_data_(pcre2_match_data_create(1, nullptr)) {
  check(match_data_ != nullptr, "out of memory for a regular expression match");
}

Splitter::Search::~Search() { pcre2_match_data_free(static_cast<pcre2_match_data*>(match_data_)); }

bool Splitter::Search::next(std::string_view& piece) {
  auto* const match_data = static_cast<pcre2_match_data*>(match_data_);
  while (position_ < text_.size()) {
    const auto match = [&](uint32_t options) {
      return pcre2_match(regex_.code(), reinterpret_cast<PCRE2_SPTR>(text_.data()), text_.size(), position_,
                         PCRE2_NO_UTF_CHECK | options, match_data, nullptr);
    };
    int rc = match(0);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
      rc = match(PCRE2_NO_JIT);  // the interpreter keeps its stack on the heap
    if (rc == PCRE2_ERROR_NOMATCH) return false;
    check(rc >= 0, "split pattern: {} at byte {} of a text of {} bytes", pcre2_message(rc), position_,
          text_.size());
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match_data);
    if (range[1] > range[0]) {
      piece = text_.substr(range[0], range[1] - range[0]);
      position_ = range[1];
      return true;
    }
    if (range[0] >= text_.size()) return false;  // empty matches make no pieces
    position_ = range[0] + read_code_point(text_.data() + range[0]).bytes;
  }
  return false;
}

}  // namespace flexchat
