// flexchat tokenizer: the program itself, through files and pipes.
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "support/temp_folder.h"
#include "tokenizer/reference.h"

namespace flexchat {
namespace {

using Ids = std::vector<int32_t>;
const std::string kRanks = FLEXCHAT_TEST_DATA "/tokenizer_cases.json";

std::string quoted(const std::string& word) { return fmt::format("'{}'", word); }

struct Outcome {
  int code = -1;
  std::string out, err;
};

class TokenizerProgram : public testing::Test {
 protected:
  Outcome run(const std::string& words, const std::string& input = "") {
    write_file_atomic(folder_ / "in", input);
    const auto redirect = [&](const char* sign, const char* name) {
      return std::string(" ") + sign + " '" + (folder_ / name).string() + "'";
    };
    const std::string command = std::string("'") + FLEXCHAT_PROGRAM + "' tokenizer " + words +
                                redirect("<", "in") + redirect(">", "out") + redirect("2>", "err");
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder_ / "out"),
            read_file(folder_ / "err")};
  }
  std::string path(const std::string& name) { return quoted((folder_ / name).string()); }
  void expect_error(const Outcome& outcome, const std::string& text) {
    EXPECT_EQ(outcome.code, 2);
    EXPECT_NE(outcome.err.find(text), std::string::npos) << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_EQ(outcome.out, "");
  }

  TempFolder folder_;
};

TEST_F(TokenizerProgram, GoldenEncodeDecodeRender) {
  const auto cases = nlohmann::json::parse(read_file(kRanks));
  for (size_t i = 0; i < cases["encode"].size(); i += 8) {
    const std::string text = cases["encode"][i][0];
    const Outcome encoded = run("encode --ranks '" + kRanks + "'", text);
    EXPECT_EQ(encoded.code, 0) << encoded.err;
    EXPECT_EQ(nlohmann::json::parse(encoded.out), cases["encode"][i][1]);
    EXPECT_EQ(run("decode --ranks '" + kRanks + "'", encoded.out).out, text);
  }
  const auto& chat = cases["conversations"][2];
  const Outcome rendered = run("render --ranks '" + kRanks + "'", chat["conversation"].dump());
  EXPECT_EQ(rendered.code, 0) << rendered.err;
  EXPECT_EQ(nlohmann::json::parse(rendered.out),
            (nlohmann::json{{"ids", chat["ids"]}, {"mask", chat["mask"]}}));
  const Outcome open = run("render --completion --ranks '" + kRanks + "'", chat["conversation"].dump());
  EXPECT_EQ(nlohmann::json::parse(open.out)["ids"].back(), 594);
  EXPECT_EQ(run("encode --bos --ranks '" + kRanks + "'", "z").out, "[591, 122]\n");
}

TEST_F(TokenizerProgram, TrainsSavesAndEvaluates) {
  Rng rng(31);
  std::string lines;
  std::vector<std::string> texts;
  for (int i = 0; i < 300; ++i) {
    texts.push_back("line " + std::to_string(i) + " " + reference::random_letters(rng, 20, 4) + " caf\u00E9");
    lines += nlohmann::json{{"text", texts.back()}}.dump() + "\n";
  }
  write_file_atomic(folder_ / "data.jsonl", lines);
  const Outcome trained =
      run("train --data " + path("data.jsonl") + " --vocab-size 400 --json --out " + path("tok"));
  ASSERT_EQ(trained.code, 0) << trained.err;
  const auto summary = nlohmann::json::parse(trained.out);
  EXPECT_EQ(summary["vocab_size"], 400);
  EXPECT_EQ(summary["merges"], 400 - 9 - 256);
  EXPECT_EQ(summary["documents"], 297);  // each hundredth document is kept for validation

  const Outcome again =
      run("train --data " + path("data.jsonl") + " --vocab-size 400 --threads 1 --out " + path("b"));
  EXPECT_NE(again.out.find("400 tokens"), std::string::npos) << again.out;
  EXPECT_EQ(read_file(folder_ / "b/tokenizer.json"), read_file(folder_ / "tok/tokenizer.json"));

  // Ids of documents in a file: the same as one at a time.
  const Outcome encoded = run("encode --bos --tokenizer " + path("tok") + " --data " + path("data.jsonl") +
                              " --out " + path("ids.bin"));
  ASSERT_EQ(encoded.code, 0) << encoded.err;
  const std::string bytes = read_file(folder_ / "ids.bin");
  Ids ids(bytes.size() / 4);
  std::memcpy(ids.data(), bytes.data(), ids.size() * 4);
  const auto report = nlohmann::json::parse(encoded.out);
  EXPECT_EQ(report["documents"], 300);
  EXPECT_EQ(report["tokens"].get<size_t>(), ids.size());
  const Ids first = nlohmann::json::parse(run("encode --bos --tokenizer " + path("tok"), texts[0]).out);
  ASSERT_LT(first.size(), ids.size());
  EXPECT_EQ(Ids(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(first.size())), first);

  const Outcome table = run("eval --tokenizer " + path("tok"));
  EXPECT_EQ(table.code, 0) << table.err;
  EXPECT_NE(table.out.find("bytes/token"), std::string::npos);
  EXPECT_NE(table.out.find("python"), std::string::npos);
  const auto measured = nlohmann::json::parse(
      run("eval --json --tokenizer " + path("tok") + " --data " + path("data.jsonl")).out);
  int64_t total = 0;
  for (const std::string& text : texts) total += static_cast<int64_t>(text.size());
  EXPECT_EQ(measured["texts"][0]["bytes"], total);
  EXPECT_EQ(measured["texts"][0]["tokens"].get<size_t>(), ids.size() - 300);
  EXPECT_EQ(measured["texts"][0]["words"], 4 * 300);
}

TEST_F(TokenizerProgram, SmallTextStopsEarlyAndSaysSo) {
  write_file_atomic(folder_ / "a.txt", "ab ab\n");
  const Outcome outcome = run("train --data " + path("a.txt") + " --vocab-size 1000 --out " + path("tok"));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("no pair was left after 2 merges; saved a vocabulary of 267"), std::string::npos)
      << outcome.err;
  EXPECT_EQ(run("encode --tokenizer " + path("tok"), "ab ab").out, "[256, 257]\n");
}

TEST_F(TokenizerProgram, InvalidUtf8IsReported) {
  const Outcome outcome = run("encode --ranks '" + kRanks + "'", "a\xFF");
  EXPECT_EQ(outcome.code, 0);
  EXPECT_NE(outcome.err.find("1 invalid UTF-8 sequence in standard input"), std::string::npos) << outcome.err;
}

TEST_F(TokenizerProgram, BadUse) {
  const std::string ranks = " --ranks '" + kRanks + "'";
  write_file_atomic(folder_ / "a.txt", "some text");
  expect_error(run("train --data " + path("a.txt") + " --vocab-size 264 --out " + path("t")), "at least 265");
  expect_error(run("train --data " + path("missing.txt") + " --out " + path("t")), "missing.txt");
  expect_error(run("train --data " + path("a.txt") + " --pattern '(' --out " + path("t")),
               "split pattern '('");
  expect_error(run("encode"), "--tokenizer DIR or --ranks FILE");
  expect_error(run("encode --tokenizer x" + ranks), "not both");
  expect_error(run("encode --tokenizer " + path("none")), "none");
  expect_error(run("encode --out x" + ranks), "--data and --out");
  expect_error(run("decode" + ranks, "[600]"), "600");
  expect_error(run("decode" + ranks, "[1, 2.5]"), "entry 1 is 2.5");
  expect_error(run("decode" + ranks, "{}"), "must be a JSON list");
  expect_error(run("decode" + ranks, "[1"), "not JSON");
  expect_error(run("render" + ranks, R"({"messages": [{"role": "assistant", "content": "x"}]})"),
               "must be 'user'");
  expect_error(run("frobnicate"), "allowed: train, encode, decode, eval, render");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "t"));
}

}  // namespace
}  // namespace flexchat
