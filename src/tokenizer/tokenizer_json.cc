// Reading and writing tokenizer.json. Everything is checked before a Tokenizer exists; every error is one
// line that names the file and the entry.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"
#include "tokenizer/tokenizer.h"
#include "base/utf8.h"

namespace flexchat {
namespace {

using Object =
    nlohmann::json;  // sorted keys: the ordered kind looks keys up one by one, and ranks_hex has thousands

constexpr const char* kFormat = "flexchat-tokenizer";
constexpr int64_t kVersion = 1;

class Reader {
 public:
  Reader(const Object& root, const std::string& source) : root_(root), source_(source) {}

  Tokenizer own() const {
    const std::vector<std::string> known = {"format",  "version",        "name",
                                            "pattern", "special_tokens", "tokens"};
    for (const auto& [key, value] : root_.items()) {
      require(std::find(known.begin(), known.end(), key) != known.end(), "unknown key '{}'{}", key,
              did_you_mean(key, known));
    }
    require(string("format") == kFormat, "format is '{}', must be '{}'", string("format"), kFormat);
    const Object& version = member("version");
    require(version.is_number_integer() && version == kVersion, "version is {}, this program reads {}",
            version.dump(), kVersion);
    const Object& list = member("tokens");
    require(list.is_array(), "'tokens' must be a list of byte strings in hex");
    std::vector<std::string> tokens;
    tokens.reserve(list.size());
    for (const Object& entry : list) {
      const std::string where = fmt::format("tokens[{}]", tokens.size());
      require(entry.is_string(), "{} is {}, must be a string in hex", where, entry.type_name());
      tokens.push_back(from_hex(entry.get_ref<const std::string&>(), where));
    }
    return make(string("name"), string("pattern"), std::move(tokens), special("special_tokens", list.size()));
  }

  Tokenizer ranks() const {
    const Object& table = member("ranks_hex");
    require(table.is_object(), "'ranks_hex' must be an object {{bytes in hex: rank}}");
    std::vector<std::string> tokens(table.size());
    for (const auto& [hex, rank] : table.items()) {
      const std::string where = fmt::format("ranks_hex['{}']", shorten(hex));
      require(rank.is_number_integer() && rank >= 0 && rank < table.size(),
              "{} is {}, must be a rank in [0, {}): {} entries need ranks without holes", where,
              shorten(rank.dump()), table.size(), table.size());
      std::string& token = tokens[rank.get<size_t>()];
      require(token.empty(), "{} repeats the rank {}", where, rank.get<size_t>());
      token = from_hex(hex, where);
    }
    const char* const special_key = root_.contains("special") ? "special" : "special_tokens";
    auto special_tokens = special(special_key, tokens.size());
    return make(root_.contains("name") ? string("name") : "ranks",
                string(root_.contains("pattern") ? "pattern" : "pat_str"), std::move(tokens),
                std::move(special_tokens));
  }

 private:
  template <class... Args>
  void require(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    if (!ok) fail("{}: {}", source_, fmt::format(format, std::forward<Args>(args)...));
  }
  static std::string shorten(const std::string& text) {
    return text.size() <= 48 ? text : text.substr(0, 48) + "...";
  }
  const Object& member(const char* key) const {
    const auto it = root_.find(key);
    require(it != root_.end(), "'{}' is missing", key);
    return *it;
  }
  const std::string& string(const char* key) const {
    const Object& value = member(key);
    require(value.is_string(), "'{}' is {}, must be a string", key, value.type_name());
    return value.get_ref<const std::string&>();
  }
  std::string from_hex(const std::string& hex, const std::string& where) const {
    const auto digit = [&](char c) {
      if (c >= '0' && c <= '9') return c - '0';
      if (c >= 'a' && c <= 'f') return c - 'a' + 10;
      if (c >= 'A' && c <= 'F') return c - 'A' + 10;
      return -1;
    };
    require(!hex.empty() && hex.size() % 2 == 0, "{} is '{}', must be pairs of hex digits", where,
            shorten(hex));
    std::string bytes;
    bytes.reserve(hex.size() / 2);
    for (size_t i = 0; i < hex.size(); i += 2) {
      const int high = digit(hex[i]), low = digit(hex[i + 1]);
      require(high >= 0 && low >= 0, "{} is '{}', must be pairs of hex digits", where, shorten(hex));
      bytes += static_cast<char>(high * 16 + low);
    }
    return bytes;
  }
  // A list in the order of the ids, or {string: id} with ids from first_id on without holes.
  std::vector<std::string> special(const char* key, size_t first_id) const {
    const Object& value = member(key);
    std::vector<std::string> out;
    if (value.is_array()) {
      for (const Object& entry : value) {
        require(entry.is_string(), "{}[{}] is {}, must be a string", key, out.size(), entry.type_name());
        out.push_back(entry.get<std::string>());
      }
      return out;
    }
    require(value.is_object(), "'{}' must be a list of strings or an object {{string: id}}", key);
    out.resize(value.size());
    for (const auto& [token, id] : value.items()) {
      require(id.is_number_integer() && id >= first_id && id < first_id + out.size(),
              "{}['{}'] is {}, must be an id in [{}, {}): special tokens follow the others without holes",
              key, token, shorten(id.dump()), first_id, first_id + out.size());
      std::string& place = out[id.get<size_t>() - first_id];
      require(place.empty(), "{}['{}'] repeats the id {}", key, token, id.get<size_t>());
      place = token;
    }
    return out;
  }
  Tokenizer make(std::string name, const std::string& pattern, std::vector<std::string> tokens,
                 std::vector<std::string> special_tokens) const {
    try {
      return Tokenizer(std::move(name), pattern, std::move(tokens), std::move(special_tokens));
    } catch (const Error& error) {
      fail("{}: {}", source_, error.what());
    }
  }

  const Object& root_;
  const std::string& source_;
};

std::string to_hex(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    out += "0123456789abcdef"[byte / 16];
    out += "0123456789abcdef"[byte % 16];
  }
  return out;
}

}  // namespace

Tokenizer Tokenizer::parse(std::string_view json, const std::string& source) {
  Object root;
  try {
    root = Object::parse(json);
  } catch (const Object::parse_error& error) {
    fail("{}: not JSON: error at byte {} of {}", source, error.byte, json.size());
  } catch (const Object::exception& error) {
    fail("{}: not JSON: {}", source, error.what());
  }
  if (!root.is_object()) fail("{}: a tokenizer must be a JSON object, got {}", source, root.type_name());
  const Reader reader(root, source);
  if (root.contains("format")) return reader.own();
  if (root.contains("ranks_hex")) return reader.ranks();
  fail("{}: neither a tokenizer of this program (no 'format') nor a table of ranks (no 'ranks_hex')", source);
}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  const auto file = std::filesystem::is_directory(path) ? path / "tokenizer.json" : path;
  return parse(read_file(file), file.string());
}

void Tokenizer::save(const std::filesystem::path& directory) const {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) fail_run("cannot make the directory {}: {}", directory.string(), error.message());
  nlohmann::ordered_json root;
  root["format"] = kFormat;
  root["version"] = kVersion;
  root["name"] = name();
  root["pattern"] = pattern();
  root["special_tokens"] = special_tokens();
  auto& list = root["tokens"] = nlohmann::ordered_json::array();
  for (const std::string& token : tokens()) list.push_back(to_hex(token));
  write_file_atomic(directory / "tokenizer.json", root.dump(0) + "\n");
}

}  // namespace flexchat
