// Reading metrics, and the page made from whole, partial and hostile runs.
#include "report/html.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "report/xml_check.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

TEST(Metrics, ColumnsSamplesAndBadLines) {
  const Metrics m = parse_metrics(
      "{\"step\":1,\"loss\":3.5,\"mfu\":null,\"note\":\"x\"}\n"
      "not json\n\n"
      "{\"step\":2,\"loss\":3.25}\n"
      "{\"step\":2,\"val_bpb\":1.5}\n"
      "{\"loss\":9}\n"
      "{\"step\":2,\"prompt\":\"The\",\"sample\":\"The end\"}\n"
      "{\"step\":3,\"lo");
  EXPECT_EQ(m.column("loss").step, (std::vector<double>{1, 2}));
  EXPECT_EQ(m.column("loss").value, (std::vector<double>{3.5, 3.25}));
  EXPECT_TRUE(std::isnan(m.column("mfu").value.at(0)));
  EXPECT_EQ(m.column("val_bpb").value, (std::vector<double>{1.5}));
  EXPECT_TRUE(m.column("note").empty());
  EXPECT_TRUE(m.column("absent").empty());
  ASSERT_EQ(m.samples.size(), 1u);
  EXPECT_EQ(m.samples[0].text, "The end");
  EXPECT_EQ(m.samples[0].prompt, "The");
  EXPECT_EQ(m.samples[0].step, 2);
  EXPECT_EQ(m.bad_lines, 3);
}

std::string metrics_text(int steps) {
  std::string text;
  for (int i = 1; i <= steps; ++i) {
    const Json line = {{"step", i},        {"loss", 5.0 / i},     {"smooth_loss", 6.0 / i},
                       {"lr_mult", 1.0},   {"tok_per_sec", 1000}, {"mfu", nullptr},
                       {"dt_ms", 500.0},   {"grad_norm", 0.5},    {"tokens", i * 512},
                       {"mem_mb", 100 + i}};
    text += line.dump() + "\n";
    if (i % 10 == 0) text += Json{{"step", i}, {"val_bpb", 3.0 / i}}.dump() + "\n";
  }
  return text;
}

TEST(TrainReport, ShowsTheRun) {
  const TempFolder run;
  write_file_atomic(run / "metrics.jsonl", metrics_text(40) +
                                               R"({"step":40,"prompt":"Once","sample":"Once upon a time"})"
                                               "\n");
  write_file_atomic(run / "config.json", R"({"depth":4,"data":["a.txt","b.txt"],"matrix_lr":0.02})");
  write_file_atomic(
      run / "summary.json",
      R"({"run_id":"x1","status":"finished","results":{"parameters":1234567,"seconds":75,"best_val_bpb":0.0712},)"
      R"("environment":{"command":"flexchat train base","commit":"0123456789abcdef","dirty":true,)"
      R"("cpu":{"name":"Test CPU"},"memory":{"total_bytes":2147483648}}})");
  const auto page = render_train_report(run.path());
  EXPECT_EQ(page, run / "report.html");
  const std::string html = read_file(page);
  EXPECT_EQ(xml_problem(html), "");
  for (const char* part : {"Training run x1",
                           ">finished<",
                           "<dd>40</dd>",
                           "0.1500",
                           "0.0712",
                           "1,000 <small>tok/s",
                           "1m15s",
                           "1.23 M",
                           "133.5 MiB",
                           "0123456789ab with local changes",
                           "flexchat train base",
                           "Test CPU",
                           "2.0 GiB",
                           "a.txt, b.txt",
                           "matrix_lr",
                           "<span class=\"prompt\">Once</span> upon a time",
                           "Training loss",
                           "Validation",
                           "Throughput",
                           "Learning rate",
                           "Gradient norm"}) {
    EXPECT_NE(html.find(part), std::string::npos) << part;
  }
  EXPECT_EQ(html.find("MFU"), std::string::npos);  // the peak is unknown
  for (const char* outside : {"<script", "http://", "https://", "@import", "url("}) {
    std::string rest = html;
    for (size_t at; (at = rest.find("xmlns=\"http://www.w3.org/2000/svg\"")) != std::string::npos;)
      rest.erase(at, 34);
    EXPECT_EQ(rest.find(outside), std::string::npos) << outside;
  }
}

TEST(TrainReport, AnEmptyOrKilledRunStillGivesAPage) {
  const TempFolder run;
  EXPECT_EQ(xml_problem(read_file(render_train_report(run.path()))), "");
  write_file_atomic(run / "metrics.jsonl", "{\"step\":1,\"loss\":5.5}\n{\"step\":2,\"lo");
  const std::string html = read_file(render_train_report(run.path()));
  EXPECT_EQ(xml_problem(html), "");
  EXPECT_NE(html.find("5.5000"), std::string::npos);
  EXPECT_NE(html.find("1 unreadable line of metrics.jsonl left out"), std::string::npos);
  EXPECT_NE(html.find("no data"), std::string::npos);
}

TEST(TrainReport, HostileTextIsEscaped) {
  const std::string evil = "</pre><script>alert(1)</script>\" onload='x'";
  Metrics metrics;
  metrics.samples.push_back({3, evil, evil + " more"});
  const Json summary = {{"status", evil},
                        {"environment", {{"command", evil}, {"commit", evil}, {"version", evil}}}};
  const std::string html = train_report_html(evil, summary, Json{{evil, evil}}, metrics);
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(xml_problem(html), "");
}

TEST(TrainReport, OddlyTypedFilesDoNotBreakIt) {
  Metrics metrics =
      parse_metrics("{\"step\":1,\"loss\":1e308,\"tok_per_sec\":-5,\"tokens\":1e300,\"mem_mb\":null}\n");
  for (const Json& odd :
       {Json(), Json::array({1, 2}), Json("text"), Json{{"results", 5}}, Json{{"environment", {1}}},
        Json{{"results", {{"steps", "many"}, {"parameters", -1.5}}}}}) {
    EXPECT_EQ(xml_problem(train_report_html("t", odd, odd, metrics)), "") << odd.dump();
  }
}

TEST(TrainReport, BadFoldersAndFilesAreNamed) {
  const TempFolder run;
  EXPECT_THROW(render_train_report(run / "none"), Error);
  write_file_atomic(run / "config.json", "{");
  EXPECT_NE(message_of<Error>([&] { render_train_report(run.path()); }).find("config.json: not valid JSON"),
            std::string::npos);
}

}  // namespace
}  // namespace flexchat
