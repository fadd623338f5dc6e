// Text and JSON-lines files, read through pread in windows: memory is one document (text) or one line
// (jsonl).
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "data/readers.h"

namespace flexchat {
namespace {

constexpr size_t kReadBytes = 1 << 20;
// A line longer than this is a broken file, not a document; it bounds the memory of a reader.
constexpr size_t kMaxLineBytes = size_t{1} << 28;

class InputFile {
 public:
  explicit InputFile(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    check(fd_ >= 0, "cannot read {}: {}", path_, std::strerror(errno));
  }
  ~InputFile() { ::close(fd_); }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  // Up to `bytes` bytes at `offset`; fewer only at the end of the file.
  size_t read(char* out, size_t bytes, int64_t offset) const {
    size_t done = 0;
    while (done < bytes) {
      const ssize_t n = ::pread(fd_, out + done, bytes - done, offset + static_cast<int64_t>(done));
      if (n < 0 && errno == EINTR) continue;
      check(n >= 0, "cannot read {}: {}", path_, std::strerror(errno));
      if (n == 0) break;
      done += static_cast<size_t>(n);
    }
    return done;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_;
};

bool is_continuation(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// Where to end a document whose text goes on past `limit` bytes; in (limit / 2, limit]. view.size() > limit.
size_t cut_point(std::string_view view, size_t limit) {
  const auto last = [&](char c, size_t end) {  // end of the last c in [limit / 2, end), or 0
    const size_t begin = limit / 2;
    const void* at = end > begin ? ::memrchr(view.data() + begin, c, end - begin) : nullptr;
    return at == nullptr ? 0 : static_cast<size_t>(static_cast<const char*>(at) - view.data()) + 1;
  };
  const size_t line_end = last('\n', limit);
  for (size_t cut = line_end; cut > 0; cut = last('\n', cut - 1)) {
    const std::string_view line = view.substr(0, cut - 1);
    if (line.ends_with('\n') || line.ends_with("\n\r")) return cut;
  }
  if (line_end > 0) return line_end;
  if (const size_t space = last(' ', limit); space > 0) return space;
  size_t cut = limit;
  while (cut > limit - 3 && is_continuation(view[cut])) --cut;
  return cut;
}

class TextReader final : public FileReader {
 public:
  TextReader(const std::string& path, FilePosition start) : file_(path), offset_(start.offset) {}

  bool next(std::string* text, int64_t* replaced) override {
    constexpr size_t limit = kTextDocumentBytes;
    if (offset_ == 0) skip_byte_order_mark();
    // Far enough past the limit to see a separator that starts on it, and the line end behind that.
    window_.resize(limit + kTextSeparator.size() + 2);
    const std::string_view view(window_.data(), file_.read(window_.data(), window_.size(), offset_));
    if (view.empty()) return false;

    size_t end = 0, consumed = 0;
    if (const size_t at = view.find(kTextSeparator); at <= limit) {
      end = at;
      consumed = at + kTextSeparator.size();
      if (view.substr(consumed).starts_with("\r\n")) {
        consumed += 2;
      } else if (view.substr(consumed).starts_with("\n")) {
        consumed += 1;
      }
    } else {
      end = consumed = view.size() <= limit ? view.size() : cut_point(view, limit);
    }
    offset_ += static_cast<int64_t>(consumed);
    if (text != nullptr) {
      text->assign(view.substr(0, end));
      make_valid_utf8(*text, replaced);
    }
    return true;
  }

  FilePosition position() const override { return {offset_, 0}; }

 private:
  void skip_byte_order_mark() {
    char mark[3];
    if (file_.read(mark, 3, 0) == 3 && std::memcmp(mark, "\xEF\xBB\xBF", 3) == 0) offset_ = 3;
  }

  InputFile file_;
  int64_t offset_;
  std::string window_;
};

class JsonlReader final : public FileReader {
 public:
  JsonlReader(const std::string& path, FilePosition start)
      : file_(path), offset_(start.offset), line_(start.row), read_offset_(start.offset) {}

  bool next(std::string* text, int64_t* replaced) override {
    std::string_view line;
    do {
      if (!read_line(line)) return false;
    } while (line.find_first_not_of(" \t\r") == std::string_view::npos);
    if (text != nullptr) *text = parse_jsonl_line(line, where(), replaced);
    return true;
  }

  FilePosition position() const override { return {offset_, line_}; }

 private:
  std::string where() const { return fmt::format("{}:{}", file_.path(), line_); }

  // The next line without its '\n', in buffer_ until the next call; counts it.
  bool read_line(std::string_view& line) {
    size_t scanned = begin_;
    for (;;) {
      const size_t newline = buffer_.find('\n', scanned);
      if (newline != std::string::npos) {
        take(line, newline - begin_, 1);
        return true;
      }
      scanned = buffer_.size() - begin_;
      buffer_.erase(0, begin_);
      begin_ = 0;
      check(buffer_.size() <= kMaxLineBytes, "{}:{}: a line of more than {}: not a JSON-lines file",
            file_.path(), line_ + 1, format_bytes(static_cast<double>(kMaxLineBytes)));
      const size_t had = buffer_.size();
      buffer_.resize(had + kReadBytes);
      const size_t n = file_.read(buffer_.data() + had, kReadBytes, read_offset_);
      buffer_.resize(had + n);
      read_offset_ += static_cast<int64_t>(n);
      if (n == 0) {
        if (had == 0) return false;
        take(line, had, 0);
        return true;
      }
    }
  }

  void take(std::string_view& line, size_t length, size_t line_end) {
    line = std::string_view(buffer_).substr(begin_, length);
    begin_ += length + line_end;
    offset_ += static_cast<int64_t>(length + line_end);
    ++line_;
  }

  InputFile file_;
  int64_t offset_;       // of the byte buffer_[begin_]
  int64_t line_;         // lines taken so far
  int64_t read_offset_;  // of the byte after buffer_
  std::string buffer_;
  size_t begin_ = 0;
};

// Keeps the top-level "text" of one object and no other value, however large the rest is.
class TextField final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit TextField(const std::string& where) : where_(where) {}

  std::string take() {
    check(found_, "{}: no field 'text' (fields: {})", where_, keys_.empty() ? "none" : join(keys_));
    return std::move(text_);
  }

  bool null() override { return value("", nullptr); }
  bool boolean(bool) override { return value("a boolean", nullptr); }
  bool number_integer(number_integer_t) override { return value("a number", nullptr); }
  bool number_unsigned(number_unsigned_t) override { return value("a number", nullptr); }
  bool number_float(number_float_t, const string_t&) override { return value("a number", nullptr); }
  bool string(string_t& s) override { return value("", &s); }
  bool binary(binary_t&) override { return value("binary", nullptr); }
  bool start_object(std::size_t) override {
    if (depth_ > 0) value("an object", nullptr);
    ++depth_;
    return true;
  }
  bool start_array(std::size_t) override {
    value("an array", nullptr);
    ++depth_;
    return true;
  }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool key(string_t& name) override {
    if (depth_ != 1) return true;
    is_text_ = name == "text";
    if (keys_.size() < kNamedKeys) keys_.push_back(name.substr(0, 40));
    return true;
  }
  bool parse_error(std::size_t byte, const std::string&, const nlohmann::detail::exception&) override {
    fail("{}: not valid JSON at byte {} of the line", where_, byte);
  }

 private:
  static constexpr size_t kNamedKeys = 10;

  bool leave() {
    --depth_;
    return true;
  }

  // A scalar, or the start of a nested value; `kind` says what it is when it can't be a text.
  bool value(std::string_view kind, string_t* s) {
    check(depth_ > 0, "{}: not a JSON object with a field 'text'", where_);
    if (depth_ != 1 || !is_text_) return true;
    check(kind.empty(), "{}: field 'text' is {}, not a string", where_, kind);
    found_ = true;
    text_ = s == nullptr ? "" : std::move(*s);
    return true;
  }

  const std::string& where_;
  int depth_ = 0;
  bool is_text_ = false, found_ = false;
  std::string text_;
  std::vector<std::string> keys_;
};

// The code unit of the escape \uXXXX at line[i], or -1.
int escaped_unit(std::string_view line, size_t i) {
  if (i + 6 > line.size() || line[i] != '\\' || line[i + 1] != 'u') return -1;
  int unit = 0;
  for (const char c : line.substr(i + 2, 4)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return -1;
    unit = unit * 16 + digit;
  }
  return unit;
}

// Half of a surrogate pair written as an escape is legal JSON but no character; crawled data has them.
void replace_lone_surrogates(std::string& line, int64_t* replaced) {
  for (size_t i = line.find('\\'); i != std::string::npos; i = line.find('\\', i)) {
    const int unit = escaped_unit(line, i);
    if (unit < 0xD800 || unit > 0xDFFF) {
      i += 2;  // the escaped character may be a backslash itself
      continue;
    }
    const int low = unit <= 0xDBFF ? escaped_unit(line, i + 6) : -1;
    if (low >= 0xDC00 && low <= 0xDFFF) {
      i += 12;
      continue;
    }
    line.replace(i + 2, 4, "FFFD");
    if (replaced) ++*replaced;
    i += 6;
  }
}

}  // namespace

std::string parse_jsonl_line(std::string_view line, const std::string& where, int64_t* replaced) {
  std::string repaired(line);
  make_valid_utf8(repaired, replaced);
  replace_lone_surrogates(repaired, replaced);
  TextField field(where);
  nlohmann::json::sax_parse(repaired, &field);
  return field.take();
}

std::unique_ptr<FileReader> open_text(const std::string& path, FilePosition start) {
  return std::make_unique<TextReader>(path, start);
}

std::unique_ptr<FileReader> open_jsonl(const std::string& path, FilePosition start) {
  return std::make_unique<JsonlReader>(path, start);
}

}  // namespace flexchat
