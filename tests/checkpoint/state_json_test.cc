// Strict JSON, exact numbers, and errors that name the key.
#include "checkpoint/state_json.h"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

std::string error_of(const std::string& text) {
  return message_of<Error>([&] { parse_state_json(text, "state.json"); });
}

TEST(StateJson, NumbersSurviveExactly) {
  Json state = Json::object();
  state["word"] = std::numeric_limits<uint64_t>::max();
  state["low"] = std::numeric_limits<int64_t>::min();
  const std::vector<double> values = {
      0.1, 1.0, -0.0, 1e-308, 5e-324, 1.7976931348623157e308, 2.0 / 3.0, 12345678901234567.0};
  state["values"] = values;
  state["nested"] = {{"text", "a\"b\n\u00fc"}, {"none", nullptr}, {"flag", true}};
  const Json back = parse_state_json(dump_state_json(state, "state.json"), "state.json");
  EXPECT_EQ(back, state);
  for (size_t i = 0; i < values.size(); ++i) {
    const double got = back["values"][i].get<double>();
    EXPECT_EQ(std::memcmp(&got, &values[i], 8), 0) << values[i];
  }
}

TEST(StateJson, BadTextIsNamed) {
  EXPECT_NE(error_of("").find("state.json: not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("{\"a\": }").find("near byte 7"), std::string::npos);
  EXPECT_NE(error_of("{} x").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("[1]").find("must hold a JSON object, not array"), std::string::npos);
  EXPECT_NE(error_of("null").find("must hold a JSON object"), std::string::npos);
  EXPECT_NE(error_of("{\"a\": 1e999}").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("{\"a\": \"\xff\"}").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of(std::string("{}\0{}", 5)).find("zero byte"), std::string::npos);
  EXPECT_NE(error_of("{\"a\": {\"b\": 1, \"b\": 2}}").find("'b' appears twice"), std::string::npos);
  EXPECT_EQ(error_of("{\"a\": {\"b\": 1}, \"c\": {\"b\": 2}}"), "");
  EXPECT_NE(error_of("{\"a\":" + std::string(100000, '[')).find("nested deeper"), std::string::npos);
}

TEST(StateJson, WhatJsonCannotHoldIsRefusedWhenWriting) {
  const Json inf = {{"loop", {{"best", {1.0, std::numeric_limits<double>::infinity()}}}}};
  EXPECT_EQ(message_of<RunError>([&] { dump_state_json(inf, "state.json"); }),
            "cannot write state.json: 'loop.best[1]' is inf, which JSON cannot hold");
  const Json nan = {{"x", std::numeric_limits<double>::quiet_NaN()}};
  EXPECT_THROW(dump_state_json(nan, "state.json"), RunError);
  const Json bytes = {{"x", "\xff"}};
  EXPECT_THROW(dump_state_json(bytes, "state.json"), RunError);
}

TEST(StateReader, ReadsTypedValues) {
  const Json state = parse_state_json(
      R"({"step": 12, "rng": 18446744073709551615, "loss": 2, "done": false, "name": "x", "data": {"file": -3}})",
      "s");
  const StateReader r(state, "s");
  EXPECT_EQ(r.integer("step"), 12);
  EXPECT_EQ(r.word("rng"), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(r.number("loss"), 2.0);
  EXPECT_FALSE(r.flag("done"));
  EXPECT_EQ(r.text("name"), "x");
  EXPECT_EQ(r.object("data").integer("file"), -3);
  EXPECT_TRUE(r.contains("data"));
  EXPECT_FALSE(r.contains("date"));
  const Json built = {{"count", 5}};  // a signed number, as programs write it
  EXPECT_EQ(StateReader(built, "s").word("count"), 5u);
}

TEST(StateReader, ErrorsNameFileAndKey) {
  const Json state = parse_state_json(
      R"({"step": "12", "rng": 18446744073709551615, "data": {"position": 1.5}, "list": []})", "s");
  const StateReader r(state, "s");
  EXPECT_EQ(message_of<Error>([&] { r.integer("step"); }), "s: 'step' must be a 64-bit integer, not \"12\"");
  EXPECT_THROW(r.integer("rng"), Error);
  EXPECT_EQ(message_of<Error>([&] { r.object("data").integer("position"); }),
            "s: 'data.position' must be a 64-bit integer, not 1.5");
  EXPECT_EQ(message_of<Error>([&] { r.object("data").integer("positon"); }),
            "s: 'data.positon' is missing (did you mean 'position'?)");
  EXPECT_EQ(message_of<Error>([&] { r.object("list"); }), "s: 'list' must be an object, not array");
  EXPECT_EQ(message_of<Error>([&] { r.text("list"); }), "s: 'list' must be a string, not array");
  const Json odd = {{"a\nb", {{"c\nd", 1}}}};
  EXPECT_EQ(message_of<Error>([&] { StateReader(odd, "s").object("a\nb").text("c\nd"); }),
            "s: 'a\\x0ab.c\\x0ad' must be a string, not 1");  // an error is one line
  EXPECT_THROW(r.flag("step"), Error);
  EXPECT_THROW(r.number("step"), Error);
  EXPECT_THROW(r.word("step"), Error);
}

}  // namespace
}  // namespace flexchat
