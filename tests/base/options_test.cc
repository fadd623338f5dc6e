// Options: parsing, errors that name the nearest known name, JSON both ways, help.
#include "base/options.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace flexchat {
namespace {

using Words = std::vector<std::string>;

struct Sample {
  int64_t depth = 4;
  double rate = 0.02;
  std::string arch = "classic", prompt;
  bool smear = true, quick = false;
  std::vector<std::string> data, stop = {"a", "b"}, files;
  std::optional<int64_t> seed;
  std::optional<double> clip;
  std::optional<std::string> dtype;
  std::string out = "runs";
  Options o{"flexchat train base", "trains a GPT from text"};

  Sample() {
    o.add("--depth", &depth, "number of layers").at_least(1).at_most(64).group("Model");
    o.add("--arch", &arch, "model variant").choices({"classic", "modern"}).group("Model");
    o.add("--smear", &smear, "mix in the previous token").group("Model");
    o.add("--rate", &rate, "learning rate").at_least(0);
    o.add("--quick", &quick, "fewer checks");
    o.add("--prompt", &prompt, "text to go on from");
    o.add("--data", &data, "files, globs or folders");
    o.add("--stop", &stop, "stop words");
    o.add("--seed", &seed, "random seed");
    o.add("--clip", &clip, "gradient norm limit");
    o.add("--dtype", &dtype, "compute type").choices({"f32", "bf16"});
    o.add("--out", &out, "folder of the run").not_recorded();
    o.add("files", &files, "what to check");
  }
  std::string error(const Words& words) {
    try {
      (void)o.parse(words);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.what();
    }
    return "no error";
  }
  std::string json_error(const char* text) {
    try {
      o.load_json(Json::parse(text), "config.json");
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }
};

TEST(Options, DefaultsStayWhenNothingIsGiven) {
  Sample s;
  EXPECT_TRUE(s.o.parse({}));
  EXPECT_EQ(s.depth, 4);
  EXPECT_EQ(s.stop, (Words{"a", "b"}));
  EXPECT_FALSE(s.seed.has_value());
  for (const char* name : {"--depth", "--smear", "--data", "--seed", "files"}) EXPECT_FALSE(s.o.given(name));
}

TEST(Options, EveryKindOfTarget) {
  Sample s;
  EXPECT_TRUE(s.o.parse({"--depth", "12", "--rate=1e-3", "--arch", "modern", "--no-smear", "--quick",
                         "--prompt", "The cat", "--seed=-7", "--clip", "-0.5", "--dtype", "bf16"}));
  EXPECT_EQ(s.depth, 12);
  EXPECT_EQ(s.rate, 1e-3);
  EXPECT_EQ(s.arch, "modern");
  EXPECT_FALSE(s.smear);
  EXPECT_TRUE(s.quick);
  EXPECT_EQ(s.prompt, "The cat");
  EXPECT_EQ(s.seed, -7);
  EXPECT_EQ(s.clip, -0.5);
  EXPECT_EQ(s.dtype, "bf16");
  EXPECT_TRUE(s.o.given("--depth"));
  EXPECT_TRUE(s.o.given("--smear"));
  EXPECT_FALSE(s.o.given("--data"));
  EXPECT_THROW((void)s.o.given("--dpeth"), std::logic_error);
}

TEST(Options, FlagsInAllTheirSpellings) {
  const std::pair<Words, bool> cases[] = {{{"--smear"}, true},
                                          {{"--no-smear"}, false},
                                          {{"--smear=false"}, false},
                                          {{"--smear=true"}, true},
                                          {{"--smear=0"}, false},
                                          {{"--smear=1"}, true},
                                          {{"--no-smear", "--smear"}, true},
                                          {{"--smear", "--no-smear"}, false}};
  for (const auto& [words, expected] : cases) {
    Sample s;
    EXPECT_TRUE(s.o.parse(words));
    EXPECT_EQ(s.smear, expected) << words.back();
  }
  Sample s;
  EXPECT_EQ(s.error({"--smear=maybe"}),
            "flexchat train base: --smear 'maybe' is not a truth value; allowed: true, false");
  EXPECT_EQ(s.error({"--no-smear=true"}),
            "flexchat train base: --no-smear takes no value; allowed: --smear, --no-smear, --smear=true, "
            "--smear=false");
}

TEST(Options, ListsRepeatAndReplaceTheirDefault) {
  Sample s;
  EXPECT_TRUE(s.o.parse({"--data", "x", "y", "--depth", "3", "--data", "z", "--stop=c"}));
  EXPECT_EQ(s.data, (Words{"x", "y", "z"}));
  EXPECT_EQ(s.stop, (Words{"c"}));
  EXPECT_TRUE(s.files.empty());
}

TEST(Options, PositionalsBetweenOptionsAndAfterTheMark) {
  Sample s;
  EXPECT_TRUE(s.o.parse({"a.txt", "--depth", "3", "-", "--quick", "--", "--depth", "-x", "--"}));
  EXPECT_EQ(s.files, (Words{"a.txt", "-", "--depth", "-x", "--"}));
  EXPECT_EQ(s.depth, 3);
}

TEST(Options, ValuesAreTakenAsTheyStand) {
  for (const char* value : {"[END]", "[a,b]", "{}", "", "\"quoted\"", "'x'", "a,b", "%%", "- item",
                            "-abs(q-kv)", "a=b", "\\n", "  ", "--=", "{1,2}", "\xF0\x9F\x90\x88", "-", "7"}) {
    Sample s;
    if (std::string(value).starts_with("--")) {
      EXPECT_TRUE(s.o.parse({std::string("--prompt=") + value, "--data=x", "--stop=x"}));
    } else if (std::string(value).starts_with("- ") || std::string(value).starts_with("-a")) {
      EXPECT_TRUE(s.o.parse({"--prompt", value, "--data=x", std::string("--stop=") + value}));
      EXPECT_EQ(s.stop, (Words{value}));
    } else {
      EXPECT_TRUE(s.o.parse({"--prompt", value, "--data", value, value, "--stop", value}));
      EXPECT_EQ(s.data, (Words{value, value}));
      EXPECT_EQ(s.stop, (Words{value}));
    }
    EXPECT_EQ(s.prompt, value);
  }
}

TEST(Options, TheLastOfRepeatedSingleValuesCounts) {
  Sample s;
  EXPECT_TRUE(s.o.parse({"--depth", "3", "--depth=5"}));
  EXPECT_EQ(s.depth, 5);
}

TEST(Options, ErrorsNameTheOptionTheValueAndWhatIsAllowed) {
  const std::pair<Words, std::string> cases[] = {
      {{"--detph", "4"}, "unknown option '--detph' (did you mean '--depth'?)"},
      {{"--detph=4"}, "unknown option '--detph' (did you mean '--depth'?)"},
      {{"--no-smaer"}, "unknown option '--no-smaer' (did you mean '--no-smear'?)"},
      {{"--completely-different"}, "unknown option '--completely-different'; --help lists the options"},
      {{"--prompt", "--some words"},
       "unknown option '--some words'; a value that starts with dashes is written --prompt=VALUE"},
      {{"-depth", "4"}, "unknown option '-depth' (did you mean '--depth'?)"},
      {{"--data", "x", "-depth", "4"}, "unknown option '-depth' (did you mean '--depth'?)"},
      {{"--data", "-depth", "4"}, "unknown option '-depth' (did you mean '--depth'?)"},
      {{"--arch", "modren"},
       "--arch 'modren' is not known (did you mean 'modern'?); allowed: classic, modern"},
      {{"--dtype", "f64"}, "--dtype 'f64' is not known (did you mean 'f32'?); allowed: f32, bf16"},
      {{"--depth", "abc"},
       "--depth 'abc' is not a whole number of 64 bits; allowed: a whole number from 1 to 64"},
      {{"--depth", "4x"},
       "--depth '4x' is not a whole number of 64 bits; allowed: a whole number from 1 to 64"},
      {{"--depth", "4.5"},
       "--depth '4.5' is not a whole number of 64 bits; allowed: a whole number from 1 to 64"},
      {{"--depth="}, "--depth '' is not a whole number of 64 bits; allowed: a whole number from 1 to 64"},
      {{"--seed", "9223372036854775808"},
       "--seed '9223372036854775808' is not a whole number of 64 bits; allowed: a whole number"},
      {{"--depth", "0"}, "--depth 0 is out of range; allowed: a whole number from 1 to 64"},
      {{"--depth", "65"}, "--depth 65 is out of range; allowed: a whole number from 1 to 64"},
      {{"--rate", "-0.1"}, "--rate -0.1 is out of range; allowed: a number, at least 0"},
      {{"--rate", "fast"}, "--rate 'fast' is not a finite number; allowed: a number, at least 0"},
      {{"--rate", "nan"}, "--rate 'nan' is not a finite number; allowed: a number, at least 0"},
      {{"--rate", "inf"}, "--rate 'inf' is not a finite number; allowed: a number, at least 0"},
      {{"--rate", "1e999"}, "--rate '1e999' is not a finite number; allowed: a number, at least 0"},
      {{"--depth"}, "--depth needs a value; allowed: a whole number from 1 to 64"},
      {{"--data"}, "--data needs a value; allowed: one or more words"},
      {{"--depth", "--arch", "modern"},
       "--depth needs a value before --arch; allowed: a whole number from 1 to 64"},
      {{"--prompt", "--depth=4"}, "--prompt needs a value before --depth; allowed: text"},
      {{"--data", "--quick"}, "--data needs a value before --quick; allowed: one or more words"},
  };
  for (const auto& [words, expected] : cases) {
    Sample s;
    EXPECT_EQ(s.error(words), "flexchat train base: " + expected);
  }
}

TEST(Options, ErrorsWithoutPositionals) {
  bool quick = false;
  int64_t n = 1;
  Options o("flexchat info", "tells about this build");
  o.add("--quick", &quick, "fewer checks");
  o.add("--n", &n, "a number").required();
  const auto error = [&](const Words& words) -> std::string {
    try {
      (void)o.parse(words);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(error({"--n", "1", "extra"}), "flexchat info: unexpected argument 'extra'");
  EXPECT_EQ(error({"--n", "1", "--quick", "false"}),
            "flexchat info: unexpected argument 'false'; a flag takes its value as --quick=false");
  EXPECT_EQ(error({"--n", "1", "--", "--quick"}), "flexchat info: unexpected argument '--quick'");
  EXPECT_EQ(error({"--n", "--", "1"}), "flexchat info: --n needs a value before --; allowed: a whole number");
  EXPECT_EQ(error({"--quick"}), "flexchat info: --n is required: a number");
  EXPECT_FALSE(quick) << "a call that throws changes nothing";
  o.load_json(Json{{"n", 3}}, "config.json");
  EXPECT_EQ(error({"--quick"}), "no error") << "a required value may come from JSON";
  EXPECT_EQ(n, 3);
  EXPECT_EQ(error({"--n", "1", "--"}), "no error");
}

TEST(Options, RequiredPositional) {
  std::string folder;
  Options o("flexchat info", "tells about this build");
  o.add("folder", &folder, "the run").required();
  EXPECT_THROW((void)o.parse({}), Error);
  EXPECT_TRUE(o.parse({"x"}));
  EXPECT_EQ(folder, "x");
  EXPECT_THROW((void)o.parse({"x", "y"}), Error);
}

TEST(Options, DeclaringTwiceIsABug) {
  Sample s;
  EXPECT_THROW(s.o.add("--depth", &s.depth, "again"), std::logic_error);
}

TEST(Options, JsonRoundTripInDeclarationOrder) {
  Sample s;
  EXPECT_TRUE(
      s.o.parse({"--rate", "0.3", "--data", "x", "y", "--seed", "5", "--no-smear", "--out", "elsewhere"}));
  const Json json = s.o.to_json();
  EXPECT_EQ(
      json.dump(),
      R"({"depth":4,"arch":"classic","smear":false,"rate":0.3,"quick":false,"prompt":"","data":["x","y"],)"
      R"("stop":["a","b"],"seed":5,"clip":null,"dtype":null,"files":[]})");
  Sample t;
  t.clip = 3;
  t.o.load_json(Json::parse(json.dump()), "config.json");
  EXPECT_EQ(t.o.to_json(), json);
  EXPECT_EQ(t.data, s.data);
  EXPECT_FALSE(t.clip.has_value()) << "null clears an optional value";
  EXPECT_EQ(t.out, "runs");
  EXPECT_TRUE(t.o.given("--depth"));
  EXPECT_FALSE(t.o.given("--out"));
}

TEST(Options, DashesBecomeUnderscoresInJson) {
  int64_t size = 8;
  Options o("flexchat train base", "trains");
  o.add("--device-batch-size", &size, "rows");
  EXPECT_EQ(o.to_json().dump(), R"({"device_batch_size":8})");
  o.load_json(Json::parse(R"({"device_batch_size": 1.6e1})"), "config.json");
  EXPECT_EQ(size, 16);
}

TEST(Options, JsonErrors) {
  const std::pair<const char*, std::string> cases[] = {
      {R"({"detph": 4})", R"(unknown key "detph" (did you mean "depth"?))"},
      {R"({"depth": "4"})", R"("depth" is "4"; allowed: a whole number from 1 to 64)"},
      {R"({"depth": 4.5})", R"("depth" is 4.5; allowed: a whole number from 1 to 64)"},
      {R"({"depth": null})", R"("depth" is null; allowed: a whole number from 1 to 64)"},
      {R"({"seed": 18446744073709551615})",
       R"("seed" is 18446744073709551615; allowed: a whole number, null)"},
      {R"({"depth": 99})", "--depth 99 is out of range; allowed: a whole number from 1 to 64"},
      {R"({"arch": "modren"})",
       "--arch 'modren' is not known (did you mean 'modern'?); allowed: classic, modern"},
      {R"({"smear": 1})", R"("smear" is 1; allowed: true, false)"},
      {R"({"data": "x"})", R"("data" is "x"; allowed: an array of strings)"},
      {R"({"data": ["x", 3]})", R"("data" is ["x",3]; allowed: an array of strings)"},
      {R"([1])", "expected a JSON object, found array"},
  };
  for (const auto& [text, expected] : cases) {
    Sample s;
    std::string error = s.json_error(text);
    std::replace(error.begin(), error.end(), '\'', '"');
    std::string wanted = "config.json: " + expected;
    std::replace(wanted.begin(), wanted.end(), '\'', '"');
    EXPECT_EQ(error, wanted);
  }
  Sample s;
  s.json_error(R"({"depth": 7, "arch": "other"})");
  EXPECT_EQ(s.depth, 4) << "a call that throws changes nothing";
  EXPECT_FALSE(s.o.given("--depth"));
}

TEST(Options, HelpShowsGroupsDefaultsAndChoices) {
  Sample s;
  EXPECT_TRUE(s.o.parse({"--depth", "9"}));
  const std::string help = s.o.help();
  for (const char* text :
       {"flexchat train base - trains a GPT from text", "usage: flexchat train base [options] [files...]",
        "\nArguments:\n", "\nModel:\n", "\nOptions:\n", "--[no-]smear", "--data TEXT...",
        "(one of classic, modern; default classic)", "(a whole number from 1 to 64; default 4)",
        "default 0.02", "-h, --help"}) {
    EXPECT_NE(help.find(text), std::string::npos) << text << "\n" << help;
  }
  EXPECT_LT(help.find("\nModel:"), help.find("\nOptions:"));
}

TEST(Options, HelpIsPrintedAndParseReturnsFalse) {
  for (const Words& words : {Words{"--help"}, Words{"-h"}, Words{"--detph", "--help"}}) {
    Sample s;
    testing::internal::CaptureStdout();
    const bool go_on = s.o.parse(words);
    EXPECT_FALSE(go_on);
    EXPECT_EQ(testing::internal::GetCapturedStdout(), s.o.help());
  }
  Sample s;
  EXPECT_TRUE(s.o.parse({"--", "--help"}));
  EXPECT_EQ(s.files, (Words{"--help"}));
}

}  // namespace
}  // namespace flexchat
