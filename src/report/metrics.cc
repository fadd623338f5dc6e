#include "report/metrics.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/options.h"

namespace flexchat {
namespace {

bool add_line(const Json& line, Metrics& metrics) {
  if (!line.is_object() || !line.contains("step") || !line["step"].is_number_integer()) return false;
  const auto step = line["step"].get<int64_t>();
  if (line.contains("sample") && line["sample"].is_string()) {
    const bool prompted = line.contains("prompt") && line["prompt"].is_string();
    metrics.samples.push_back(
        {step, prompted ? line["prompt"].get<std::string>() : "", line["sample"].get<std::string>()});
  }
  for (const auto& item : line.items()) {
    if (item.key() == "step" || !(item.value().is_number() || item.value().is_null())) continue;
    MetricColumn& column = metrics.columns[item.key()];
    column.step.push_back(static_cast<double>(step));
    column.value.push_back(item.value().is_null() ? std::numeric_limits<double>::quiet_NaN()
                                                  : item.value().get<double>());
  }
  return true;
}

}  // namespace

const MetricColumn& Metrics::column(const std::string& key) const {
  static const MetricColumn none;
  const auto it = columns.find(key);
  return it == columns.end() ? none : it->second;
}

Metrics parse_metrics(std::string_view text) {
  Metrics metrics;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.empty()) continue;
    if (!add_line(Json::parse(line, nullptr, false), metrics)) ++metrics.bad_lines;
  }
  return metrics;
}

Metrics read_metrics(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error)) return {};
  return parse_metrics(read_file(file));
}

}  // namespace flexchat
