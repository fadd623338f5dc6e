// A run's metrics.jsonl as columns. Three kinds of line: {"step", "loss", "smooth_loss", "lr_mult",
// "tok_per_sec", "mfu", "dt_ms", "grad_norm", "tokens", "mem_mb"} of a training step, {"step", "val_bpb"} of
// a validation, and
// {"step", "prompt", "sample"} of a sampled text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

struct MetricColumn {
  std::vector<double> step, value;  // NaN where the file says null

  bool empty() const { return step.empty(); }
};

struct SampleText {
  int64_t step = 0;
  std::string prompt, text;
};

struct Metrics {
  std::map<std::string, MetricColumn> columns;  // every key with a numeric value besides "step"
  std::vector<SampleText> samples;
  int64_t bad_lines = 0;  // not JSON, or without a step: a torn last line after a kill

  const MetricColumn& column(const std::string& key) const;  // empty if the file never had it
};

Metrics parse_metrics(std::string_view text);
Metrics read_metrics(const std::filesystem::path& file);  // empty if the file does not exist

}  // namespace flexchat
