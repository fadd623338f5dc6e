#include "report/plot.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "report/table.h"

namespace flexchat {
namespace {

// Values beyond have no place, and smaller ones count as zero: between them no difference or ratio overflows.
constexpr double kHuge = 1e150, kTiny = 1e-150;
constexpr int kColors = 6;

struct Point {
  double x, y;
  bool valid;
};

bool usable(double value, bool log) {
  return std::isfinite(value) && std::abs(value) < kHuge && (!log || value > kTiny);
}
double without_tiny(double value) { return std::abs(value) < kTiny ? 0 : value; }

std::vector<Point> points_of(const Series& s, const Plot& plot) {
  check(s.x.size() == s.y.size(), "plot series '{}': {} x values and {} y values", s.name, s.x.size(),
        s.y.size());
  std::vector<Point> points;
  points.reserve(s.x.size());
  for (size_t i = 0; i < s.x.size(); ++i) {
    if (!usable(s.x[i], plot.log_x)) continue;  // nowhere to place even a gap
    points.push_back({without_tiny(s.x[i]), without_tiny(s.y[i]), usable(s.y[i], plot.log_y)});
  }
  return points;
}

// ---- axes ----------------------------------------------------------------------------------------------

// 12000 -> "12k", 0.05 -> "0.05"; `step` is the distance between ticks and sets the decimals.
std::string tick_label(double value, double step, double largest) {
  if (value == 0) return "0";
  const char* suffix = "";
  double unit = 1;
  if (largest >= 1e15 || largest < 1e-4) return format_number(value, 3);
  for (const auto& [size, text] : {std::pair{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e4, "k"}}) {
    if (largest >= size) {
      unit = size == 1e4 ? 1e3 : size;
      suffix = text;
      break;
    }
  }
  const int decimals = std::clamp(static_cast<int>(-std::floor(std::log10(step / unit) + 1e-9)), 0, 8);
  return fmt::format("{:.{}f}{}", value / unit, decimals, suffix);
}

double nice_step(double span, int wanted) {
  const double rough = span / std::max(1, wanted), power = std::pow(10.0, std::floor(std::log10(rough)));
  const double scaled = rough / power;
  return power * (scaled <= 1 ? 1 : scaled <= 2 ? 2 : scaled <= 5 ? 5 : 10);
}

void linear_ticks(Axis& axis, int wanted) {
  const double step = nice_step(axis.high - axis.low, wanted);
  const double largest = std::max(std::abs(axis.low), std::abs(axis.high));
  const double slack = (axis.high - axis.low) * 1e-9;
  const double first = std::ceil((axis.low - slack) / step);
  for (int i = 0; i <= 4 * wanted; ++i) {
    const double value = (first + i) * step;
    if (value > axis.high + slack) break;
    axis.ticks.push_back({value, tick_label(std::abs(value) < step * 1e-6 ? 0 : value, step, largest)});
  }
}

void log_ticks(Axis& axis, int wanted) {
  const double low = std::log10(axis.low), high = std::log10(axis.high);
  if (high - low < 1) return linear_ticks(axis, wanted);  // within a decade plain numbers read better
  const int every = std::max(1, static_cast<int>(std::ceil((high - low) / std::max(1, wanted))));
  const bool between = high - low < 2.5;  // room for 2 and 5
  for (int e = static_cast<int>(std::floor(low)); e <= static_cast<int>(std::ceil(high)); ++e) {
    for (double factor : {1.0, 2.0, 5.0}) {
      if (factor > 1 ? !between : e % every != 0) continue;
      const double value = factor * std::pow(10.0, e);
      if (value < axis.low * (1 - 1e-9) || value > axis.high * (1 + 1e-9)) continue;
      axis.ticks.push_back({value, tick_label(value, value, value)});
    }
  }
}

// ---- drawing -------------------------------------------------------------------------------------------

// Where the data area lies inside the picture, and how values map to it.
struct Frame {
  double left, top, right, bottom;  // pixels
  Axis x, y;

  static double part(const Axis& a, double v) {
    if (a.log) return (std::log(v) - std::log(a.low)) / (std::log(a.high) - std::log(a.low));
    return (v - a.low) / (a.high - a.low);
  }
  double px(double v) const { return left + part(x, v) * (right - left); }
  double py(double v) const { return bottom - part(y, v) * (bottom - top); }
};

// At most two points for each pixel column: its lowest and its highest, in their order.
std::vector<Point> thin(const std::vector<Point>& points, const Frame& frame) {
  if (static_cast<double>(points.size()) <= 2 * (frame.right - frame.left)) return points;
  std::vector<Point> out;
  for (size_t i = 0; i < points.size();) {
    if (!points[i].valid) {
      out.push_back(points[i++]);
      continue;
    }
    const auto column = std::floor(frame.px(points[i].x));
    size_t lowest = i, highest = i, j = i;
    for (; j < points.size() && points[j].valid && std::floor(frame.px(points[j].x)) == column; ++j) {
      if (points[j].y < points[lowest].y) lowest = j;
      if (points[j].y > points[highest].y) highest = j;
    }
    out.push_back(points[std::min(lowest, highest)]);
    if (lowest != highest) out.push_back(points[std::max(lowest, highest)]);
    i = j;
  }
  return out;
}

std::string draw_series(const Series& s, const std::vector<Point>& all, const Frame& frame) {
  const std::vector<Point> points = thin(all, frame);
  const int color = ((s.color % kColors) + kColors) % kColors;
  const bool dots = s.style == Series::Style::dots;
  std::string path, marks;
  for (size_t i = 0; i < points.size(); ++i) {
    if (!points[i].valid) continue;
    const double x = frame.px(points[i].x), y = frame.py(points[i].y);
    const bool joined = i > 0 && points[i - 1].valid,
               continued = i + 1 < points.size() && points[i + 1].valid;
    if (dots || (!joined && !continued)) {
      path += fmt::format("M{:.1f} {:.1f}h0", x, y);  // a round cap makes it a dot
    } else {
      path += fmt::format("{}{:.1f} {:.1f}", joined ? 'L' : 'M', x, y);
    }
    // Few points are worth marking; the title is the browser's own tooltip.
    if (s.style == Series::Style::line && points.size() <= 60) {
      marks += fmt::format(
          "<circle class=\"fp-m\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"><title>{}: {}</title></circle>", x, y,
          escape_xml(format_number(points[i].x)), escape_xml(format_number(points[i].y, 5)));
    }
  }
  if (path.empty()) return "";
  const char* style = dots ? "fp-dots" : s.style == Series::Style::faint_line ? "fp-faint" : "fp-line";
  return fmt::format("<g class=\"fp-c{}\"><path class=\"{}\" d=\"{}\"/>{}</g>\n", color, style, path, marks);
}

std::string draw_grid(const Plot& plot, const Frame& f) {
  std::string out;
  for (const auto& tick : f.y.ticks) {
    const double y = f.py(tick.value);
    out += fmt::format("<path class=\"fp-grid\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>", f.left, y, f.right);
    out += fmt::format("<text class=\"fp-tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n",
                       f.left - 8, y + 4, escape_xml(tick.label));
  }
  for (const auto& tick : f.x.ticks) {
    const double x = f.px(tick.value);
    out += fmt::format("<path class=\"fp-axis\" d=\"M{:.1f} {:.1f}v4\"/>", x, f.bottom);
    out += fmt::format("<text class=\"fp-tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n",
                       x, f.bottom + 18, escape_xml(tick.label));
  }
  out += fmt::format("<path class=\"fp-axis\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>\n", f.left, f.bottom, f.right);
  out += fmt::format("<text class=\"fp-label\" x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                     (f.left + f.right) / 2, plot.height - 6, escape_xml(plot.x_label));
  const double middle = (f.top + f.bottom) / 2;
  out += fmt::format(
      "<text class=\"fp-label\" x=\"14\" y=\"{:.1f}\" text-anchor=\"middle\" transform=\"rotate(-90 14 "
      "{:.1f})\">{}</text>\n",
      middle, middle, escape_xml(plot.y_label));
  return out;
}

// On the title's line, against the right edge. The keys are characters of the same text, so that whatever
// font the reader has keeps them apart.
std::string draw_legend(const Plot& plot, double right) {
  std::string entries;
  for (const Series& s : plot.series) {
    if (s.name.empty()) continue;
    const int color = ((s.color % kColors) + kColors) % kColors;
    entries += fmt::format("<tspan class=\"fp-c{} {}\"{}>\u25CF</tspan><tspan dx=\"5\">{}</tspan>", color,
                           s.style == Series::Style::line ? "fp-key" : "fp-key fp-pale",
                           entries.empty() ? "" : " dx=\"16\"", escape_xml(s.name));
  }
  if (entries.empty()) return "";
  return fmt::format("<text class=\"fp-legend\" x=\"{:.1f}\" y=\"20\" text-anchor=\"end\">{}</text>\n", right,
                     entries);
}

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();
  void add(double v) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  bool empty() const { return low > high; }
};

Frame make_frame(const Plot& plot, const Range& xs, Range ys) {
  if (plot.zero_based && !plot.log_y) ys.add(0);
  Frame f{0, 44, plot.width - 16.0, plot.height - 46.0, {}, {}};
  if (plot.log_y) {
    const double margin = std::pow(ys.high / ys.low, 0.04);
    f.y = make_axis(ys.low / margin, ys.high * margin, true, 6);
  } else {
    const double margin = 0.05 * (ys.high - ys.low);
    const bool at_zero = plot.zero_based && ys.low == 0;
    f.y = make_axis(at_zero ? 0 : ys.low - margin, ys.high + margin, false, 6);
  }
  f.x = make_axis(xs.low, xs.high, plot.log_x, 7);
  size_t longest = 1;
  for (const auto& tick : f.y.ticks) longest = std::max(longest, tick.label.size());
  f.left = 34 + 6.8 * static_cast<double>(longest);
  return f;
}

constexpr std::string_view kStyle = R"(
.fp{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;--t:#1f2430;--m:#6b7280;--g:#e6e8ec;--a:#b6bbc4;
--c0:#2f6fde;--c1:#d9730d;--c2:#14866d;--c3:#8250c4;--c4:#cf3a4b;--c5:#6b7280}
@media(prefers-color-scheme:dark){.fp{--t:#e6e9ef;--m:#98a1b0;--g:#2a303b;--a:#4a5261;
--c0:#6ea8ff;--c1:#f5a04c;--c2:#4cc9a8;--c3:#b794f6;--c4:#ff7b86;--c5:#98a1b0}}
.fp text{fill:var(--m)}.fp .fp-title{fill:var(--t);font-size:14px;font-weight:600}.fp .fp-tick{font-size:11px;
font-variant-numeric:tabular-nums}.fp .fp-label{font-size:11px}.fp .fp-legend{font-size:12px;fill:var(--t)}
.fp .fp-none{font-size:13px;font-style:italic}
.fp path{fill:none;stroke-linejoin:round;stroke-linecap:round}.fp .fp-grid{stroke:var(--g)}.fp .fp-axis{stroke:var(--a)}
.fp .fp-line{stroke:currentColor;stroke-width:2}.fp .fp-faint{stroke:currentColor;stroke-width:1;opacity:.35}
.fp .fp-dots{stroke:currentColor;stroke-width:4;opacity:.35}.fp .fp-key{fill:currentColor}.fp .fp-pale{fill-opacity:.4}
.fp .fp-m{fill:currentColor}
.fp-c0{color:var(--c0)}.fp-c1{color:var(--c1)}.fp-c2{color:var(--c2)}.fp-c3{color:var(--c3)}.fp-c4{color:var(--c4)}
.fp-c5{color:var(--c5)}
)";

}  // namespace

std::string_view plot_style() { return kStyle; }

std::string escape_xml(std::string_view text) {
  std::string out;
  for (char c : replace_invalid_utf8(text, nullptr)) {
    const auto u = static_cast<unsigned char>(c);
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        if (u < 0x20 && c != '\n' && c != '\t') {
          out += "\xEF\xBF\xBD";  // XML has no way to write most control characters
        } else {
          out += c;
        }
    }
  }
  return out;
}

Axis make_axis(double low, double high, bool log, int wanted) {
  Axis axis;
  axis.log = log;
  if (low > high) std::swap(low, high);
  // Equal for the eye: ticks between them would all print alike.
  if (high - low <= 1e-12 * std::max(std::abs(low), std::abs(high))) {
    const double margin = log ? low * 0.5 : low == 0 ? 1 : std::abs(low) * 0.1;
    low -= margin;
    high += margin;
  }
  axis.low = low;
  axis.high = high;
  log ? log_ticks(axis, wanted) : linear_ticks(axis, wanted);
  return axis;
}

std::string render_plot(const Plot& plot, bool embed_style) {
  std::vector<std::vector<Point>> points;
  Range xs, ys;
  for (const Series& s : plot.series) {
    points.push_back(points_of(s, plot));
    for (const Point& p : points.back()) {
      if (!p.valid) continue;
      xs.add(p.x);
      ys.add(p.y);
    }
  }
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"fp\" viewBox=\"0 0 {} {}\" role=\"img\" "
      "aria-label=\"{}\">\n",
      plot.width, plot.height, escape_xml(plot.title));
  if (embed_style) out += "<style>" + std::string(kStyle) + "</style>\n";
  out += fmt::format("<text class=\"fp-title\" x=\"12\" y=\"20\">{}</text>\n", escape_xml(plot.title));
  if (xs.empty()) {
    out += fmt::format("<text class=\"fp-none\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">no data</text>\n",
                       plot.width / 2, plot.height / 2);
    return out + "</svg>\n";
  }
  const Frame frame = make_frame(plot, xs, ys);
  out += draw_legend(plot, frame.right) + draw_grid(plot, frame);
  for (size_t i = 0; i < plot.series.size(); ++i) out += draw_series(plot.series[i], points[i], frame);
  return out + "</svg>\n";
}

std::string render_plot(const Plot& plot) { return render_plot(plot, true); }

}  // namespace flexchat
