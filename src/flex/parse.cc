// A recursive-descent parser. It builds nodes as it goes, so a type error is reported at the operator it
// belongs to.
#include "flex/parse.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <optional>

#include "base/strings.h"
#include "flex/language.h"
#include "flex/mods.h"

namespace flexchat::flex {
namespace {

constexpr size_t max_text = 65536;
constexpr int max_nesting = 200;

struct Token {
  enum Kind { number, name, symbol, end } kind;
  std::string_view text;
  size_t at;  // byte offset in the source
};

bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }
bool is_name_start(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// What a newcomer may have meant by a symbol or word of another language.
std::string_view meant_by(std::string_view word) {
  constexpr std::array<std::array<std::string_view, 2>, 8> table = {{{"&", "&&"},
                                                                     {"|", "||"},
                                                                     {"=", "=="},
                                                                     {"^", "pow(x, y)"},
                                                                     {"**", "pow(x, y)"},
                                                                     {"and", "&&"},
                                                                     {"or", "||"},
                                                                     {"not", "!"}}};
  for (const auto& [foreign, ours] : table) {
    if (word == foreign) return ours;
  }
  return {};
}

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> tokens() {
    std::vector<Token> result;
    while (true) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (at_ == text_.size()) break;
      const size_t begin = at_;
      const Token::Kind kind = scan();
      result.push_back({kind, text_.substr(begin, at_ - begin), begin});
    }
    result.push_back({Token::end, {}, text_.size()});
    return result;
  }

 private:
  char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }
  void skip_digits() {
    while (is_digit(peek())) ++at_;
  }

  Token::Kind scan() {
    if (is_name_start(peek())) {
      while (is_name_start(peek()) || is_digit(peek())) ++at_;
      return Token::name;
    }
    if (is_digit(peek()) || (peek() == '.' && is_digit(peek(1)))) {
      scan_number();
      return Token::number;
    }
    for (const std::string_view symbol : {"<=", ">=", "==", "!=", "&&", "||", "//", "**"}) {
      if (text_.substr(at_, 2) == symbol) {
        at_ += 2;
        return Token::symbol;
      }
    }
    if (std::string_view("+-*/%<>!()[],&|=^").find(peek()) == std::string_view::npos) {
      const auto byte = static_cast<unsigned char>(peek());
      const std::string shown =
          byte >= 32 && byte < 127 ? fmt::format("'{}'", peek()) : fmt::format("byte 0x{:02x}", byte);
      throw ParseError(fmt::format("unexpected {}", shown), text_, at_ + 1, 1);
    }
    ++at_;
    return Token::symbol;
  }

  void scan_number() {
    skip_digits();
    if (peek() == '.') {
      ++at_;
      skip_digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      const size_t sign = peek(1) == '+' || peek(1) == '-' ? 1 : 0;
      if (is_digit(peek(1 + sign))) {
        at_ += 1 + sign;
        skip_digits();
      }
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

class Parser {
 public:
  Parser(std::string_view text, const std::vector<Capture>& captures) : text_(text), captures_(captures) {
    check(text.size() <= max_text, "an expression may be {} bytes long, not {}", max_text, text.size());
    tokens_ = Lexer(text).tokens();
  }

  Expr whole() {
    if (now().kind == Token::end) error(now(), "the expression is empty");
    Expr result = expression();
    if (now().kind != Token::end) unexpected("an operator or the end");
    return result;
  }

  Capture declaration(Type type, bool differentiable) {
    const Token name = now();
    if (name.kind != Token::name) unexpected("a name, as in doc[b,pos]");
    ++next_;
    expect("[", "after the tensor's name, as in doc[b,pos]");
    std::vector<Axis> axes;
    do {
      const std::optional<Axis> axis = find_axis(now().text);
      if (!axis)
        error(now(),
              fmt::format(
                  "unknown axis '{}'; an axis is b, h, q, kv, pos (q or kv) or any (an integer expression)",
                  now().text));
      axes.push_back(*axis);
      ++next_;
    } while (accept(","));
    expect("]", "after the axes");
    if (now().kind != Token::end) unexpected("the end");
    return located(name, [&] { return Capture(std::string(name.text), axes, type, differentiable); });
  }

 private:
  const Token& now() const { return tokens_[next_]; }
  bool is_symbol(std::string_view symbol) const {
    return now().kind == Token::symbol && now().text == symbol;
  }
  bool accept(std::string_view symbol) {
    if (!is_symbol(symbol)) return false;
    ++next_;
    return true;
  }

  [[noreturn]] void error(const Token& token, const std::string& message) const {
    throw ParseError(message, text_, token.at + 1, token.text.size());
  }
  [[noreturn]] void unexpected(std::string_view wanted) const {
    if (now().kind == Token::end) error(now(), fmt::format("the text ends where {} should follow", wanted));
    const std::string_view meant = meant_by(now().text);
    if (!meant.empty()) error(now(), fmt::format("unexpected '{}' (did you mean {}?)", now().text, meant));
    error(now(), fmt::format("unexpected '{}' where {} should follow", now().text, wanted));
  }
  void expect(std::string_view symbol, std::string_view where) {
    if (accept(symbol)) return;
    unexpected(fmt::format("'{}' {}", symbol, where));
  }
  // Runs a builder; what it rejects is reported at `token`.
  template <class Build>
  auto located(const Token& token, const Build& build) const -> decltype(build()) {
    try {
      return build();
    } catch (const ParseError&) {
      throw;
    } catch (const Error& e) {
      error(token, e.what());
    }
  }

  Expr expression() {
    if (++nesting_ > max_nesting) error(now(), fmt::format("nested more than {} levels deep", max_nesting));
    Expr result = infix(op_precedence(Op::logical_or));
    --nesting_;
    return result;
  }

  // Operands joined by operators of exactly this precedence; tighter ones belong to the operands.
  Expr infix(int precedence) {
    if (precedence == unary_precedence) return unary();
    Expr left = infix(precedence + 1);
    int comparisons = 0;
    while (now().kind == Token::symbol) {
      const Token token = now();
      const bool swapped = token.text == ">" || token.text == ">=";
      const std::optional<Op> op = swapped ? (token.text == ">" ? Op::lt : Op::le) : find_infix(token.text);
      if (!op || op_precedence(*op) != precedence) break;
      if (precedence == op_precedence(Op::lt) && ++comparisons > 1) {
        error(token, "comparisons do not chain; write a < b && b < c");
      }
      ++next_;
      const Expr right = infix(precedence + 1);
      left = located(token, [&] { return swapped ? make(*op, {right, left}) : make(*op, {left, right}); });
    }
    return left;
  }

  Expr unary() {
    const Token token = now();
    if (!is_symbol("-") && !is_symbol("!")) return primary();
    ++next_;
    if (++nesting_ > max_nesting) error(token, fmt::format("nested more than {} levels deep", max_nesting));
    const Expr operand = unary();
    --nesting_;
    return located(token, [&] { return make(token.text == "-" ? Op::neg : Op::logical_not, {operand}); });
  }

  Expr primary() {
    const Token token = now();
    if (token.kind == Token::number) return number();
    if (token.kind == Token::name) return name();
    if (accept("(")) {
      Expr inside = expression();
      if (!is_symbol(")")) unclosed(token, ")");
      ++next_;
      return inside;
    }
    unexpected("a value");
  }

  Expr number() {
    const Token token = now();
    ++next_;
    double value = 0;
    const char* const end = token.text.data() + token.text.size();
    const auto [stop, code] = std::from_chars(token.text.data(), end, value);
    if (code != std::errc() || stop != end)
      error(token, fmt::format("'{}' is not a number a double can hold", token.text));
    if (now().kind == Token::name && now().at == token.at + token.text.size()) {
      error(now(), fmt::format("'{}' follows a number; write {}*{}", now().text, token.text, now().text));
    }
    const bool integer = std::all_of(token.text.begin(), token.text.end(), is_digit);
    return located(token, [&] {
      check(!integer || value <= 2147483647, "the integer {} does not fit 32 bits; write {}.0", token.text,
            token.text);
      return integer ? Expr(static_cast<int64_t>(value)) : Expr(value);
    });
  }

  Expr name() {
    const Token token = now();
    ++next_;
    if (token.text == "true" || token.text == "false") return Expr(token.text == "true");
    if (token.text == "inf") return Expr(std::numeric_limits<double>::infinity());
    if (const auto var = find_variable(token.text)) return Expr::variable(*var);
    for (const Capture& capture : captures_) {
      if (capture.name() == token.text) return access(token, capture);
    }
    if (const auto op = find_function(token.text)) {
      if (!is_symbol("("))
        error(token, fmt::format("'{}' is a function; write {}(...)", token.text, token.text));
      std::vector<Expr> args = list("(", ")");
      return located(token, [&] { return make(*op, std::move(args)); });
    }
    if (is_named_mod(token.text)) {
      std::vector<Expr> args;
      if (is_symbol("(")) args = list("(", ")");
      return located(token, [&] { return make_named_mod(token.text, args); });
    }
    unknown_name(token);
  }

  Expr access(const Token& token, const Capture& capture) {
    if (!is_symbol("[")) {
      error(token, fmt::format("'{}' is a captured tensor; write {}", token.text, capture.signature()));
    }
    std::vector<Expr> index = list("[", "]");
    return located(token, [&] { return capture.at(std::move(index)); });
  }

  // The comma-separated expressions between `open`, where the parser stands, and `close`.
  std::vector<Expr> list(std::string_view open, std::string_view close) {
    const Token begin = now();
    expect(open, "here");
    std::vector<Expr> items;
    if (accept(close)) return items;
    do items.push_back(expression());
    while (accept(","));
    if (!accept(close)) unclosed(begin, close);
    return items;
  }

  [[noreturn]] void unclosed(const Token& open, std::string_view close) const {
    if (now().kind != Token::end) unexpected(fmt::format("an operator or '{}'", close));
    error(open, fmt::format("'{}' is never closed by '{}'", open.text, close));
  }

  [[noreturn]] void unknown_name(const Token& token) const {
    const std::string_view meant = meant_by(token.text);
    if (!meant.empty()) error(token, fmt::format("unexpected '{}' (did you mean {}?)", token.text, meant));
    std::vector<std::string> known = variable_names(), tensors;
    for (const Capture& capture : captures_) {
      known.push_back(capture.name());
      tensors.push_back(capture.signature());
    }
    std::string message;
    if (is_symbol("(")) {
      std::vector<std::string> functions = function_names();
      for (const std::string& mod : named_mod_names()) functions.push_back(mod);
      message = fmt::format("unknown function '{}'{}; there are {}", token.text,
                            did_you_mean(token.text, functions), join(functions));
    } else {
      for (const std::string& mod : named_mod_names()) known.push_back(mod);
      message =
          fmt::format("unknown name '{}'{}; variables are {}; {}", token.text,
                      did_you_mean(token.text, known), join(variable_names()),
                      tensors.empty() ? "no tensor is captured" : "captured tensors are " + join(tensors));
    }
    error(token, message);
  }

  std::string_view text_;
  const std::vector<Capture>& captures_;
  std::vector<Token> tokens_;
  size_t next_ = 0;
  int nesting_ = 0;
};

// A check of the whole expression points at all of it.
template <class Check>
Expr checked(std::string_view text, const Expr& expr, const Check& check_expression) {
  try {
    check_expression(expr);
  } catch (const Error& e) {
    const size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n") + 1;
    throw ParseError(e.what(), text, begin + 1, end - begin);
  }
  return expr;
}

std::string located_message(const std::string& message, std::string_view text, size_t column, size_t width) {
  // One line of output per line: control characters would move the caret away from its place.
  std::string shown(text);
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 32) c = ' ';
  }
  return fmt::format("{} (column {})\n  {}\n  {}^{}", message, column, shown, std::string(column - 1, ' '),
                     std::string(width > 1 ? width - 1 : 0, '~'));
}

}  // namespace

ParseError::ParseError(const std::string& message, std::string_view text, size_t column, size_t width)
    : Error(located_message(message, text, column, width)), column_(column) {}

Expr parse_expression(std::string_view text, const std::vector<Capture>& captures) {
  return Parser(text, captures).whole();
}

Expr parse_mask(std::string_view text, const std::vector<Capture>& captures) {
  return checked(text, parse_expression(text, captures), check_mask);
}

Expr parse_score_mod(std::string_view text, const std::vector<Capture>& captures) {
  return checked(text, parse_expression(text, captures), check_score_mod);
}

Capture parse_capture(std::string_view text, Type type, bool differentiable) {
  const std::vector<Capture> none;
  return Parser(text, none).declaration(type, differentiable);
}

}  // namespace flexchat::flex
