// Drawing of progress lines. The rate and the ETA come from what was done since the first update.
#include "base/progress.h"

#include <fmt/core.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "base/strings.h"

namespace flexchat {
namespace {

using std::chrono::steady_clock;
constexpr auto kRedraw = std::chrono::milliseconds(100), kPlainLine = std::chrono::milliseconds(5000);

double seconds_since(steady_clock::time_point t) {
  return std::chrono::duration<double>(steady_clock::now() - t).count();
}

size_t terminal_width() {
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col < 20) return 80;
  return size.ws_col;
}

std::string bar(double fraction) {
  constexpr int kCells = 20;
  const int full = static_cast<int>(fraction * kCells);
  return "[" + std::string(static_cast<size_t>(full), '#') +
         std::string(static_cast<size_t>(kCells - full), '.') + "]";
}

// Cut to `width` bytes, never inside a UTF-8 sequence.
std::string clip(std::string line, size_t width) {
  if (line.size() <= width) return line;
  while (width > 0 && (static_cast<unsigned char>(line[width]) & 0xC0u) == 0x80u) --width;
  line.resize(width);
  return line;
}

// Three significant digits; whole numbers get separators.
std::string format_rate(double rate) {
  return rate < 1000 ? fmt::format("{:.3g}", rate) : format_count(static_cast<int64_t>(rate));
}

}  // namespace

Progress::Progress(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      start_(steady_clock::now()),
      drawn_(start_),
      terminal_(::isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  try {
    finish();
  } catch (...) {  // out of memory while unwinding: the line is lost, nothing else
  }
}

void Progress::update(int64_t done, const std::string& note) {
  const auto now = steady_clock::now();
  const bool first = start_done_ < 0;
  if (first) {  // what was there before (a resumed run) must not count into the rate
    start_done_ = done;
    start_ = now;
  }
  done_ = done;
  note_ = note;
  if (terminal_ ? first || now - drawn_ >= kRedraw : now - drawn_ >= kPlainLine) draw(false);
}

void Progress::message(const std::string& line) {
  fmt::print(stderr, "{}{}\n", terminal_ ? "\r\033[K" : "", line);
  if (terminal_ && start_done_ >= 0 && !finished_) draw(false);
}

void Progress::finish() {
  if (finished_) return;
  finished_ = true;
  if (start_done_ >= 0) draw(true);
}

void Progress::draw(bool last) {
  const double elapsed = seconds_since(start_);
  const double rate = elapsed > 0 ? static_cast<double>(done_ - start_done_) / elapsed : 0;
  std::string line = label_;
  if (total_ > 0) {
    const double fraction = std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0.0, 1.0);
    if (terminal_) line += " " + bar(fraction);
    line += fmt::format(" {:3}%  {}/{} {}", static_cast<int>(100 * fraction), format_count(done_),
                        format_count(total_), unit_);
  } else {
    line += fmt::format("  {} {}", format_count(done_), unit_);
  }
  if (rate > 0) line += fmt::format("  {} {}/s", format_rate(rate), unit_);
  if (last) {
    line += "  in " + format_duration(elapsed);
  } else if (total_ > 0 && rate > 0) {
    line += "  ETA " + format_duration(static_cast<double>(std::max<int64_t>(total_ - done_, 0)) / rate);
  }
  if (!note_.empty()) line += "  " + note_;
  if (terminal_) {
    fmt::print(stderr, "\r\033[K{}{}", clip(std::move(line), terminal_width() - 1), last ? "\n" : "");
  } else {
    fmt::print(stderr, "{}\n", line);
  }
  std::fflush(stderr);
  drawn_ = steady_clock::now();
}

}  // namespace flexchat
