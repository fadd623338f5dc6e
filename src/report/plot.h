// Line plots as SVG text. Colours come from CSS classes with a light and a dark form, so a plot reads well on
// either page.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

struct Series {
  enum class Style { line, dots, faint_line };  // faint: raw values behind a smoothed line

  std::string name;          // legend; "" = not listed
  std::vector<double> x, y;  // same length; NaN, infinite and (on a log axis) non-positive values are gaps
  Style style = Style::line;
  int color = 0;  // 0..5: blue, orange, green, purple, red, grey
};

struct Plot {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  bool log_x = false, log_y = false;
  bool zero_based = false;  // the y axis begins at zero (linear axes)
  int width = 640, height = 300;
};

// One <svg> element. Series longer than the plot is wide are thinned to each column's lowest and highest
// value, so spikes stay visible. Without any finite point it says "no data". Throws Error if x and y differ
// in length.
std::string render_plot(const Plot& plot);

// The rules that the classes in a plot refer to; render_plot puts them into the SVG unless `embed_style` is
// false.
std::string render_plot(const Plot& plot, bool embed_style);
std::string_view plot_style();

// Text for XML and HTML: &, <, >, quotes escaped; control characters and invalid UTF-8 replaced.
std::string escape_xml(std::string_view text);

// An axis: its range and the ticks to label.
struct Axis {
  double low = 0, high = 1;  // low < high
  bool log = false;
  struct Tick {
    double value;
    std::string label;
  };
  std::vector<Tick> ticks;
};
// An axis over [low, high] with about `wanted` ticks at 1, 2 or 5 times a power of ten. Equal or reversed
// bounds are widened. A log axis needs low > 0.
Axis make_axis(double low, double high, bool log, int wanted);

}  // namespace flexchat
