// Text to expressions and back; errors that point at their place.
#include "flex/parse.h"

#include <gtest/gtest.h>

#include "base/rng.h"
#include "flex/mods.h"
#include "flex/tensor_text.h"
#include "testing/random_expression.h"

namespace flexchat::flex {
namespace {

const std::vector<Capture>& captures() {
  static const std::vector<Capture> list = {Capture("slope", {Axis::h}),
                                            Capture("doc", {Axis::b, Axis::pos}, Type::integer),
                                            Capture("rel", {Axis::h, Axis::any})};
  return list;
}

TEST(Parse, ReadsWhatTheOperatorsBuild) {
  const auto [score, b, h, q, kv, n_q, n_kv] = variables();
  const Capture &slope = captures()[0], &doc = captures()[1], &rel = captures()[2];
  const std::vector<std::pair<std::string, Expr>> cases = {
      {"score - slope[h]*(q-kv)", score - slope(h) * (q - kv)},
      {"kv<=q && q-kv<256", kv <= q && q - kv < 256},
      {"q >= kv", kv <= q},
      {"1 - 2 - 3", Expr(-4)},
      {"q - kv - b", (q - kv) - b},
      {"q - (kv - b)", q - (kv - b)},
      {"q//4*4 == kv%3", floor_div(q, 4) * 4 == kv % 3},
      {"-q + 1", -q + 1},
      {"- -q", q},
      {"!(q < kv) || b == 0 && h != 1", !(q < kv) || (b == 0 && h != 1)},
      {"doc[b,q]==doc[ b , kv ]", doc(b, q) == doc(b, kv)},
      {"rel[h, max(min(q-kv,4),-4)+4]", rel(h, max(min(q - kv, 4), -4) + 4)},
      {"causal && (window(8) || sink(2))", causal() && (window(8) || sink(2))},
      {"causal() && window(n_kv // 2)", causal() && window(floor_div(n_kv, 2))},
      {"softcap(30.)", softcap(30.0)},
      {"1e3 + .5", Expr(1000.5)},
      {"where(q < kv, -inf, 2E-1*score)",
       where(q < kv, -std::numeric_limits<double>::infinity(), 0.2 * score)},
      {" true ", Expr(true)},
  };
  for (const auto& [text, expected] : cases) {
    const Expr parsed = parse_expression(text, captures());
    EXPECT_TRUE(same(parsed, expected)) << text << " was read as " << to_text(parsed);
  }
}

TEST(Parse, PrintedTextParsesToTheSameGraph) {
  RandomExpressions random(7, captures(), true);
  for (int i = 0; i < 5000; ++i) {
    const int depth = static_cast<int>(random.rng().below(5));
    const Expr e = i % 3 == 0   ? random.boolean(depth)
                   : i % 3 == 1 ? random.number(depth)
                                : random.integer(depth);
    const Expr back = parse_expression(to_text(e), captures());
    ASSERT_TRUE(same(e, back)) << to_text(e) << "\n" << to_text(back);
  }
}

// The first line of the message, then the caret line's column.
void expect_error(const std::string& text, const std::string& message, size_t column) {
  try {
    const Expr parsed = parse_expression(text, captures());
    FAIL() << "'" << text << "' was read as " << to_text(parsed);
  } catch (const ParseError& e) {
    const std::string what = e.what();
    EXPECT_NE(what.substr(0, what.find('\n')).find(message), std::string::npos) << what;
    EXPECT_EQ(e.column(), column) << what;
    const std::string caret_line = what.substr(what.rfind('\n') + 1);
    EXPECT_EQ(caret_line.find('^'), column + 1) << what;  // indented by two
  }
}

TEST(Parse, PointsAtMistakes) {
  expect_error("", "the expression is empty", 1);
  expect_error("kvv <= q", "unknown name 'kvv' (did you mean 'kv'?)", 1);
  expect_error("score - slop[h]", "unknown name 'slop' (did you mean 'slope'?)", 9);
  expect_error("tan(score)", "unknown function 'tan' (did you mean 'tanh'?)", 1);
  expect_error("score + ", "the text ends where a value should follow", 9);
  expect_error("(q - kv", "'(' is never closed by ')'", 1);
  expect_error("min(q, kv", "'(' is never closed by ')'", 4);
  expect_error("doc[b,q", "'[' is never closed by ']'", 4);
  expect_error("q - kv)", "unexpected ')'", 7);
  expect_error("(q - kv]", "unexpected ']'", 8);
  expect_error("q & kv", "unexpected '&' (did you mean &&?)", 3);
  expect_error("q = kv", "unexpected '=' (did you mean ==?)", 3);
  expect_error("q<1 and kv<2", "unexpected 'and' (did you mean &&?)", 5);
  expect_error("not q<1", "unexpected 'not' (did you mean !?)", 1);
  expect_error("q ** 2", "unexpected '**' (did you mean pow(x, y)?)", 3);
  expect_error("0 <= q < 3", "comparisons do not chain", 8);
  expect_error("q && kv < 1", "'&&' needs booleans, but its left side `q` is an integer", 3);
  expect_error("1 + (q < kv)", "'+' needs numbers, but its right side `q < kv` is a boolean", 3);
  expect_error("min(q)", "'min' takes 2 arguments, not 1", 1);
  expect_error("exp", "'exp' is a function; write exp(...)", 1);
  expect_error("slope + 1", "'slope' is a captured tensor; write slope[h]", 1);
  expect_error("score + slope[q]", "index 1 of slope[h] must be h, not `q`", 9);
  expect_error("window", "'window' takes 1 argument, not 0", 1);
  expect_error("2q", "'q' follows a number; write 2*q", 2);
  expect_error("99999999999", "does not fit 32 bits", 1);
  expect_error("1e999", "is not a number a double can hold", 1);
  expect_error("q // 0", "'//' divides by zero", 3);
  expect_error("q $ 1", "unexpected '$'", 3);
  expect_error("q \xc3\x97 2", "unexpected byte 0xc3", 3);
  expect_error(std::string(300, '(') + "q" + std::string(300, ')'), "nested more than 200 levels deep", 201);
  expect_error(std::string(300, '-') + "q", "nested more than 200 levels deep", 200);
}

TEST(Parse, ChecksTheWholeMod) {
  EXPECT_THROW(parse_mask("score < 1"), ParseError);
  EXPECT_THROW(parse_mask("q - kv"), ParseError);
  EXPECT_THROW(parse_score_mod("kv <= q"), ParseError);
  EXPECT_EQ(to_text(parse_score_mod("q - kv")), "q - kv");
}

TEST(Parse, SurvivesGarbage) {
  const std::string alphabet = "q kv()[]+-*/%<>=!&|,.0123456789eslopedocb\n\xff";
  Rng rng(3);
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (uint64_t n = rng.below(24); n > 0; --n) text += alphabet[rng.below(alphabet.size())];
    try {
      const Expr e = parse_expression(text, captures());
      EXPECT_TRUE(same(e, parse_expression(to_text(e), captures()))) << text;
    } catch (const ParseError&) {
      continue;
    }
  }
}

TEST(TensorText, DeclaresAndFills) {
  const Extent extent{.n_batch = 2, .n_head = 3, .n_q = 4, .n_kv = 6};
  Bindings bindings;
  const Capture doc = bind_tensor_text("doc[b,pos]=0*4,1*2,5*6", extent, bindings);
  EXPECT_EQ(doc.type(), Type::integer);
  EXPECT_EQ(bindings.at(doc).shape(), (Shape{2, 6}));
  EXPECT_EQ(bindings.at(doc).get(5), 1);
  const Capture rel = bind_tensor_text("rel[h,any]=0.5*6", extent, bindings);
  EXPECT_EQ(rel.type(), Type::number);
  EXPECT_EQ(bindings.at(rel).shape(), (Shape{3, 2}));
  for (const char* const bad : {"doc", "doc[b]=", "doc[b]=1,x", "doc[b]=1*2*3", "doc[b]=1", "doc[b,z]=1",
                                "doc[=1", "doc[any,any]=1", "doc[h]=1*-1", "doc[h]=1*99999999999"}) {
    EXPECT_THROW(bind_tensor_text(bad, extent, bindings), Error) << bad;
  }
}

}  // namespace
}  // namespace flexchat::flex
