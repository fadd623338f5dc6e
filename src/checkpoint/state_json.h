// Reading JSON that a checkpoint carries: strict parsing, and typed access whose errors name the file and the
// key ("state.json: 'data.position' must be an integer, not a string").
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "base/options.h"

namespace flexchat {

// A JSON object. Throws Error naming `source` on syntax errors (with the byte), a top level that is no
// object, duplicate keys, and nesting deeper than 64.
Json parse_state_json(std::string_view text, const std::string& source);

// Text that parse_state_json reads back to the same values, doubles bit for bit. Throws RunError naming the
// key if a number is NaN or infinite, which JSON cannot hold, or a string is not UTF-8.
std::string dump_state_json(const Json& state, const std::string& source);

// A view of one JSON object; it must outlive the view.
class StateReader {
 public:
  StateReader(const Json& object, std::string source) : StateReader(object, std::move(source), "") {}

  bool contains(const std::string& key) const;
  StateReader object(const std::string& key) const;
  int64_t integer(const std::string& key) const;
  uint64_t word(const std::string& key) const;  // an integer >= 0, all 64 bits
  double number(const std::string& key) const;
  bool flag(const std::string& key) const;
  std::string text(const std::string& key) const;
  const Json& value(const std::string& key) const;  // anything, but present

 private:
  StateReader(const Json& object, std::string source, std::string prefix);
  [[noreturn]] void wrong_type(const std::string& key, const char* wanted) const;

  const Json& object_;
  std::string source_, prefix_;
};

}  // namespace flexchat
