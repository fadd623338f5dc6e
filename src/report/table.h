// Small tables for terminals and markdown. A column whose cells are all numbers (a unit may follow) stands
// right-aligned; other columns stand left.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

class Table {
 public:
  explicit Table(std::vector<std::string> headers) : headers_(std::move(headers)) {}

  // As many cells as there are headers; throws Error otherwise.
  void row(std::vector<std::string> cells);
  size_t size() const { return rows_.size(); }

  std::string text(std::string_view indent = "") const;  // aligned columns under a rule; ends with a newline
  std::string markdown() const;                          // GitHub table; ends with a newline

 private:
  std::vector<bool> right_aligned() const;
  std::vector<std::string> headers_;
  std::vector<std::vector<std::string>> rows_;
};

// True for "1,234", "-3.5e-06", "12.5%", "1.5 KiB", "nan", "-" and "".
bool looks_numeric(std::string_view cell);

// A number for people: integers whole, others with `digits` significant digits, NaN and infinities in words.
std::string format_number(double value, int digits = 6);

// One line that markdown shows as plain text inside a table cell.
std::string escape_markdown(std::string_view text);

}  // namespace flexchat
