// Run folders, the evidence a command leaves: <root>/<kind>/<run-id>/{config.json, metrics.jsonl,
// summary.json, run.md, ...}. Whole files are written atomically; metrics grow line by line and survive a
// kill.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "base/options.h"

namespace flexchat {

enum class RunMode {
  fresh,      // the run id must be new
  resume,     // the run must exist
  overwrite,  // an existing run of this id is removed first
};

// UTC time and a random word: "20250131-120000-3f9a".
std::string default_run_id();

class RunFolder {
 public:
  // kind: "train", "verify", "bench", ... An empty id means default_run_id(). Throws Error, saying what to
  // do, on an id that is no plain name, on fresh when the run exists and on resume when it does not.
  static RunFolder create(const std::string& kind, const std::string& run_id, RunMode mode = RunMode::fresh,
                          const std::filesystem::path& root = "runs");
  ~RunFolder();
  RunFolder(RunFolder&& other) noexcept;
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::string& kind() const { return kind_; }
  const std::string& run_id() const { return run_id_; }
  const std::filesystem::path& path() const { return path_; }

  // Whole files; RunError on failure. Text that is not UTF-8 is written with U+FFFD for the bad bytes.
  void write_json(const std::string& name, const Json& value) const;
  void write_text(const std::string& name, std::string_view text) const;

  // summary.json and run.md. "kind", "run_id" and "environment" are put in front unless present; the
  // latter lists GPUs if this process has opened the CUDA library. A scalar
  // becomes a table row, an object a section, an array of objects a table.
  void write_summary(const Json& summary) const;

  // One line of metrics.jsonl, in the system's hands when this returns. `line` is an object.
  void append_metrics(const Json& line);
  // Before a resumed run goes on: keeps the lines up to and including `step`, drops later, torn and foreign
  // lines. Returns how many were dropped.
  int64_t truncate_metrics(int64_t step);

 private:
  RunFolder(std::string kind, std::string run_id, std::filesystem::path path)
      : kind_(std::move(kind)), run_id_(std::move(run_id)), path_(std::move(path)) {}
  void close_metrics();
  std::string kind_, run_id_;
  std::filesystem::path path_;
  int metrics_fd_ = -1;
};

// The text of run.md for a summary (see write_summary).
std::string render_run_markdown(const Json& summary);

}  // namespace flexchat
