#include "checkpoint/state_json.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "base/error.h"
#include "base/strings.h"
#include "checkpoint/safetensors.h"

namespace flexchat {
namespace {

constexpr int kMaxDepth = 64;  // printing and comparing documents recurses

void check_finite(const Json& value, const std::string& source, const std::string& path) {
  if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    fail_run("cannot write {}: '{}' is {}, which JSON cannot hold", source, path, value.get<double>());
  }
  if (value.is_object()) {
    for (const auto& [key, inner] : value.items()) {
      check_finite(inner, source, path.empty() ? key : path + "." + key);
    }
  } else if (value.is_array()) {
    for (size_t i = 0; i < value.size(); ++i) check_finite(value[i], source, fmt::format("{}[{}]", path, i));
  }
}

}  // namespace

Json parse_state_json(std::string_view text, const std::string& source) {
  // The JSON parser takes a zero byte for the end of its input.
  check(text.find('\0') == std::string_view::npos, "{}: not valid JSON: it holds a zero byte", source);
  std::vector<std::set<std::string>> keys;  // of the objects open now
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    check(depth <= kMaxDepth, "{}: nested deeper than {}", source, kMaxDepth);
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      check(keys.back().insert(key).second, "{}: key '{}' appears twice", source, printable_name(key));
    }
    return true;
  };
  Json parsed;
  try {
    parsed = Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::parse_error& e) {
    fail("{}: not valid JSON (near byte {} of {})", source, e.byte, text.size());
  } catch (const Json::exception&) {
    fail("{}: not valid JSON (a number out of range)", source);
  }
  check(parsed.is_object(), "{}: must hold a JSON object, not {}", source, parsed.type_name());
  return parsed;
}

std::string dump_state_json(const Json& state, const std::string& source) {
  check_finite(state, source, "");
  try {
    return state.dump(2) + "\n";
  } catch (const Json::exception&) {
    fail_run("cannot write {}: a string is not valid UTF-8", source);
  }
}

StateReader::StateReader(const Json& object, std::string source, std::string prefix)
    : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {
  check(object_.is_object(), "{}: {} must be an object, not {}", source_,
        prefix_.empty() ? "the top level" : "'" + printable_name(prefix_.substr(0, prefix_.size() - 1)) + "'",
        object_.type_name());
}

bool StateReader::contains(const std::string& key) const { return object_.contains(key); }

const Json& StateReader::value(const std::string& key) const {
  const auto it = object_.find(key);
  if (it == object_.end()) {
    std::vector<std::string> present;
    for (const auto& item : object_.items()) present.push_back(item.key());
    fail("{}: '{}' is missing{}", source_, printable_name(prefix_ + key),
         printable_name(did_you_mean(key, present)));
  }
  return *it;
}

void StateReader::wrong_type(const std::string& key, const char* wanted) const {
  const Json& v = value(key);
  fail("{}: '{}' must be {}, not {}", source_, printable_name(prefix_ + key), wanted,
       v.is_primitive() ? printable_name(v.dump(-1, ' ', false, Json::error_handler_t::replace))
                        : v.type_name());
}

StateReader StateReader::object(const std::string& key) const {
  return StateReader(value(key), source_, prefix_ + key + ".");
}

int64_t StateReader::integer(const std::string& key) const {
  const Json& v = value(key);
  const bool fits = v.is_number_integer() &&
                    (!v.is_number_unsigned() ||
                     v.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
  if (!fits) wrong_type(key, "a 64-bit integer");
  return v.get<int64_t>();
}

uint64_t StateReader::word(const std::string& key) const {
  const Json& v = value(key);
  // A document built in memory may hold a small count as a signed number.
  if (!v.is_number_unsigned() && !(v.is_number_integer() && v.get<int64_t>() >= 0)) {
    wrong_type(key, "an integer of at least 0");
  }
  return v.get<uint64_t>();
}

double StateReader::number(const std::string& key) const {
  const Json& v = value(key);
  if (!v.is_number()) wrong_type(key, "a number");
  return v.get<double>();
}

bool StateReader::flag(const std::string& key) const {
  const Json& v = value(key);
  if (!v.is_boolean()) wrong_type(key, "true or false");
  return v.get<bool>();
}

std::string StateReader::text(const std::string& key) const {
  const Json& v = value(key);
  if (!v.is_string()) wrong_type(key, "a string");
  return v.get<std::string>();
}

}  // namespace flexchat
