// Text to expressions: the form of --score-mod, --mask and of config files.
//
//   --mask       "kv <= q && q - kv < 256"            --mask "causal && window(256)"
//   --score-mod  "score - slope[h]*(q - kv)"          --score-mod "softcap(30)"
//
// Grammar, loosest first; every infix operator groups to the left:
//   or       and { "||" and }                   boolean
//   and      comparison { "&&" comparison }     boolean
//   compare  sum [ ("<" | "<=" | ">" | ">=" | "==" | "!=") sum ]    one comparison, no chains
//   sum      product { ("+" | "-") product }
//   product  unary { ("*" | "/" | "//" | "%") unary }
//   unary    ("-" | "!") unary | primary
//   primary  number | true | false | inf | variable | capture "[" or, ... "]" | function "(" or, ... ")"
//            | named mod (flex/mods.h) | "(" or ")"
// Digits alone are an integer; with '.' or an exponent, a number.
//
// An error is three lines: what is wrong and at which column, the text, and a caret under the place.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "flex/expr.h"

namespace flexchat::flex {

class ParseError : public Error {
 public:
  // `column` counts bytes from 1. `text` is shown with a caret at [column, column + width).
  ParseError(const std::string& message, std::string_view text, size_t column, size_t width);
  size_t column() const { return column_; }

 private:
  size_t column_;
};

// `captures`: the tensors the text may read. Throws ParseError.
Expr parse_expression(std::string_view text, const std::vector<Capture>& captures = {});

// The same, then check_mask / check_score_mod.
Expr parse_mask(std::string_view text, const std::vector<Capture>& captures = {});
Expr parse_score_mod(std::string_view text, const std::vector<Capture>& captures = {});

// "doc[b,pos]": a declaration in the form of Capture::signature(). Throws ParseError.
Capture parse_capture(std::string_view text, Type type = Type::number, bool differentiable = false);

}  // namespace flexchat::flex
