// The readable form of a run's summary.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "report/run_folder.h"
#include "report/table.h"

namespace flexchat {
namespace {

std::string heading(const std::string& key) {
  std::string text = key;
  std::replace(text.begin(), text.end(), '_', ' ');
  if (!text.empty()) text[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(text[0])));
  return text;
}

std::string cell(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_null()) return "-";
  if (value.is_number_float()) return format_number(value.get<double>());
  if (value.is_array()) {
    std::string out;
    for (const auto& item : value) out += (out.empty() ? "" : ", ") + cell(item);
    return out;
  }
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

bool is_row_list(const Json& value) {
  return value.is_array() && !value.empty() &&
         std::all_of(value.begin(), value.end(), [](const Json& item) { return item.is_object(); });
}

std::string table_of_rows(const Json& rows) {
  std::vector<std::string> columns;
  for (const auto& row : rows) {
    for (const auto& item : row.items()) {
      if (std::find(columns.begin(), columns.end(), item.key()) == columns.end())
        columns.push_back(item.key());
    }
  }
  Table table(columns);
  for (const auto& row : rows) {
    std::vector<std::string> cells;
    for (const auto& column : columns) cells.push_back(row.contains(column) ? cell(row[column]) : "");
    table.row(cells);
  }
  return table.markdown();
}

// One object as a section: its scalars in a table, then its lists of rows and its objects as sections of
// their own.
void section(const Json& object, const std::string& title, size_t level, std::string& out) {
  if (!title.empty())
    out += "\n" + std::string(std::min<size_t>(level, 6), '#') + " " + escape_markdown(title) + "\n";
  Table scalars({"", "value"});
  for (const auto& item : object.items()) {
    if (!item.value().is_object() && !is_row_list(item.value()))
      scalars.row({item.key(), cell(item.value())});
  }
  if (scalars.size() > 0) out += "\n" + scalars.markdown();
  for (const auto& item : object.items()) {
    if (is_row_list(item.value())) {
      out += "\n" + std::string(std::min<size_t>(level + 1, 6), '#') + " " +
             escape_markdown(heading(item.key())) + "\n\n" + table_of_rows(item.value());
    } else if (item.value().is_object()) {
      section(item.value(), heading(item.key()), level + 1, out);
    }
  }
}

std::string fence_for(const std::string& text) {
  std::string fence = "```";
  while (text.find(fence) != std::string::npos) fence += '`';
  return fence;
}

}  // namespace

std::string render_run_markdown(const Json& summary) {
  const auto text_of = [&](const Json& object, const char* key) {
    return object.contains(key) && object[key].is_string() ? object[key].get<std::string>() : std::string();
  };
  std::string out = "# " + escape_markdown(text_of(summary, "kind")) + " run " +
                    escape_markdown(text_of(summary, "run_id")) + "\n";
  Json rest = summary;
  rest.erase("kind");
  rest.erase("run_id");
  Json environment =
      rest.contains("environment") && rest["environment"].is_object() ? rest["environment"] : Json::object();
  rest.erase("environment");
  if (const std::string command = text_of(environment, "command"); !command.empty()) {
    const std::string fence = fence_for(command);
    out += "\n" + fence + "\n" + command + "\n" + fence + "\n";
    environment.erase("command");
  }
  section(rest, "", 1, out);
  if (!environment.empty()) section(environment, "Environment", 2, out);
  return out;
}

}  // namespace flexchat
