#include "report/table.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>

#include "base/error.h"

namespace flexchat {
namespace {

// Columns of a terminal that `text` fills, taking every code point for one.
size_t display_width(std::string_view text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

std::string pad(std::string_view text, size_t width, bool right) {
  const std::string fill(width - std::min(width, display_width(text)), ' ');
  return right ? fill + std::string(text) : std::string(text) + fill;
}

std::string one_line(std::string_view text) {
  std::string out(text);
  std::replace_if(
      out.begin(), out.end(), [](char c) { return c == '\n' || c == '\r' || c == '\t'; }, ' ');
  return out;
}

}  // namespace

bool looks_numeric(std::string_view cell) {
  for (std::string_view word : {"", "-", "nan", "inf", "-inf"}) {
    if (cell == word) return true;
  }
  std::string plain;
  std::copy_if(cell.begin(), cell.end(), std::back_inserter(plain), [](char c) { return c != ','; });
  double value = 0;
  const auto [end, error] = std::from_chars(plain.data(), plain.data() + plain.size(), value);
  if (error != std::errc{}) return false;
  const std::string_view unit(end, static_cast<size_t>(plain.data() + plain.size() - end));
  return unit.size() <= 8 &&
         std::none_of(unit.begin(), unit.end(), [](char c) { return c >= '0' && c <= '9'; });
}

void Table::row(std::vector<std::string> cells) {
  check(cells.size() == headers_.size(), "a table of {} columns got a row of {}", headers_.size(),
        cells.size());
  for (std::string& cell : cells) cell = one_line(cell);
  rows_.push_back(std::move(cells));
}

std::vector<bool> Table::right_aligned() const {
  std::vector<bool> right(headers_.size());
  for (size_t c = 0; c < headers_.size(); ++c) {
    right[c] = !rows_.empty() &&
               std::all_of(rows_.begin(), rows_.end(), [&](const auto& r) { return looks_numeric(r[c]); });
  }
  return right;
}

std::string Table::text(std::string_view indent) const {
  const std::vector<bool> right = right_aligned();
  std::vector<size_t> width;
  for (size_t c = 0; c < headers_.size(); ++c) {
    size_t w = display_width(headers_[c]);
    for (const auto& r : rows_) w = std::max(w, display_width(r[c]));
    width.push_back(w);
  }
  std::string out;
  const auto line = [&](const auto& cell) {
    std::string text(indent);
    for (size_t c = 0; c < headers_.size(); ++c) text += (c ? "  " : "") + cell(c);
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  };
  line([&](size_t c) { return pad(headers_[c], width[c], right[c]); });
  line([&](size_t c) { return std::string(width[c], '-'); });
  for (const auto& r : rows_) line([&](size_t c) { return pad(r[c], width[c], right[c]); });
  return out;
}

std::string Table::markdown() const {
  const std::vector<bool> right = right_aligned();
  std::string out = "|";
  for (const auto& header : headers_) out += " " + escape_markdown(header) + " |";
  out += "\n|";
  for (bool r : right) out += r ? " ---: |" : " --- |";
  out += "\n";
  for (const auto& row : rows_) {
    out += "|";
    for (const auto& cell : row) out += " " + escape_markdown(cell) + " |";
    out += "\n";
  }
  return out;
}

std::string format_number(double value, int digits) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  if (value == std::floor(value) && std::abs(value) < 1e15) return fmt::format("{:.0f}", value);
  return fmt::format("{:.{}g}", value, digits);
}

std::string escape_markdown(std::string_view text) {
  const std::string line = one_line(text);
  const auto word_at = [&](size_t i) {
    return i < line.size() && std::isalnum(static_cast<unsigned char>(line[i]));
  };
  std::string out;
  for (size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '&') {
      out += "&amp;";
    } else {
      const bool inside_word = i > 0 && word_at(i - 1) && word_at(i + 1);  // max_abs is not emphasis
      if (c == '|' || c == '\\' || c == '`' || c == '*' || (c == '_' && !inside_word)) out += '\\';
      out += c;
    }
  }
  return out;
}

}  // namespace flexchat
