// Run ids, resuming, summaries as JSON and markdown, metrics that survive a kill.
#include "report/run_folder.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

TEST(RunFolder, MakesItsFolder) {
  const TempFolder root;
  const RunFolder run = RunFolder::create("train", "first", RunMode::fresh, root / "runs");
  EXPECT_EQ(run.path(), root / "runs/train/first");
  EXPECT_TRUE(fs::is_directory(run.path()));
  EXPECT_EQ(run.kind(), "train");
  EXPECT_EQ(run.run_id(), "first");
}

TEST(RunFolder, DefaultIdsAreDatedAndDiffer) {
  const TempFolder root;
  const RunFolder a = RunFolder::create("bench", "", RunMode::fresh, root.path());
  EXPECT_EQ(a.run_id().size(), 20u);
  std::set<std::string> ids;
  for (int i = 0; i < 20; ++i) ids.insert(default_run_id());
  EXPECT_GT(ids.size(), 15u);
}

TEST(RunFolder, AnExistingRunNeedsAWordAboutIt) {
  const TempFolder root;
  { RunFolder::create("train", "x", RunMode::fresh, root.path()).write_json("config.json", Json{{"a", 1}}); }
  const std::string message =
      message_of<Error>([&] { RunFolder::create("train", "x", RunMode::fresh, root.path()); });
  EXPECT_NE(message.find("exists already"), std::string::npos) << message;
  EXPECT_NE(message.find("--resume"), std::string::npos) << message;
  EXPECT_NE(message.find("--run-id"), std::string::npos) << message;
  RunFolder::create("train", "x", RunMode::resume, root.path());
  EXPECT_TRUE(fs::exists(root / "train/x/config.json"));
  RunFolder::create("train", "x", RunMode::overwrite, root.path());
  EXPECT_FALSE(fs::exists(root / "train/x/config.json"));
}

TEST(RunFolder, ResumingWhatIsNotThereNamesWhatIs) {
  const TempFolder root;
  const auto error = [&] {
    return message_of<Error>([&] { RunFolder::create("train", "baseline2", RunMode::resume, root.path()); });
  };
  EXPECT_NE(error().find("there is none"), std::string::npos) << error();
  RunFolder::create("train", "baseline1", RunMode::fresh, root.path());
  EXPECT_NE(error().find("did you mean 'baseline1'?"), std::string::npos) << error();
}

TEST(RunFolder, IdsCannotReachOutside) {
  const TempFolder root;
  const std::string long_id(101, 'a');
  for (const std::string& id :
       {std::string(".."), std::string("../x"), std::string("a/b"), std::string("/etc"),
        std::string(".hidden"), std::string("-rf"), std::string("a b"), std::string("x\n"), long_id}) {
    EXPECT_THROW(RunFolder::create("train", id, RunMode::overwrite, root.path()), Error) << id;
  }
  EXPECT_THROW(RunFolder::create("../train", "x", RunMode::overwrite, root.path()), Error);
}

TEST(RunFolder, UnwritableRootIsARunError) {
  const TempFolder root;
  write_file_atomic(root / "runs", "a file");
  EXPECT_THROW(RunFolder::create("train", "x", RunMode::fresh, root / "runs"), RunError);
}

// ---- metrics -------------------------------------------------------------------------------------------

TEST(RunMetrics, EachLineIsThereAtOnce) {
  const TempFolder root;
  RunFolder run = RunFolder::create("train", "x", RunMode::fresh, root.path());
  run.append_metrics({{"step", 1}, {"loss", 2.5}});
  EXPECT_EQ(read_file(run.path() / "metrics.jsonl"), "{\"step\":1,\"loss\":2.5}\n");
  run.append_metrics(
      {{"step", 2}, {"loss", std::numeric_limits<double>::quiet_NaN()}, {"sample", "a\nb\xff"}});
  EXPECT_EQ(read_file(run.path() / "metrics.jsonl"),
            "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":null,\"sample\":\"a\\nb\xEF\xBF\xBD\"}\n");
}

TEST(RunMetrics, ResumingDropsLaterAndTornLines) {
  const TempFolder root;
  const fs::path file = root / "train/x/metrics.jsonl";
  {
    RunFolder run = RunFolder::create("train", "x", RunMode::fresh, root.path());
    for (int step : {1, 2, 3, 4}) run.append_metrics({{"step", step}});
    std::ofstream(file, std::ios::app) << "{\"step\":5,\"lo";
  }
  RunFolder run = RunFolder::create("train", "x", RunMode::resume, root.path());
  EXPECT_EQ(run.truncate_metrics(2), 3);
  EXPECT_EQ(read_file(file), "{\"step\":1}\n{\"step\":2}\n");
  run.append_metrics({{"step", 3}, {"again", true}});
  EXPECT_EQ(read_file(file), "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"again\":true}\n");
  EXPECT_EQ(run.truncate_metrics(9), 0);
}

TEST(RunMetrics, ATornLineOfAnEarlierStepGoesToo) {
  const TempFolder root;
  RunFolder run = RunFolder::create("train", "x", RunMode::fresh, root.path());
  EXPECT_EQ(run.truncate_metrics(5), 0);  // no file yet
  run.append_metrics({{"step", 1}});
  std::ofstream(run.path() / "metrics.jsonl", std::ios::app) << "{\"step\":2}";  // whole JSON, but no newline
  EXPECT_EQ(run.truncate_metrics(5), 1);
  EXPECT_EQ(read_file(run.path() / "metrics.jsonl"), "{\"step\":1}\n");
}

TEST(RunMetrics, MovingTheObjectMovesTheFile) {
  const TempFolder root;
  RunFolder a = RunFolder::create("train", "x", RunMode::fresh, root.path());
  a.append_metrics({{"step", 1}});
  RunFolder b = std::move(a);
  b.append_metrics({{"step", 2}});
  EXPECT_EQ(read_file(b.path() / "metrics.jsonl"), "{\"step\":1}\n{\"step\":2}\n");
}

// ---- summaries -----------------------------------------------------------------------------------------

TEST(RunSummary, WritesJsonAndMarkdown) {
  const TempFolder root;
  const RunFolder run = RunFolder::create("verify", "x", RunMode::fresh, root.path());
  run.write_summary({{"results", {{"passed", true}}}});
  const Json back = Json::parse(read_file(run.path() / "summary.json"));
  EXPECT_EQ(back["kind"], "verify");
  EXPECT_EQ(back["run_id"], "x");
  EXPECT_TRUE(back["environment"].contains("commit"));
  EXPECT_EQ(back["results"]["passed"], true);
  EXPECT_TRUE(read_file(run.path() / "run.md").starts_with("# verify run x\n"));
}

TEST(RunSummary, MarkdownShowsScalarsTablesAndSections) {
  const Json summary = {
      {"kind", "verify"},
      {"run_id", "a_b"},
      {"status", "passed"},
      {"results",
       {{"max_abs", 1.25e-6},
        {"checks", {{{"check", "logits"}, {"max_abs", 1e-6}}, {{"check", "k|v"}, {"pass", false}}}}}},
      {"config", {{"depth", 4}, {"words", {"a", "b"}}, {"none", nullptr}}},
      {"environment", {{"command", "flexchat verify 'a b'"}, {"cpu", {{"name", "test"}}}}}};
  EXPECT_EQ(render_run_markdown(summary), R"(# verify run a_b

```
flexchat verify 'a b'
```

|  | value |
| --- | --- |
| status | passed |

## Results

|  | value |
| --- | ---: |
| max_abs | 1.25e-06 |

### Checks

| check | max_abs | pass |
| --- | ---: | --- |
| logits | 1e-06 |  |
| k\|v |  | false |

## Config

|  | value |
| --- | --- |
| depth | 4 |
| words | a, b |
| none | - |

## Environment

### Cpu

|  | value |
| --- | --- |
| name | test |
)");
}

TEST(RunSummary, AFenceIsLongerThanAnyInTheCommand) {
  const Json summary = {{"kind", "k"}, {"run_id", "r"}, {"environment", {{"command", "x ```` y"}}}};
  EXPECT_NE(render_run_markdown(summary).find("\n`````\nx ```` y\n`````\n"), std::string::npos);
}

}  // namespace
}  // namespace flexchat
