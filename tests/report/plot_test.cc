// Ticks, well-formed SVG for ordinary and awkward data, thinning.
#include "report/plot.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"
#include "report/xml_check.h"

namespace flexchat {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

std::vector<std::string> labels(const Axis& axis) {
  std::vector<std::string> out;
  for (const auto& tick : axis.ticks) out.push_back(tick.label);
  return out;
}
using Labels = std::vector<std::string>;

TEST(Axis, NiceLinearTicks) {
  EXPECT_EQ(labels(make_axis(0, 100, false, 5)), (Labels{"0", "20", "40", "60", "80", "100"}));
  EXPECT_EQ(labels(make_axis(0.93, 1.31, false, 5)), (Labels{"1.0", "1.1", "1.2", "1.3"}));
  EXPECT_EQ(labels(make_axis(-1, 1, false, 4)), (Labels{"-1.0", "-0.5", "0", "0.5", "1.0"}));
  EXPECT_EQ(labels(make_axis(0, 25000, false, 5)), (Labels{"0", "5k", "10k", "15k", "20k", "25k"}));
  EXPECT_EQ(labels(make_axis(0, 3e6, false, 6)),
            (Labels{"0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M", "3.0M"}));
}

TEST(Axis, LogTicks) {
  EXPECT_EQ(labels(make_axis(1, 1000, true, 6)), (Labels{"1", "10", "100", "1000"}));
  EXPECT_EQ(labels(make_axis(1, 100, true, 6)), (Labels{"1", "2", "5", "10", "20", "50", "100"}));
  EXPECT_EQ(labels(make_axis(2, 6, true, 4)), (Labels{"2", "3", "4", "5", "6"}));  // within a decade
  EXPECT_LE(make_axis(1e-30, 1e30, true, 6).ticks.size(), 9u);
}

TEST(Axis, EqualAndReversedBoundsAreWidened) {
  for (double v : {0.0, 5.0, -3.0, 1e-9, 1e12, 1e149}) {
    const Axis a = make_axis(v, v, false, 5);
    EXPECT_LT(a.low, a.high) << v;
    EXPECT_LE(a.low, v);
    EXPECT_GE(a.high, v);
    EXPECT_GE(a.ticks.size(), 2u) << v;
  }
  EXPECT_LT(make_axis(4, 4, true, 5).low, 4);
  EXPECT_GT(make_axis(4, 4, true, 5).low, 0);
  EXPECT_EQ(make_axis(9, 1, false, 5).low, 1);
}

TEST(Axis, TicksLieInsideAndRise) {
  for (double low : {-1e5, -1.0, 0.0, 1e-7, 3.3, 1e100}) {
    for (double span : {1e-6, 0.37, 1.0, 12.0, 4.5e7}) {
      const Axis a = make_axis(low, low + span, false, 6);
      ASSERT_LE(a.ticks.size(), 30u);
      for (size_t i = 0; i < a.ticks.size(); ++i) {
        EXPECT_GE(a.ticks[i].value, a.low - 1e-6 * (a.high - a.low));
        EXPECT_LE(a.ticks[i].value, a.high + 1e-6 * (a.high - a.low));
        if (i > 0) {
          EXPECT_GT(a.ticks[i].value, a.ticks[i - 1].value);
        }
      }
    }
  }
}

Plot plot_of(std::vector<double> x, std::vector<double> y) {
  Plot plot{"Loss", "step", "nats", {}};
  plot.series.push_back({"train", std::move(x), std::move(y)});
  return plot;
}

// The d="..." of the first path of this class; "" if there is none.
std::string path_data(const std::string& svg, const std::string& css_class) {
  const std::string start = "class=\"" + css_class + "\" d=\"";
  const size_t at = svg.find(start);
  if (at == std::string::npos) return "";
  return svg.substr(at + start.size(), svg.find('"', at + start.size()) - at - start.size());
}

struct Vertex {
  char command;
  double x, y;
};

// The absolute points "M1 2" and "L3 4" of path data. A coordinate that is no number throws.
std::vector<Vertex> vertices(const std::string& data) {
  std::vector<Vertex> out;
  for (size_t i = 0; i < data.size(); ++i) {
    if (data[i] != 'M' && data[i] != 'L') continue;
    size_t used = 0;
    const double x = std::stod(data.substr(i + 1), &used);
    out.push_back({data[i], x, std::stod(data.substr(i + 1 + used))});
  }
  return out;
}

// Well formed, and every path stays inside the picture.
void expect_sound(const std::string& svg) {
  EXPECT_EQ(xml_problem(svg), "") << svg;
  for (const char* css_class : {"fp-line", "fp-grid", "fp-axis"}) {
    for (const Vertex& v : vertices(path_data(svg, css_class))) {
      EXPECT_TRUE(v.x >= -1 && v.x <= 641 && v.y >= -1 && v.y <= 301) << v.x << " " << v.y << "\n" << svg;
    }
  }
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(Plot, DrawsALineWithLegendLabelsAndTooltips) {
  const std::string svg = render_plot(plot_of({0, 50, 100}, {4, 3, 2}));
  expect_sound(svg);
  EXPECT_NE(svg.find(">Loss</text>"), std::string::npos);
  EXPECT_NE(svg.find(">nats</text>"), std::string::npos);
  EXPECT_NE(svg.find(">train</tspan></text>"), std::string::npos);
  EXPECT_EQ(count(svg, "<circle"), 3u);
  EXPECT_NE(svg.find("<title>50: 3</title>"), std::string::npos);
  EXPECT_NE(svg.find("prefers-color-scheme:dark"), std::string::npos);
  EXPECT_EQ(render_plot(plot_of({0, 1}, {1, 2}), false).find("<style>"), std::string::npos);
}

TEST(Plot, HigherValuesAreDrawnHigher) {
  const std::string svg = render_plot(plot_of({0, 100}, {1, 2}));
  const auto line = vertices(path_data(svg, "fp-line"));
  ASSERT_EQ(line.size(), 2u) << svg;
  EXPECT_LT(line[0].x, line[1].x);
  EXPECT_GT(line[0].y, line[1].y);
}

TEST(Plot, GapsBreakTheLine) {
  const std::string svg = render_plot(plot_of({0, 1, 2, 3, 4}, {1, 2, kNan, 2, 1}));
  expect_sound(svg);
  std::string commands;
  for (const Vertex& v : vertices(path_data(svg, "fp-line"))) commands += v.command;
  EXPECT_EQ(commands, "MLML");
}

TEST(Plot, AwkwardDataGivesSoundPictures) {
  expect_sound(render_plot(plot_of({}, {})));
  EXPECT_NE(render_plot(plot_of({}, {})).find("no data"), std::string::npos);
  EXPECT_NE(render_plot(plot_of({1, 2}, {kNan, kInf})).find("no data"), std::string::npos);
  EXPECT_NE(render_plot(Plot{}).find("no data"), std::string::npos);
  expect_sound(render_plot(plot_of({5}, {2.5})));
  EXPECT_NE(render_plot(plot_of({5}, {2.5})).find("h0"), std::string::npos);  // a dot
  for (double c : {0.0, -7.0, 1e-300, 1e140}) expect_sound(render_plot(plot_of({1, 2, 3}, {c, c, c})));
  expect_sound(render_plot(plot_of({1, 2, 3}, {-1.7e308, 1.7e308, 1})));
  expect_sound(render_plot(plot_of({1, 2, 3}, {-9e149, 9e149, 1e-320})));
  expect_sound(render_plot(plot_of({3, 1, 2}, {1, 2, 3})));  // not sorted
  expect_sound(render_plot(plot_of({kNan, 1, kInf}, {1, 2, 3})));
}

TEST(Plot, LogAxesLeaveOutWhatTheyCannotShow) {
  Plot plot = plot_of({0, 1, 10, 100}, {5, 0, 1e-3, 1e3});
  plot.log_x = plot.log_y = true;
  const std::string svg = render_plot(plot);
  expect_sound(svg);
  EXPECT_EQ(count(svg, "<circle"), 2u);
  plot.series[0].y = {-1, -1, -1, -1};
  EXPECT_NE(render_plot(plot).find("no data"), std::string::npos);
}

TEST(Plot, ZeroBasedAxesBeginAtZero) {
  Plot plot = plot_of({0, 1}, {900, 1000});
  EXPECT_EQ(render_plot(plot).find(">0</text>\n<path class=\"fp-grid\""), std::string::npos);
  plot.zero_based = true;
  EXPECT_NE(render_plot(plot).find(">0</text>\n<path class=\"fp-grid\""), std::string::npos);
}

TEST(Plot, LongSeriesAreThinnedButKeepTheirSpikes) {
  std::vector<double> x, y;
  for (int i = 0; i < 200000; ++i) {
    x.push_back(i);
    y.push_back(1 + 0.1 * std::sin(i));
  }
  y[123457] = 50;
  const std::string svg = render_plot(plot_of(x, y));
  expect_sound(svg);
  EXPECT_LT(svg.size(), 60000u);
  Plot frame = plot_of({0, 199999}, {0.9, 50});  // the same ranges: the spike must reach the same height
  const double top = vertices(path_data(render_plot(frame), "fp-line")).at(1).y;
  double highest = 1e9;
  for (const Vertex& v : vertices(path_data(svg, "fp-line"))) highest = std::min(highest, v.y);
  EXPECT_NEAR(highest, top, 0.11);
}

TEST(Plot, TextIsEscaped) {
  Plot plot = plot_of({0, 1}, {1, 2});
  plot.title = "<script>alert('1') & \"2\"</script>\xff\x01";
  plot.series[0].name = "a<b";
  const std::string svg = render_plot(plot);
  expect_sound(svg);
  EXPECT_EQ(svg.find("<script"), std::string::npos);
}

TEST(Plot, UnequalColumnsAreAnError) { EXPECT_THROW(render_plot(plot_of({1, 2}, {1})), Error); }

}  // namespace
}  // namespace flexchat
