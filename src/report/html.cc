#include "report/html.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"
#include "report/plot.h"
#include "report/table.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPageStyle = R"(
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1f2430;--muted:#6b7280;--line:#e6e8ec;--code:#f1f3f6;
--accent:#2f6fde;--soft:#e8f0fd}
@media(prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1a1f28;--text:#e6e9ef;--muted:#98a1b0;--line:#2a303b;
--code:#222834;--accent:#6ea8ff;--soft:#1d2b45}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 48px}
header{margin-bottom:20px}
h1{font-size:26px;line-height:1.25;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:32px 0 12px}
h3{font-size:14px;margin:0 0 8px}
.sub{color:var(--muted);margin:4px 0 12px}
.chip{display:inline-block;vertical-align:4px;margin-left:10px;padding:2px 10px;border-radius:99px;font-size:12px;
font-weight:600;color:var(--accent);background:var(--soft)}
pre,code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.cmd{background:var(--code);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:20px 0}
.cards .card{flex:1 1 168px;padding:12px 16px}
.cards dt{color:var(--muted);font-size:12.5px}
.cards dd{margin:0;font-size:23px;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums;
white-space:nowrap}
.cards small{font-size:13px;font-weight:500;color:var(--muted)}
.plots,.tables{display:grid;gap:12px;grid-template-columns:repeat(2,minmax(0,1fr))}
.plots .card{padding:10px 8px 6px}
.wide{grid-column:1/-1;overflow-x:auto}
.wide svg{min-width:620px}
svg{display:block;width:100%;height:auto}
.samples{display:grid;gap:12px}
.tag{color:var(--muted);font-size:12.5px;margin-bottom:4px}
.prompt{color:var(--accent);font-weight:600}
details>summary{cursor:pointer;color:var(--muted);margin:12px 0}
table{width:100%;border-collapse:collapse;font-size:13.5px}
td{padding:5px 0;border-top:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
tr:first-child td{border-top:0}
td:first-child{color:var(--muted);width:40%;padding-right:12px}
.tables{align-items:start}
footer{margin-top:28px;color:var(--muted);font-size:12.5px}
@media(max-width:760px){.plots,.tables{grid-template-columns:minmax(0,1fr)}}
@media print{body{background:#fff}.card{break-inside:avoid}}
)";

// ---- values --------------------------------------------------------------------------------------------

const Json* find(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() ? nullptr : &*it;
}

std::optional<double> number(const Json& object, const char* key) {
  const Json* value = find(object, key);
  if (!value || !value->is_number()) return std::nullopt;
  return value->get<double>();
}

std::string text(const Json& object, const char* key) {
  const Json* value = find(object, key);
  return value && value->is_string() ? value->get<std::string>() : "";
}

std::vector<double> finite_values(const MetricColumn& column) {
  std::vector<double> out;
  std::copy_if(column.value.begin(), column.value.end(), std::back_inserter(out),
               [](double v) { return std::isfinite(v); });
  return out;
}

std::optional<double> last(const MetricColumn& column) {
  const auto values = finite_values(column);
  return values.empty() ? std::nullopt : std::optional(values.back());
}
std::optional<double> lowest(const MetricColumn& column) {
  const auto values = finite_values(column);
  return values.empty() ? std::nullopt : std::optional(*std::min_element(values.begin(), values.end()));
}
std::optional<double> highest(const MetricColumn& column) {
  const auto values = finite_values(column);
  return values.empty() ? std::nullopt : std::optional(*std::max_element(values.begin(), values.end()));
}
std::optional<double> median(const MetricColumn& column) {
  auto values = finite_values(column);
  if (values.empty()) return std::nullopt;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}
std::optional<double> total_seconds(const MetricColumn& milliseconds) {
  const auto values = finite_values(milliseconds);
  if (values.empty()) return std::nullopt;
  double sum = 0;
  for (double v : values) sum += v;
  return sum / 1e3;
}

// ---- cards ---------------------------------------------------------------------------------------------

// 1234567 -> "1.23 M"; below 100,000 in full.
std::string short_count(double value) {
  if (!std::isfinite(value) || std::abs(value) >= 1e18) return format_number(value, 4);
  if (std::abs(value) < 1e5) return format_count(static_cast<int64_t>(std::llround(value)));
  for (const auto& [size, unit] : {std::pair{1e12, "T"}, {1e9, "G"}, {1e6, "M"}}) {
    if (std::abs(value) >= size) return fmt::format("{:.3g} {}", value / size, unit);
  }
  return fmt::format("{:.3g} k", value / 1e3);
}

void card(std::string& out, std::string_view label, const std::optional<std::string>& value,
          const std::string& note = "") {
  if (!value) return;
  out += fmt::format("<div class=\"card\"><dt>{}</dt><dd>{}{}</dd></div>\n", label, escape_xml(*value),
                     note.empty() ? "" : " <small>" + escape_xml(note) + "</small>");
}

template <class Fn>
std::optional<std::string> shown(std::optional<double> value, const Fn& format) {
  return value ? std::optional<std::string>(format(*value)) : std::nullopt;
}

std::string cards(const Json& summary, const Metrics& metrics) {
  const Json* results = find(summary, "results");
  const Json& r = results ? *results : summary;
  const auto pick = [&](const char* key, std::optional<double> otherwise) {
    const auto value = number(r, key);
    return value ? value : otherwise;
  };
  const auto fixed4 = [](double v) { return fmt::format("{:.4f}", v); };
  auto memory = number(r, "peak_memory_bytes");
  if (!memory) {
    if (const auto mb = highest(metrics.column("mem_mb"))) memory = *mb * 1e6;
  }
  const auto smooth = last(metrics.column("smooth_loss"));
  const auto loss = pick("final_loss", smooth ? smooth : last(metrics.column("loss")));
  std::string out = "<dl class=\"cards\">\n";
  card(out, "Steps", shown(pick("steps", highest({{}, metrics.column("loss").step})), short_count));
  card(out, "Final training loss", shown(loss, fixed4), "nats");
  card(out, "Best validation", shown(pick("best_val_bpb", lowest(metrics.column("val_bpb"))), fixed4), "bpb");
  card(out, "Throughput", shown(pick("tok_per_sec", median(metrics.column("tok_per_sec"))), short_count),
       "tok/s");
  card(out, "MFU",
       shown(median(metrics.column("mfu")), [](double v) { return fmt::format("{:.1f}", 100 * v); }), "%");
  card(out, "Training time", shown(pick("seconds", total_seconds(metrics.column("dt_ms"))), format_duration));
  card(out, "Tokens seen", shown(highest(metrics.column("tokens")), short_count));
  card(out, "Parameters", shown(number(r, "parameters"), short_count));
  card(out, "Peak memory", shown(memory, format_bytes));
  return out + "</dl>\n";
}

// ---- plots ---------------------------------------------------------------------------------------------

std::string with_last(const std::string& name, const MetricColumn& column) {
  const auto value = last(column);
  return value ? fmt::format("{} {}", name, format_number(*value, 4)) : name;
}

Series series(const std::string& name, const MetricColumn& column, Series::Style style, int color) {
  return {name, column.step, column.value, style, color};
}

// A running mean for values whose file has no smoothed column; gaps stay gaps.
MetricColumn smoothed(const MetricColumn& column) {
  constexpr double kKeep = 0.9;
  MetricColumn out;
  out.step = column.step;
  double mean = 0, weight = 0;
  for (double v : column.value) {
    if (std::isfinite(v)) {
      mean = kKeep * mean + (1 - kKeep) * v;
      weight = kKeep * weight + (1 - kKeep);
      out.value.push_back(mean / weight);
    } else {
      out.value.push_back(std::numeric_limits<double>::quiet_NaN());
    }
  }
  return out;
}

Plot raw_and_smooth(std::string title, std::string y_label, const MetricColumn& raw,
                    const MetricColumn& smooth, int color) {
  Plot plot{std::move(title), "step", std::move(y_label), {}};
  const bool crowded = raw.step.size() > 400;
  plot.series.push_back(
      series("each step", raw, crowded ? Series::Style::faint_line : Series::Style::dots, color));
  plot.series.push_back(series(with_last("smoothed", smooth), smooth, Series::Style::line, color));
  return plot;
}

// Pictures are drawn about as large as a wide screen shows them, so that their text has the page's size.
constexpr int kWideWidth = 1080, kWideHeight = 330, kWidth = 530, kHeight = 260;

void plot_card(std::string& out, Plot plot, bool wide = false) {
  plot.width = wide ? kWideWidth : kWidth;
  plot.height = wide ? kWideHeight : kHeight;
  out += fmt::format("<div class=\"card{}\">{}</div>\n", wide ? " wide" : "", render_plot(plot, false));
}

std::string plots(const Metrics& m) {
  std::string out = "<h2>Curves</h2>\n<section class=\"plots\">\n";
  const MetricColumn& smooth_loss = m.column("smooth_loss");
  Plot loss = raw_and_smooth("Training loss", "nats per token", m.column("loss"),
                             smooth_loss.empty() ? smoothed(m.column("loss")) : smooth_loss, 0);
  plot_card(out, loss, true);

  Plot bpb{"Validation", "step", "bits per byte", {}};
  bpb.series.push_back(
      series(with_last("validation", m.column("val_bpb")), m.column("val_bpb"), Series::Style::line, 1));
  plot_card(out, bpb);

  const MetricColumn& speed = m.column("tok_per_sec");
  Plot throughput = raw_and_smooth("Throughput", "tokens per second", speed, smoothed(speed), 2);
  throughput.zero_based = true;
  plot_card(out, throughput);

  Plot rate{"Learning rate", "step", "multiple of the base rate", {}};
  rate.zero_based = true;
  const auto& lr = m.column("lr_mult");
  // A schedule is a curve, not a set of points: no markers on it.
  rate.series.push_back(series("", lr, Series::Style::line, 3));
  plot_card(out, rate);

  const auto& norm = m.column("grad_norm");
  if (const auto low = lowest(norm), high = highest(norm); low && high) {
    Plot gradient = raw_and_smooth("Gradient norm", "L2 norm", norm, smoothed(norm), 4);
    gradient.log_y = *low > 0 && *high / *low > 100;
    plot_card(out, gradient);
  } else if (!m.column("mem_mb").empty()) {
    Plot memory{"Memory", "step", "MB", {}};
    memory.zero_based = true;
    memory.series.push_back(series("", m.column("mem_mb"), Series::Style::line, 5));
    plot_card(out, memory);
  }
  return out + "</section>\n";
}

// ---- text ----------------------------------------------------------------------------------------------

void sample_card(std::string& out, const SampleText& s) {
  std::string_view rest = s.text;
  if (rest.starts_with(s.prompt)) rest.remove_prefix(s.prompt.size());
  out += fmt::format(
      "<div class=\"card\"><div class=\"tag\">step {}</div><pre><span "
      "class=\"prompt\">{}</span>{}</pre></div>\n",
      format_count(s.step), escape_xml(s.prompt), escape_xml(rest));
}

std::string samples(const Metrics& metrics) {
  if (metrics.samples.empty()) return "";
  const int64_t newest = metrics.samples.back().step;
  std::string now, before;
  for (auto s = metrics.samples.rbegin(); s != metrics.samples.rend(); ++s) {
    if (s->step != newest) sample_card(before, *s);
  }
  for (const auto& s : metrics.samples) {
    if (s.step == newest) sample_card(now, s);
  }
  std::string out = "<h2>Samples</h2>\n<section class=\"samples\">\n" + now + "</section>\n";
  if (!before.empty()) {
    out += "<details><summary>Earlier samples</summary><section class=\"samples\">\n" + before +
           "</section></details>\n";
  }
  return out;
}

std::string value_text(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_null()) return "\xE2\x80\x93";
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_number_float()) return format_number(value.get<double>());
  if (value.is_array()) {
    std::string out;
    for (const auto& item : value) out += (out.empty() ? "" : ", ") + value_text(item);
    return out;
  }
  if (value.is_object()) {
    std::string out;
    for (const auto& item : value.items())
      out += (out.empty() ? "" : ", ") + item.key() + " " + value_text(item.value());
    return out;
  }
  return value.dump();
}

// Nested objects become rows "outer inner"; *_bytes are shown with units.
void rows(const Json& object, const std::string& prefix, std::string& out) {
  for (const auto& item : object.items()) {
    std::string key = item.key();
    const Json& value = item.value();
    if (value.is_object()) {
      rows(value, prefix + key + " ", out);
      continue;
    }
    std::string shown_value = value_text(value);
    constexpr std::string_view kBytes = "_bytes";
    if (key.ends_with(kBytes) && (value.is_number() || value.is_null())) {
      key.resize(key.size() - kBytes.size());
      if (value.is_number()) shown_value = format_bytes(value.get<double>());
    }
    out +=
        fmt::format("<tr><td>{}</td><td>{}</td></tr>\n", escape_xml(prefix + key), escape_xml(shown_value));
  }
}

void table_card(std::string& out, const std::string& title, const Json& object) {
  if (!object.is_object() || object.empty()) return;
  std::string body;
  rows(object, "", body);
  out += fmt::format("<div class=\"card\"><h3>{}</h3><table>{}</table></div>\n", title, body);
}

std::string header(const std::string& title, const Json& summary, const Json& environment) {
  std::string out = "<header><h1>" + escape_xml(title);
  if (const std::string status = text(summary, "status"); !status.empty()) {
    out += "<span class=\"chip\">" + escape_xml(status) + "</span>";
  }
  out += "</h1>\n";
  std::vector<std::string> facts;
  const auto add = [&](const std::string& label, const std::string& value) {
    if (!value.empty() && value != "unknown") facts.push_back(label + value);
  };
  add("", text(environment, "date"));
  std::string commit = text(environment, "commit");
  const Json* dirty = find(environment, "dirty");
  const bool changed = dirty && dirty->is_boolean() && dirty->get<bool>();
  if (commit != "unknown") commit = commit.substr(0, 12) + (changed ? " with local changes" : "");
  add("flexchat ", text(environment, "version"));
  if (!text(environment, "commit").empty()) add("commit ", commit);
  if (const Json* cpu = find(environment, "cpu")) add("", text(*cpu, "name"));
  if (!facts.empty()) out += "<p class=\"sub\">" + escape_xml(join(facts, " \xC2\xB7 ")) + "</p>\n";
  if (const std::string command = text(environment, "command"); !command.empty()) {
    out += "<pre class=\"cmd\">" + escape_xml(command) + "</pre>\n";
  }
  return out + "</header>\n";
}

std::string page(const std::string& title, const std::string& body) {
  return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>" +
         escape_xml(title) + "</title>\n<style>" + std::string(kPageStyle) + std::string(plot_style()) +
         "</style></head>\n<body><main>\n" + body + "</main></body></html>\n";
}

std::string run_name(const fs::path& run_dir, const Json& summary) {
  const std::string id = text(summary, "run_id");
  return id.empty() ? fs::absolute(run_dir).lexically_normal().filename().string() : id;
}

// One plot with a line for each run; runs without the column are left out.
Plot overlay(const std::string& title, const std::string& y_label, const std::string& key,
             const std::vector<std::pair<std::string, Metrics>>& runs) {
  Plot plot{title, "step", y_label, {}};
  int color = 0;
  for (const auto& [name, metrics] : runs) {
    const MetricColumn& column = metrics.column(key);
    if (!column.empty()) {
      plot.series.push_back(series(with_last(name, column), column, Series::Style::line, color));
    }
    color = (color + 1) % 6;
  }
  return plot;
}

Json read_json(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return Json::object();
  Json parsed = Json::parse(read_file(path), nullptr, false);
  check(!parsed.is_discarded(), "{}: not valid JSON", path.string());
  return parsed;
}

}  // namespace

std::string train_report_html(const std::string& title, const Json& summary, const Json& config,
                              const Metrics& metrics) {
  const Json* found = find(summary, "environment");
  Json environment = found && found->is_object() ? *found : Json::object();
  std::string out =
      header(title, summary, environment) + cards(summary, metrics) + plots(metrics) + samples(metrics);
  environment.erase("command");  // stands above
  std::string tables;
  table_card(tables, "Configuration", config);
  table_card(tables, "Environment", environment);
  if (!tables.empty())
    out += "<h2>How it was made</h2>\n<section class=\"tables\">\n" + tables + "</section>\n";
  out += "<footer>Written by flexchat.";
  if (metrics.bad_lines > 0) {
    out += fmt::format(" {} unreadable {} of metrics.jsonl left out.", metrics.bad_lines,
                       metrics.bad_lines == 1 ? "line" : "lines");
  }
  return page(title, out + "</footer>\n");
}

std::string compare_report_html(const std::vector<fs::path>& run_dirs) {
  std::vector<std::pair<std::string, Metrics>> runs;
  std::string table =
      "<tr><td>run</td><td>device, dtype, attention</td><td>steps</td><td>final loss</td>"
      "<td>val bpb</td><td>tok/s</td><td>peak memory</td></tr>\n";
  for (const fs::path& dir : run_dirs) {
    std::error_code error;
    check(fs::is_directory(dir, error), "{}: no such run folder", dir.string());
    const Json summary = read_json(dir / "summary.json"), config = read_json(dir / "config.json");
    const std::string name = run_name(dir, summary);
    runs.emplace_back(name, read_metrics(dir / "metrics.jsonl"));
    const Json* results = find(summary, "results");
    const auto cell = [&](const char* key, const auto& format) {
      const auto value = results ? number(*results, key) : std::nullopt;
      table += "<td>" + (value ? escape_xml(format(*value)) : std::string("-")) + "</td>";
    };
    std::vector<std::string> how;
    for (const char* key : {"device", "dtype", "attention"}) {
      if (const std::string word = text(config, key); !word.empty()) how.push_back(word);
    }
    table += "<tr><td>" + escape_xml(name) + "</td><td>" + escape_xml(join(how)) + "</td>";
    const auto fixed4 = [](double v) { return fmt::format("{:.4f}", v); };
    cell("steps", short_count);
    cell("final_loss", fixed4);
    cell("val_bpb", fixed4);
    cell("tok_per_sec", short_count);
    cell("peak_memory_bytes", format_bytes);
    table += "</tr>\n";
  }
  std::string out = fmt::format("<header><h1>{} runs beside each other</h1></header>\n", runs.size());
  out += "<section class=\"plots\">\n";
  plot_card(out, overlay("Training loss", "nats per token", "loss", runs), true);
  plot_card(out, overlay("Validation", "bits per byte", "val_bpb", runs));
  Plot speed = overlay("Throughput", "tokens per second", "tok_per_sec", runs);
  speed.zero_based = true;
  plot_card(out, speed);
  out += "</section>\n<h2>Results</h2>\n<div class=\"card\"><table>" + table + "</table></div>\n";
  return page("Runs beside each other", out + "<footer>Written by flexchat.</footer>\n");
}

fs::path render_train_report(const fs::path& run_dir) {
  std::error_code error;
  check(fs::is_directory(run_dir, error), "{}: no such run folder", run_dir.string());
  const Json summary = read_json(run_dir / "summary.json");
  const Json config = read_json(run_dir / "config.json");
  const Metrics metrics = read_metrics(run_dir / "metrics.jsonl");
  const fs::path file = run_dir / "report.html";
  write_file_atomic(
      file, train_report_html("Training run " + run_name(run_dir, summary), summary, config, metrics));
  return file;
}

}  // namespace flexchat
