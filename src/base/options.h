// Options declared once. From one declaration come the command-line parser, the default, --help, the config
// JSON and the run record. Unknown options, unknown JSON keys and bad enum words are errors that name the
// nearest known name.
//
//   struct TrainOptions {
//     int64_t depth = 4;
//     std::string arch = "classic";
//     void declare(Options& o) {
//       o.add("--depth", &depth, "number of layers; width, heads and rates follow from it").at_least(1);
//       o.add("--arch", &arch, "model variant").choices({"classic", "modern"});
//     }
//   };
//
// The value a target holds when it is declared is its default. JSON keys are the option names with '_' for
// '-' ("device_batch_size"). A call that throws changes no target. A value set later replaces an earlier one,
// from whichever source, so a command that reads a config file loads it before it parses the words.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace flexchat {

using Json = nlohmann::ordered_json;

class Option {
 public:
  using Target = std::variant<bool*, int64_t*, double*, std::string*, std::vector<std::string>*,
                              std::optional<int64_t>*, std::optional<double>*, std::optional<std::string>*>;
  Option(std::string name, Target target, std::string help);

  Option& choices(std::vector<std::string> words);  // string options: the allowed words
  Option& at_least(double minimum);                 // numeric options
  Option& at_most(double maximum);
  Option& required();
  Option& group(std::string title);  // heading in --help
  Option& not_recorded();            // left out of JSON (paths of outputs, --json and the like)

 private:
  friend class Options;
  using Value = std::variant<std::monostate, bool, int64_t, double, std::string, std::vector<std::string>>;

  bool is_positional() const { return name_[0] != '-'; }
  bool is_flag() const { return std::holds_alternative<bool*>(target_); }
  bool is_list() const { return std::holds_alternative<std::vector<std::string>*>(target_); }
  bool is_integer() const;
  bool is_number() const;  // integer or floating point
  bool is_optional() const;
  std::string key() const;         // its name in JSON
  std::string usage() const;       // "--depth N"
  std::string allowed() const;     // "a whole number, at least 1"
  std::string value_text() const;  // the present value; empty when there is none
  Value read(const std::string& text, const std::string& where) const;  // of one word
  Value read(const Json& json, const std::string& where) const;
  void check_value(const Value& value, const std::string& where) const;  // choices and range
  void assign(Value value);
  Json to_json() const;

  std::string name_, help_, group_, default_;
  Target target_;
  std::vector<std::string> choices_;
  std::optional<double> minimum_, maximum_;
  bool required_ = false, recorded_ = true, seen_ = false;
};

class Options {
 public:
  // `command` as typed ("flexchat train base"), `summary` one line for --help.
  Options(std::string command, std::string summary);
  ~Options();

  // Name "--long-name": bool options are flags, "--flag" and "--no-flag" (or --flag=true/false).
  // vector<string> options take one or more words ("--data a b c") and may repeat; of any other option given
  // twice the last counts. "--name=value" works for all; a value that starts with "--" must be written so.
  // Name without dashes ("files"): a positional; vector<string> takes the rest. After "--" all is positional.
  Option& add(std::string name, Option::Target target, std::string help);

  // Parses the words after the command. "--help"/"-h" prints help and returns false: the caller exits 0.
  // Throws Error with one line on anything unknown, malformed, out of range or missing.
  [[nodiscard]] bool parse(const std::vector<std::string>& words);

  // Sets targets from a JSON object; `source` names the file in errors. Unknown keys are errors.
  void load_json(const Json& object, const std::string& source);
  // Every recorded option with its present value, in declaration order.
  Json to_json() const;

  bool given(const std::string& name) const;  // on the command line or in JSON
  std::string help() const;

 private:
  Option* find(const std::string& name) const;  // null when there is none
  Option* find_flag_of(const std::string& negation) const;
  std::vector<std::string> names() const;
  std::string option_word(const std::vector<std::string>& words, size_t i) const;
  std::vector<std::string> disguise(const std::vector<std::string>& words) const;
  Option::Value read_results(const Option& option, const std::vector<std::string>& results,
                             const std::vector<std::string>& words) const;
  [[noreturn]] void fail_unknown(const std::string& word, const std::string& hint) const;
  [[noreturn]] void fail_extra(const std::string& raw, const std::vector<std::string>& words) const;

  std::string command_, summary_;
  std::vector<std::unique_ptr<Option>> options_;
};

}  // namespace flexchat
