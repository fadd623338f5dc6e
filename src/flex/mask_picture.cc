// SVG by hand: rectangles of one colour are one path, so that large masks stay small files.
#include "flex/mask_picture.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "base/error.h"
#include "base/strings.h"
#include "flex/eval.h"

namespace flexchat::flex {
namespace {

constexpr double plot_size = 640, left = 76, top = 96, right = 28;
constexpr int64_t max_elements = 65536;
constexpr const char* full_colour = "#2b6cb0";
constexpr const char* partial_colour = "#fbd38d";
constexpr const char* element_colour = "#dd6b20";
constexpr const char* empty_colour = "#edf1f5";
constexpr const char* ink = "#1f2933";
constexpr const char* pale_ink = "#61707f";

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else {
      out += c;
    }
  }
  return out;
}

// Rectangles that share a colour.
class Path {
 public:
  void rectangle(double x, double y, double width, double height) {
    fmt::format_to(std::back_inserter(data_), "M{:.6g} {:.6g}h{:.6g}v{:.6g}h{:.6g}z", x, y, width, height,
                   -width);
  }
  std::string element(const char* colour) const {
    return data_.empty() ? "" : fmt::format("<path fill=\"{}\" d=\"{}\"/>\n", colour, data_);
  }

 private:
  std::string data_;
};

std::string text(double x, double y, int size, const char* colour, const char* anchor,
                 const std::string& content) {
  return fmt::format(
      "<text x=\"{:.6g}\" y=\"{:.6g}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{}\">{}</text>\n", x, y,
      size, colour, anchor, escaped(content));
}

// A round distance between ticks: whole blocks, at most about 8 ticks.
int64_t tick_step(int64_t n, int64_t block) {
  int64_t step = block;
  while (n / step > 8) step *= 2;
  return step;
}

// Multiples of `step`, and the end unless it would crowd the last of them.
std::vector<int64_t> tick_places(int64_t n, int64_t step) {
  std::vector<int64_t> places;
  for (int64_t at = 0; at < n; at += step) places.push_back(at);
  if (n > step && n - places.back() > step / 2) places.push_back(n);
  return places;
}

class Drawing {
 public:
  Drawing(const Expr& expr, const Bindings& bindings, const Extent& extent, const BlockMask& mask,
          const Picture& picture)
      : expr_(expr), bindings_(bindings), extent_(extent), mask_(mask), picture_(picture) {
    const double scale = plot_size / static_cast<double>(std::max<int64_t>({extent.n_q, extent.n_kv, 1}));
    // Thin masks, such as decode's single query, get readable rows.
    const auto at_least = [](double s, int64_t n) {
      return std::max(s, 28 / static_cast<double>(std::max<int64_t>(n, 1)));
    };
    sx_ = at_least(scale, extent.n_kv);
    sy_ = at_least(scale, extent.n_q);
    width_ = sx_ * static_cast<double>(extent.n_kv);
    height_ = sy_ * static_cast<double>(extent.n_q);
  }

  std::string svg() {
    const double page_width = left + std::max(width_, 560.0) + right, page_height = top + height_ + 64;
    std::string out = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 "
        "{0:.0f} {1:.0f}\" "
        "font-family=\"ui-sans-serif, system-ui, Helvetica, Arial, sans-serif\">\n<title>{2}</title>\n"
        "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        page_width, page_height, escaped(picture_.title));
    out += heading();
    out += fmt::format("<g transform=\"translate({:.6g} {:.6g})\">\n", left, top);
    out += blocks() + elements() + grid();
    out += fmt::format("<rect width=\"{:.6g}\" height=\"{:.6g}\" fill=\"none\" stroke=\"{}\"/>\n", width_,
                       height_, ink);
    out += axes() + "</g>\n" + legend() + "</svg>\n";
    return out;
  }

 private:
  double x(int64_t kv) const { return sx_ * static_cast<double>(kv); }
  double y(int64_t q) const { return sy_ * static_cast<double>(q); }
  bool draws_elements() const {
    return extent_.q_len(picture_.b) * extent_.kv_len(picture_.b) <= max_elements;
  }

  std::string heading() const {
    const int size = picture_.title.size() > 60 ? 13 : 18;
    std::string line =
        fmt::format("queries: {}, keys: {}, blocks of {} x {}", format_count(extent_.q_len(picture_.b)),
                    format_count(extent_.kv_len(picture_.b)), mask_.block_q, mask_.block_kv);
    if (mask_.n_batch > 1) line += fmt::format(", batch row {}", picture_.b);
    if (mask_.n_head > 1) line += fmt::format(", head {}", picture_.h);
    return fmt::format(
               "<g font-family=\"ui-monospace, Menlo, Consolas, monospace\" font-weight=\"600\">{}</g>",
               text(left, 30, size, ink, "start", picture_.title)) +
           text(left, 52, 13, pale_ink, "start", line);
  }

  // Runs of neighbouring blocks in one list become one rectangle.
  void add_runs(std::span<const int32_t> list, int64_t i, Path& path) const {
    const int64_t q_end = std::min((i + 1) * mask_.block_q, extent_.q_len(picture_.b));
    for (size_t k = 0; k < list.size();) {
      size_t end = k + 1;
      while (end < list.size() && list[end] == list[end - 1] + 1) ++end;
      const int64_t kv = list[k] * mask_.block_kv;
      const int64_t kv_end = std::min((list[end - 1] + 1) * mask_.block_kv, extent_.kv_len(picture_.b));
      path.rectangle(x(kv), y(i * mask_.block_q), x(kv_end) - x(kv), y(q_end) - y(i * mask_.block_q));
      k = end;
    }
  }

  std::string blocks() const {
    Path background, full, partial;
    background.rectangle(0, 0, width_, height_);
    for (int64_t i = 0; i < mask_.n_q_blocks; ++i) {
      add_runs(mask_.full_blocks(picture_.b, picture_.h, i), i, full);
      add_runs(mask_.partial_blocks(picture_.b, picture_.h, i), i, partial);
    }
    return "<g shape-rendering=\"crispEdges\">\n" + background.element(empty_colour) +
           full.element(full_colour) + partial.element(partial_colour) + "</g>\n";
  }

  // The allowed elements of partial blocks, as runs along the keys.
  std::string elements() const {
    if (!draws_elements()) return "";
    Evaluator evaluator({expr_}, bindings_);
    const int64_t b = picture_.b, q_len = extent_.q_len(b), kv_len = extent_.kv_len(b);
    Path path;
    for (int64_t q = 0; q < q_len; ++q) {
      for (const int32_t j : mask_.partial_blocks(b, picture_.h, q / mask_.block_q)) {
        const int64_t end = std::min(kv_len, (j + 1) * mask_.block_kv);
        int64_t begin = -1;  // of the present run
        for (int64_t kv = j * mask_.block_kv; kv <= end; ++kv) {
          const bool on =
              kv < end && evaluator({0, b, picture_.h, extent_.q_offset(b) + q, kv, q_len, kv_len}) != 0;
          if (on && begin < 0) begin = kv;
          if (!on && begin >= 0) {
            path.rectangle(x(begin), y(q), x(kv) - x(begin), y(1));
            begin = -1;
          }
        }
      }
    }
    return "<g shape-rendering=\"crispEdges\">\n" + path.element(element_colour) + "</g>\n";
  }

  // Block borders, where blocks are large enough to tell apart.
  std::string grid() const {
    std::string lines;
    if (x(mask_.block_kv) >= 8) {
      for (int64_t j = 1; j < mask_.n_kv_blocks; ++j)
        lines += fmt::format("M{:.6g} 0v{:.6g}", x(j * mask_.block_kv), height_);
    }
    if (y(mask_.block_q) >= 8) {
      for (int64_t i = 1; i < mask_.n_q_blocks; ++i)
        lines += fmt::format("M0 {:.6g}h{:.6g}", y(i * mask_.block_q), width_);
    }
    if (lines.empty()) return "";
    return fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"#ffffff\" stroke-opacity=\"0.65\"/>\n", lines);
  }

  std::string axes() const {
    std::string out, ticks;
    const int64_t kv_step = tick_step(extent_.n_kv, mask_.block_kv),
                  q_step = tick_step(extent_.n_q, mask_.block_q);
    for (const int64_t kv : tick_places(extent_.n_kv, kv_step)) {
      out += text(x(kv), -10, 12, pale_ink, "middle", std::to_string(kv));
      ticks += fmt::format("M{:.6g} 0v-5", x(kv));
    }
    for (const int64_t q : tick_places(extent_.n_q, q_step)) {
      out += text(-10, y(q) + 4, 12, pale_ink, "end", std::to_string(extent_.q_offset(picture_.b) + q));
      ticks += fmt::format("M0 {:.6g}h-5", y(q));
    }
    out += fmt::format("<path d=\"{}\" stroke=\"{}\"/>\n", ticks, pale_ink);
    out += text(width_, -28, 13, ink, "end", "key position kv \u2192");
    return out + fmt::format("<g transform=\"translate(-56 0) rotate(-90)\">{}</g>\n",
                             text(0, 0, 13, ink, "end", height_ > 150 ? "\u2190 query position q" : "q"));
  }

  std::string legend() const {
    int64_t full = 0, partial = 0;
    for (int64_t i = 0; i < mask_.n_q_blocks; ++i) {
      full += static_cast<int64_t>(mask_.full_blocks(picture_.b, picture_.h, i).size());
      partial += static_cast<int64_t>(mask_.partial_blocks(picture_.b, picture_.h, i).size());
    }
    const int64_t all = mask_.n_q_blocks * mask_.n_kv_blocks;
    const auto share = [all](int64_t n) {
      return all == 0 ? 0 : 100 * static_cast<double>(n) / static_cast<double>(all);
    };
    const double line = top + height_ + 34;
    double at = left;
    std::string out;
    const auto entry = [&](const char* colour, const std::string& label) {
      out +=
          fmt::format("<rect x=\"{:.6g}\" y=\"{:.6g}\" width=\"13\" height=\"13\" rx=\"2\" fill=\"{}\"/>\n",
                      at, line - 11, colour);
      out += text(at + 19, line, 13, ink, "start", label);
      at += 40 + 7.0 * static_cast<double>(label.size());
    };
    entry(full_colour, fmt::format("full {} ({:.1f}%)", format_count(full), share(full)));
    entry(partial_colour, fmt::format("partial {} ({:.1f}%)", format_count(partial), share(partial)));
    if (draws_elements() && partial > 0) entry(element_colour, "allowed element");
    entry(empty_colour,
          fmt::format("empty {} ({:.1f}%)", format_count(all - full - partial), share(all - full - partial)));
    return out;
  }

  const Expr& expr_;
  const Bindings& bindings_;
  const Extent& extent_;
  const BlockMask& mask_;
  const Picture& picture_;
  double sx_, sy_, width_, height_;
};

void check_row(const Extent& extent, const Picture& picture) {
  check(picture.b >= 0 && picture.b < extent.n_batch, "batch row {} of {}", picture.b, extent.n_batch);
  check(picture.h >= 0 && picture.h < extent.n_head, "head {} of {}", picture.h, extent.n_head);
}

}  // namespace

std::string mask_svg(const Expr& expr, const Bindings& bindings, const Extent& extent, const BlockMask& mask,
                     const Picture& picture) {
  check_row(extent, picture);
  return Drawing(expr, bindings, extent, mask, picture).svg();
}

std::string mask_text(const BlockMask& mask, int64_t b, int64_t h) {
  std::string out;
  for (int64_t i = 0; i < mask.n_q_blocks; ++i) {
    std::string line(static_cast<size_t>(mask.n_kv_blocks), '.');
    for (const int32_t j : mask.full_blocks(b, h, i)) line[static_cast<size_t>(j)] = '#';
    for (const int32_t j : mask.partial_blocks(b, h, i)) line[static_cast<size_t>(j)] = '+';
    out += line + '\n';
  }
  return out;
}

}  // namespace flexchat::flex
