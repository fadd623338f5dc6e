// Which masks have a linear form. That the form is right, block_mask_test.cc checks against brute force.
#include "flex/linear_mask.h"

#include <gtest/gtest.h>

#include <vector>

#include "flex/mods.h"
#include "flex/parse.h"
#include "flex/program.h"

namespace flexchat::flex {
namespace {

std::optional<LinearMask> form_of(const Expr& mask) { return linear_mask(mask, Program({mask}).captures); }
std::optional<LinearMask> form_of(const char* text) { return form_of(parse_mask(text, {})); }

// What the mask is over queries q_first..q_last and keys kv_first..kv_last.
Truth truth_of(const char* text, const Box& box) {
  return mask_truth(form_of(text).value(), LinearRow{1, 2, 100, 90}, box, [](const LinearRead&) {
    return IntegerRange{0, 0};
  });
}

TEST(LinearMask, NamedMasksHaveOne) {
  const Capture doc("doc", {Axis::b, Axis::pos}, Type::integer), length("length", {Axis::b}, Type::integer);
  for (const Expr& mask : {causal(), causal() && window(9), causal() && (window(9) || sink(4)), document(doc),
                           prefix_lm(length), padding(length), Expr(true), Expr(false)})
    EXPECT_TRUE(form_of(mask).has_value()) << to_text(mask);
}

TEST(LinearMask, OthersHaveNone) {
  for (const char* text : {"q // 16 == kv // 16", "q % 3 == 0", "q * kv < 100", "q / 2 < kv", "exp(q) < kv"})
    EXPECT_FALSE(form_of(text).has_value()) << text;
  // An index that is more than a variable, and one of queries and keys together.
  const Capture table("table", {Axis::any}, Type::integer), pair("pair", {Axis::q, Axis::kv}, Type::integer);
  const auto v = variables();
  EXPECT_FALSE(form_of(table(v.q - v.kv) == 0).has_value());
  EXPECT_FALSE(form_of(pair(v.q, v.kv) == 0).has_value());
}

TEST(LinearMask, NegationsAndAbsoluteValues) {
  const Box near{10, 12, 9, 11}, far{50, 60, 0, 3};
  EXPECT_EQ(truth_of("!(kv > q + 5)", near), Truth::always);
  EXPECT_EQ(truth_of("!(kv <= q)", far), Truth::never);
  EXPECT_EQ(truth_of("abs(q - kv) <= 3", near), Truth::always);
  EXPECT_EQ(truth_of("abs(q - kv) <= 3", far), Truth::never);
  EXPECT_EQ(truth_of("!(abs(q - kv) <= 3)", far), Truth::always);
  EXPECT_EQ(truth_of("7 < abs(kv - q)", far), Truth::always);
  EXPECT_EQ(truth_of("!(q == 11 && kv != 4)", near), Truth::mixed);
  EXPECT_EQ(truth_of("2 * q - 3 * kv < n_kv + b - h", near), Truth::always);
}

// Distributing || over && must not grow without end.
TEST(LinearMask, ManyTermsHaveNone) {
  const auto v = variables();
  Expr mask = v.q == 0 && v.kv == 0;
  for (int i = 1; i < 40; ++i) mask = mask || (v.q == i && v.kv == i);
  EXPECT_FALSE(form_of(mask).has_value());
  Expr all = v.kv <= v.q;
  for (int i = 0; i < max_mask_clauses; ++i) all = all && v.kv != 3 * i;
  EXPECT_FALSE(form_of(all).has_value());
}

// A shared node is met as often as paths lead to it, and a long sum is a deep one.
TEST(LinearMask, LookingEndsSoon) {
  const auto v = variables();
  Expr shared = v.q + v.kv, sum = v.q;
  for (int i = 0; i < 60; ++i) shared = min(shared, v.q) - (shared - v.kv);
  EXPECT_FALSE(form_of(shared == 0).has_value());
  Expr doubled = v.q - 2 * v.kv + v.b;
  for (int i = 0; i < 60; ++i) doubled = (doubled - v.q) - (v.kv - doubled);
  EXPECT_FALSE(form_of(doubled == 0).has_value());
  for (int i = 0; i < 1000; ++i) sum = sum + (i % 2 == 0 ? v.kv : v.h);
  EXPECT_FALSE(form_of(sum < 0).has_value());
}

TEST(LinearMask, LargeFactorsHaveNone) {
  EXPECT_TRUE(form_of("1000 * q <= 1000 * kv").has_value());
  EXPECT_FALSE(form_of("100000000 * q <= kv").has_value());
}

}  // namespace
}  // namespace flexchat::flex
