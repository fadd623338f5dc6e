// The option machinery. CLI11 decides which words belong to which option; it sees the options' names but only
// placeholders for their values, so no value is ever taken apart by its quoting, bracket or escape rules, and
// every message about a value is written here.
#include "base/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

constexpr size_t kHelpColumn = 32, kHelpWidth = 104;
// Placeholders are a word's index, marked where the word is not simply the value.
constexpr char kOther[] = "--@";   // a word that starts with '-' and is no option
constexpr char kAttached[] = "=";  // a word "--name=value"

bool looks_negative(const std::string& word) {  // -1, -.5
  return word.size() > 1 && word[0] == '-' && (word[1] == '.' || (word[1] >= '0' && word[1] <= '9'));
}

std::optional<bool> parse_bool(const std::string& text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  return std::nullopt;
}

template <class T>
std::optional<T> parse_number(const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Appends `text` in lines of at most kHelpWidth, each further line indented to the help column.
void append_wrapped(std::string& out, const std::string& text) {
  size_t column = kHelpColumn;
  for (size_t i = 0; i < text.size();) {
    const size_t end = std::min(text.find(' ', i), text.size());
    const size_t length = end - i;
    if (column > kHelpColumn && column + 1 + length > kHelpWidth) {
      out += '\n' + std::string(kHelpColumn, ' ');
      column = kHelpColumn;
    } else if (column > kHelpColumn) {
      out += ' ';
      ++column;
    }
    out.append(text, i, length);
    column += length;
    i = end + 1;
  }
  out += '\n';
}

void append_entry(std::string& out, const std::string& usage, const std::string& text) {
  out += "  " + usage;
  if (usage.size() + 4 > kHelpColumn) {
    out += '\n' + std::string(kHelpColumn, ' ');
  } else {
    out += std::string(kHelpColumn - usage.size() - 2, ' ');
  }
  append_wrapped(out, text);
}

}  // namespace

// ---- Option ---------------------------------------------------------------------------------------------

Option::Option(std::string name, Target target, std::string help)
    : name_(std::move(name)), help_(std::move(help)), target_(target) {
  default_ = value_text();
}

Option& Option::choices(std::vector<std::string> words) {
  choices_ = std::move(words);
  return *this;
}
Option& Option::at_least(double minimum) {
  minimum_ = minimum;
  return *this;
}
Option& Option::at_most(double maximum) {
  maximum_ = maximum;
  return *this;
}
Option& Option::required() {
  required_ = true;
  return *this;
}
Option& Option::group(std::string title) {
  group_ = std::move(title);
  return *this;
}
Option& Option::not_recorded() {
  recorded_ = false;
  return *this;
}

bool Option::is_integer() const {
  return std::holds_alternative<int64_t*>(target_) ||
         std::holds_alternative<std::optional<int64_t>*>(target_);
}
bool Option::is_number() const {
  return is_integer() || std::holds_alternative<double*>(target_) ||
         std::holds_alternative<std::optional<double>*>(target_);
}
bool Option::is_optional() const {
  return std::holds_alternative<std::optional<int64_t>*>(target_) ||
         std::holds_alternative<std::optional<double>*>(target_) ||
         std::holds_alternative<std::optional<std::string>*>(target_);
}

std::string Option::key() const {
  std::string key = is_positional() ? name_ : name_.substr(2);
  std::replace(key.begin(), key.end(), '-', '_');
  return key;
}

std::string Option::usage() const {
  if (is_flag()) return "--[no-]" + name_.substr(2);
  if (is_positional()) return is_list() ? name_ + "..." : name_;
  if (is_number()) return name_ + (is_integer() ? " N" : " X");
  return name_ + (is_list() ? " TEXT..." : " TEXT");
}

std::string Option::allowed() const {
  if (is_flag()) return "true, false";
  if (!choices_.empty()) return join(choices_);
  if (!is_number()) return is_list() ? "one or more words" : "text";
  std::string text = is_integer() ? "a whole number" : "a number";
  if (minimum_ && maximum_) {
    text += fmt::format(" from {} to {}", *minimum_, *maximum_);
  } else if (minimum_) {
    text += fmt::format(", at least {}", *minimum_);
  } else if (maximum_) {
    text += fmt::format(", at most {}", *maximum_);
  }
  return text;
}

std::string Option::value_text() const {
  const Json value = to_json();
  if (value.is_null()) return "";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_array()) return join(value.get<std::vector<std::string>>(), " ");
  if (value.is_number_float()) return fmt::format("{}", value.get<double>());
  return value.dump();
}

Option::Value Option::read(const std::string& text, const std::string& where) const {
  Value value = text;
  if (is_flag()) {
    const auto flag = parse_bool(text);
    check(flag.has_value(), "{}: {} '{}' is not a truth value; allowed: {}", where, name_, text, allowed());
    value = *flag;
  } else if (is_integer()) {
    const auto number = parse_number<int64_t>(text);
    check(number.has_value(), "{}: {} '{}' is not a whole number of 64 bits; allowed: {}", where, name_, text,
          allowed());
    value = *number;
  } else if (is_number()) {
    const auto number = parse_number<double>(text);
    check(number && std::isfinite(*number), "{}: {} '{}' is not a finite number; allowed: {}", where, name_,
          text, allowed());
    value = *number;
  }
  check_value(value, where);
  return value;
}

Option::Value Option::read(const Json& json, const std::string& where) const {
  // 2^53: above it a JSON number written with a point or exponent may not be the integer it looks like.
  const auto whole = [](double x) { return std::abs(x) <= 0x1p53 && x == std::floor(x); };
  const auto all_strings = [](const Json& array) {
    return std::all_of(array.begin(), array.end(), [](const Json& item) { return item.is_string(); });
  };
  Value value;
  bool fits = true;
  if (json.is_null()) {
    fits = is_optional();
  } else if (is_flag()) {
    fits = json.is_boolean();
    if (fits) value = json.get<bool>();
  } else if (is_integer()) {
    fits = (json.is_number_unsigned() && json.get<uint64_t>() <= uint64_t{INT64_MAX}) ||
           (json.is_number_integer() && !json.is_number_unsigned()) ||
           (json.is_number_float() && whole(json.get<double>()));
    if (fits) value = json.get<int64_t>();
  } else if (is_number()) {
    fits = json.is_number();
    if (fits) value = json.get<double>();
  } else if (is_list()) {
    fits = json.is_array() && all_strings(json);
    if (fits) value = json.get<std::vector<std::string>>();
  } else {
    fits = json.is_string();
    if (fits) value = json.get<std::string>();
  }
  if (!fits) {
    const std::string shown = json.dump(-1, ' ', false, Json::error_handler_t::replace);
    fail("{}: \"{}\" is {}; allowed: {}{}", where, key(), shown,
         is_list() ? "an array of strings" : allowed(), is_optional() ? ", null" : "");
  }
  check_value(value, where);
  return value;
}

void Option::check_value(const Value& value, const std::string& where) const {
  const auto check_word = [&](const std::string& word) {
    check(choices_.empty() || std::find(choices_.begin(), choices_.end(), word) != choices_.end(),
          "{}: {} '{}' is not known{}; allowed: {}", where, name_, word, did_you_mean(word, choices_),
          allowed());
  };
  const auto check_range = [&](auto number) {
    const auto x = static_cast<double>(number);
    check((!minimum_ || x >= *minimum_) && (!maximum_ || x <= *maximum_),
          "{}: {} {} is out of range; allowed: {}", where, name_, number, allowed());
  };
  if (const auto* word = std::get_if<std::string>(&value)) check_word(*word);
  if (const auto* words = std::get_if<std::vector<std::string>>(&value)) {
    for (const auto& word : *words) check_word(word);
  }
  if (const auto* number = std::get_if<int64_t>(&value)) check_range(*number);
  if (const auto* number = std::get_if<double>(&value)) check_range(*number);
}

void Option::assign(Value value) {
  seen_ = true;
  std::visit(
      [&](auto* target) {
        using T = std::remove_pointer_t<decltype(target)>;
        if constexpr (
            requires { typename T::value_type; } && requires(T t) { t.reset(); }) {
          if (std::holds_alternative<std::monostate>(value)) {
            target->reset();
          } else {
            *target = std::get<typename T::value_type>(std::move(value));
          }
        } else {
          *target = std::get<T>(std::move(value));
        }
      },
      target_);
}

Json Option::to_json() const {
  return std::visit(
      [](const auto* target) -> Json {
        if constexpr (requires { target->has_value(); }) {
          return target->has_value() ? Json(**target) : Json(nullptr);
        } else {
          return Json(*target);
        }
      },
      target_);
}

// ---- Options --------------------------------------------------------------------------------------------

Options::Options(std::string command, std::string summary)
    : command_(std::move(command)), summary_(std::move(summary)) {}
Options::~Options() = default;

Option& Options::add(std::string name, Option::Target target, std::string help) {
  if (name.empty() || name == "--" || find(name)) {
    throw std::logic_error("option declared twice or without a name: " + name);
  }
  options_.push_back(std::make_unique<Option>(std::move(name), target, std::move(help)));
  return *options_.back();
}

Option* Options::find(const std::string& name) const {
  for (const auto& option : options_) {
    if (option->name_ == name) return option.get();
  }
  return nullptr;
}

Option* Options::find_flag_of(const std::string& negation) const {
  if (!negation.starts_with("--no-")) return nullptr;
  Option* option = find("--" + negation.substr(5));
  return option && option->is_flag() ? option : nullptr;
}

std::vector<std::string> Options::names() const {
  std::vector<std::string> names;
  for (const auto& option : options_) {
    if (option->is_positional()) continue;
    names.push_back(option->name_);
    if (option->is_flag()) names.push_back("--no-" + option->name_.substr(2));
  }
  names.emplace_back("--help");
  return names;
}

// `hint` is for when no known name is near.
void Options::fail_unknown(const std::string& word, const std::string& hint) const {
  const std::string near = did_you_mean(word.starts_with("--") ? word : "-" + word, names());
  fail("{}: unknown option '{}'{}", command_, word, near.empty() && !hint.empty() ? "; " + hint : near);
}

// words[i], which starts with "--", as CLI11 gets it: the option's name, its value replaced by a placeholder.
std::string Options::option_word(const std::vector<std::string>& words, size_t i) const {
  const std::string& word = words[i];
  const size_t equals = word.find('=');
  const std::string name = word.substr(0, equals);
  if (Option* flag = find_flag_of(name); flag && !find(name)) {
    check(equals == std::string::npos, "{}: {} takes no value; allowed: {}, {}, {}=true, {}=false", command_,
          name, flag->name_, name, flag->name_, flag->name_);
    return name;
  }
  const Option* option = find(name);
  if (!option) {
    const Option* before = i > 0 ? find(words[i - 1]) : nullptr;
    const bool awaited = before && !before->is_flag();
    fail_unknown(name, awaited
                           ? fmt::format("a value that starts with dashes is written {}=VALUE", before->name_)
                           : "--help lists the options");
  }
  if (equals == std::string::npos) return name;
  if (!option->is_flag()) return fmt::format("{}={}{}", name, kAttached, i);
  const bool on = std::get<bool>(option->read(word.substr(equals + 1), command_));
  return on ? name : "--no-" + name.substr(2);
}

// The words as CLI11 gets them: option names as they are, every value as a placeholder for its index.
std::vector<std::string> Options::disguise(const std::vector<std::string>& words) const {
  std::vector<std::string> out;
  bool only_positional = false;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (only_positional || word.size() < 2 || word[0] != '-' || looks_negative(word)) {
      out.push_back(std::to_string(i));
    } else if (word == "--") {
      only_positional = true;
      out.push_back(word);
    } else {
      out.push_back(word.starts_with("--") ? option_word(words, i) : kOther + std::to_string(i));
    }
  }
  return out;
}

// What one option received on the command line, from CLI11's placeholders (a flag: "true" and "false").
Option::Value Options::read_results(const Option& option, const std::vector<std::string>& results,
                                    const std::vector<std::string>& words) const {
  if (option.is_flag()) return option.read(results.back(), command_);
  std::vector<std::string> texts;
  for (const std::string& raw : results) {
    if (raw.starts_with(kOther)) {
      texts.push_back(words[std::stoul(raw.substr(sizeof kOther - 1))]);
      if (option.is_list()) fail_unknown(texts.back(), "");
    } else if (raw.starts_with(kAttached)) {
      const std::string& word = words[std::stoul(raw.substr(sizeof kAttached - 1))];
      texts.push_back(word.substr(word.find('=') + 1));
    } else {
      check(raw[0] != '-', "{}: {} needs a value before {}; allowed: {}", command_, option.name_,
            raw.substr(0, raw.find('=')), option.allowed());
      texts.push_back(words[std::stoul(raw)]);
    }
  }
  if (!option.is_list()) return option.read(texts.back(), command_);
  Option::Value value = std::move(texts);
  option.check_value(value, command_);
  return value;
}

// A word that no option and no positional took.
void Options::fail_extra(const std::string& raw, const std::vector<std::string>& words) const {
  if (raw.starts_with(kOther)) fail_unknown(words[std::stoul(raw.substr(sizeof kOther - 1))], "");
  const size_t i = std::stoul(raw);
  const Option* before = i > 0 ? find(words[i - 1]) : nullptr;
  fail("{}: unexpected argument '{}'{}", command_, words[i],
       before && before->is_flag() ? fmt::format("; a flag takes its value as {}=false", before->name_) : "");
}

bool Options::parse(const std::vector<std::string>& words) {
  const auto mark = std::find(words.begin(), words.end(), "--");
  if (std::any_of(words.begin(), mark, [](const auto& w) { return w == "-h" || w == "--help"; })) {
    fmt::print("{}", help());
    return false;
  }

  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  std::vector<std::pair<Option*, CLI::Option*>> handles;
  for (const auto& option : options_) {
    const std::string& name = option->name_;
    CLI::Option* handle =
        option->is_flag() ? app.add_flag(name + ",!--no-" + name.substr(2)) : app.add_option(name);
    if (option->is_list()) handle->expected(1, -1)->allow_extra_args();
    if (!option->is_list()) handle->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    handles.emplace_back(option.get(), handle);
  }
  std::vector<std::string> disguised = disguise(words);
  std::reverse(disguised.begin(), disguised.end());  // CLI11 takes them from the back
  try {
    app.parse(disguised);
  } catch (const CLI::ArgumentMismatch& e) {  // its text starts with the option's name
    const std::string what = e.what(), name = what.substr(0, what.find(':'));
    const Option* option = find(name);
    fail("{}: {} needs a value; allowed: {}", command_, name, option ? option->allowed() : what);
  } catch (const CLI::Error& e) {
    fail("{}: {}", command_, e.what());
  }

  std::vector<std::pair<Option*, Option::Value>> values;
  for (const auto& [option, handle] : handles) {
    if (handle->count() > 0) values.emplace_back(option, read_results(*option, handle->results(), words));
  }
  for (const std::string& extra : app.remaining()) {
    if (extra != "--") fail_extra(extra, words);
  }
  for (const auto& [option, handle] : handles) {
    check(handle->count() > 0 || !option->required_ || option->seen_, "{}: {} is required: {}", command_,
          option->name_, option->help_);
  }
  for (auto& [option, value] : values) option->assign(std::move(value));
  return true;
}

void Options::load_json(const Json& object, const std::string& source) {
  check(object.is_object(), "{}: expected a JSON object, found {}", source, object.type_name());
  std::vector<std::string> keys;
  for (const auto& option : options_) keys.push_back(option->key());
  std::vector<std::pair<Option*, Option::Value>> values;
  for (const auto& [key, json] : object.items()) {
    const auto found = std::find(keys.begin(), keys.end(), key);
    check(found != keys.end(), "{}: unknown key \"{}\"{}", source, key, did_you_mean(key, keys));
    Option* option = options_[static_cast<size_t>(found - keys.begin())].get();
    values.emplace_back(option, option->read(json, source));
  }
  for (auto& [option, value] : values) option->assign(std::move(value));
}

Json Options::to_json() const {
  Json object = Json::object();
  for (const auto& option : options_) {
    if (option->recorded_) object[option->key()] = option->to_json();
  }
  return object;
}

bool Options::given(const std::string& name) const {
  const Option* option = find(name);
  if (!option) throw std::logic_error("given(): no option " + name);
  return option->seen_;
}

std::string Options::help() const {
  std::string out = fmt::format("{} - {}\n\nusage: {} [options]", command_, summary_, command_);
  std::vector<std::string> groups;
  for (const auto& option : options_) {
    if (option->is_positional()) {
      out += option->required_ ? " " + option->usage() : " [" + option->usage() + "]";
    } else if (std::find(groups.begin(), groups.end(), option->group_) == groups.end()) {
      groups.push_back(option->group_);
    }
  }
  out += '\n';
  const auto describe = [](const Option& option) {
    std::vector<std::string> facts;
    if (!option.choices_.empty()) facts.push_back("one of " + option.allowed());
    if (option.minimum_ || option.maximum_) facts.push_back(option.allowed());
    if (option.required_) facts.emplace_back("required");
    if (!option.required_ && !option.default_.empty()) facts.push_back("default " + option.default_);
    return option.help_ + (facts.empty() ? "" : " (" + join(facts, "; ") + ")");
  };
  const auto is_argument = [](const auto& option) { return option->is_positional(); };
  if (std::any_of(options_.begin(), options_.end(), is_argument)) {
    out += "\nArguments:\n";
    for (const auto& option : options_) {
      if (option->is_positional()) append_entry(out, option->usage(), describe(*option));
    }
  }
  for (const auto& group : groups) {
    out += fmt::format("\n{}:\n", group.empty() ? "Options" : group);
    for (const auto& option : options_) {
      if (!option->is_positional() && option->group_ == group)
        append_entry(out, option->usage(), describe(*option));
    }
  }
  out += '\n';
  append_entry(out, "-h, --help", "print this help and exit");
  return out;
}

}  // namespace flexchat
