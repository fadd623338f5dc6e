// A training run as one self-contained HTML page: no scripts, no outside files, readable on light and dark
// screens.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/options.h"
#include "report/metrics.h"

namespace flexchat {

// Writes <run_dir>/report.html from config.json, summary.json and metrics.jsonl, each of which may be missing
// (a run that was killed has no summary), and returns its path. Throws Error if run_dir is no folder or a
// file of it is not JSON, RunError if the page cannot be written.
std::filesystem::path render_train_report(const std::filesystem::path& run_dir);

// A page that lays the curves of several training runs over each other, with a table of their results. Errors
// as above.
std::string compare_report_html(const std::vector<std::filesystem::path>& run_dirs);

// The page's text. What the cards show comes from summary["results"] where it has "steps", "final_loss",
// "best_val_bpb", "tok_per_sec", "seconds", "parameters", "peak_memory_bytes", and from the metrics
// otherwise; summary["status"] is shown beside the title ("finished", "stopped at step 120").
std::string train_report_html(const std::string& title, const Json& summary, const Json& config,
                              const Metrics& metrics);

}  // namespace flexchat
