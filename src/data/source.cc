#include "data/source.h"

#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/strings.h"
#include "data/readers.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kExtensions = ".txt, .md, .jsonl, .parquet";

enum class Format { text, jsonl, parquet, other };

Format format_of(const fs::path& path) {
  std::string extension = path.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  if (extension == ".txt" || extension == ".md") return Format::text;
  if (extension == ".jsonl") return Format::jsonl;
  if (extension == ".parquet") return Format::parquet;
  return Format::other;
}

std::vector<std::string> expand_glob(const std::string& pattern) {
  glob_t found{};
  std::vector<std::string> out;
  if (::glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    out.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  }
  ::globfree(&found);
  return out;
}

void add_folder(const std::string& folder, std::vector<std::string>& out) {
  try {
    for (auto it = fs::recursive_directory_iterator(folder); it != fs::recursive_directory_iterator(); ++it) {
      if (it->path().filename().string().starts_with('.')) {
        if (it->is_directory()) it.disable_recursion_pending();
      } else if (format_of(it->path()) != Format::other && !it->is_directory()) {
        out.push_back(it->path().string());
      }
    }
  } catch (const fs::filesystem_error& e) {
    fail("cannot read the folder {}: {}", folder, e.code().message());
  }
}

SourceFile checked_file(const std::string& path) {
  std::error_code error;
  const bool regular = fs::is_regular_file(path, error);
  check(!error, "cannot read {}: {}", path, error.message());
  check(regular, "cannot read {}: not a regular file", path);
  check(::access(path.c_str(), R_OK) == 0, "cannot read {}: {}", path, std::strerror(errno));
  const auto bytes = fs::file_size(path, error);
  check(!error, "cannot read {}: {}", path, error.message());
  return {path, static_cast<int64_t>(bytes)};
}

// Names (without folders: data may move) and sizes of the files, in order.
uint64_t fingerprint(const std::vector<SourceFile>& files) {
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
  for (const auto& file : files) {
    for (const char c : fmt::format("{}\n{}\n", fs::path(file.path).filename().string(), file.bytes)) {
      hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
    }
  }
  return hash;
}

std::unique_ptr<FileReader> open_reader(const std::string& path, FilePosition start) {
  switch (format_of(path)) {
    case Format::text:
      return open_text(path, start);
    case Format::jsonl:
      return open_jsonl(path, start);
    case Format::parquet:
      return open_parquet(path, start);
    case Format::other:
      break;
  }
  fail("{}: not one of {}", path, kExtensions);
}

class FileStream final : public DocumentStream {
 public:
  FileStream(std::vector<SourceFile> files, Split split, int rank, int world)
      : files_(std::move(files)), split_(split), rank_(rank), world_(world) {
    int64_t bytes = 0;
    for (const auto& file : files_) bytes += file.bytes;
    const std::string what = fmt::format("{} files, {} bytes", files_.size(), bytes);
    position_.identity = fmt::format("{} split, rank {} of {}, {}, names and sizes {:016x}",
                                     split_name(split), rank, world, what, fingerprint(files_));
    choose_split();
    for (const auto& file : files_) {
      if (format_of(file.path) == Format::parquet) check_parquet(file.path);
    }
    if (split_ != Split::all && !by_file_) count_first_documents();
    check_not_empty(what);
  }

  bool next(std::string& text) override {
    for (;;) {
      if (position_.file >= std::ssize(files_)) return false;
      if (!reader_) reader_ = open_reader(current_path(), {position_.offset, position_.row});
      const bool selected = in_split(position_.document);
      const bool mine = selected && position_.selected % world_ == rank_;
      int64_t replaced = 0;
      if (!reader_->next(mine ? &text : nullptr, &replaced)) {
        reader_.reset();
        ++position_.file;
        position_.offset = position_.row = 0;
        continue;
      }
      const FilePosition at = reader_->position();
      position_.offset = at.offset;
      position_.row = at.row;
      ++position_.document;
      if (selected) ++position_.selected;
      if (!mine) continue;
      if (text.empty()) {
        ++stats_.empty_documents;
        continue;
      }
      ++stats_.documents;
      stats_.bytes += std::ssize(text);
      stats_.invalid_utf8 += replaced;
      if (replaced > 0) ++stats_.invalid_documents;
      return true;
    }
  }

  void rewind() override { go_to(position_.epoch + 1); }

  SourcePosition position() const override { return position_; }

  void seek(const SourcePosition& position) override {
    check(position.identity == position_.identity,
          "cannot resume: the data is not what the checkpoint was reading: then '{}', now '{}'",
          position.identity, position_.identity);
    check(position.epoch >= 1 && position.file >= 0 && position.file <= std::ssize(files_) &&
              position.offset >= 0 && position.row >= 0 && position.document >= 0 && position.selected >= 0,
          "cannot resume: the data position in the checkpoint is out of range (file {} of {})", position.file,
          files_.size());
    reader_.reset();
    position_ = position;
  }

  const SourceStats& stats() const override { return stats_; }
  const std::vector<SourceFile>& files() const override { return files_; }

 private:
  static constexpr int64_t kCounted = 100;

  const std::string& current_path() const { return files_[static_cast<size_t>(position_.file)].path; }

  void go_to(int64_t epoch) {
    reader_.reset();
    position_ = {.identity = std::move(position_.identity), .epoch = epoch};
  }

  void choose_split() {
    const bool all_parquet = std::all_of(files_.begin(), files_.end(),
                                         [](const auto& f) { return format_of(f.path) == Format::parquet; });
    by_file_ = all_parquet && files_.size() >= 2;
    if (split_ == Split::all || !by_file_) return;
    if (split_ == Split::train) {
      files_.pop_back();
    } else {
      files_.erase(files_.begin(), files_.end() - 1);
    }
  }

  // Counts the records of the data up to 100: how the val documents are spread depends on no more than that.
  void count_first_documents() {
    while (first_documents_ < kCounted && position_.file < std::ssize(files_)) {
      const auto reader = open_reader(current_path(), {});
      while (first_documents_ < kCounted && reader->next(nullptr, nullptr)) ++first_documents_;
      ++position_.file;
    }
    go_to(1);
  }

  bool in_split(int64_t document) const {
    if (split_ == Split::all || by_file_) return true;
    const int64_t every = first_documents_ >= kCounted ? 100 : first_documents_ >= 10 ? 10 : first_documents_;
    const bool val = every > 1 && document % every == every - 1;
    return val == (split_ == Split::val);
  }

  // Reads on to the first document, so that data without any is an error now and not an endless pass later.
  void check_not_empty(const std::string& what) {
    const std::string where = fmt::format("{}{}; {}", files_[0].path, files_.size() > 1 ? " ..." : "", what);
    std::string text;
    if (!next(text)) {
      const int64_t records = position_.document, selected = position_.selected;
      check(records > 0, "no documents in the data ({})", where);
      check(selected > 0,
            "no document is left for validation: the data is a single document ({}); give separate "
            "validation data",
            where);
      check(selected > rank_, "no document for rank {} of {}: the {} split has {} ({})", rank_, world_,
            split_name(split_), selected, where);
      fail("no text in the data: each document of the {} split is empty ({})", split_name(split_), where);
    }
    stats_ = {};
    go_to(1);
  }

  std::vector<SourceFile> files_;
  Split split_;
  int rank_, world_;
  bool by_file_ = false;                // the split is one of files, not of documents
  int64_t first_documents_ = 0;         // records in the data, counted up to kCounted
  std::unique_ptr<FileReader> reader_;  // on files_[position_.file], or null
  SourcePosition position_;
  SourceStats stats_;
};

// The integer fields of a position, in JSON order.
template <class Position>
auto integer_fields(Position& p) {
  return std::array{std::pair{"epoch", &p.epoch},       std::pair{"file", &p.file},
                    std::pair{"offset", &p.offset},     std::pair{"row", &p.row},
                    std::pair{"document", &p.document}, std::pair{"selected", &p.selected}};
}

}  // namespace

std::string_view split_name(Split split) {
  return split == Split::train ? "train" : split == Split::val ? "val" : "all";
}

std::vector<SourceFile> find_source_files(const std::vector<std::string>& paths) {
  check(!paths.empty(), "no data given: name files, globs or folders of {}", kExtensions);
  std::vector<std::string> found;
  for (const auto& path : paths) {
    std::error_code ignored;  // a path that can't be looked at counts as absent
    if (fs::is_directory(path, ignored)) {
      const size_t before = found.size();
      add_folder(path, found);
      check(found.size() > before, "no {} files in the folder {}", kExtensions, path);
    } else if (fs::exists(path, ignored)) {
      check(format_of(path) != Format::other, "{}: unsupported data file, allowed are {}", path, kExtensions);
      found.push_back(path);
    } else {
      const bool glob = path.find_first_of("*?[") != std::string::npos;
      check(glob, "no such data file or folder: {}", path);
      const size_t before = found.size();
      for (const auto& match : expand_glob(path)) {
        if (fs::is_directory(match, ignored)) {
          add_folder(match, found);
        } else if (format_of(match) != Format::other) {
          found.push_back(match);
        }
      }
      check(found.size() > before, "no {} files match {}", kExtensions, path);
    }
  }
  for (auto& path : found) path = fs::path(path).lexically_normal().string();
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  std::vector<SourceFile> files;
  for (const auto& path : found) files.push_back(checked_file(path));
  return files;
}

std::unique_ptr<DocumentStream> open_documents(const std::vector<std::string>& paths, Split split, int rank,
                                               int world) {
  check(world >= 1 && rank >= 0 && rank < world, "rank {} must be in [0, {})", rank, world);
  return std::make_unique<FileStream>(find_source_files(paths), split, rank, world);
}

Json to_json(const SourcePosition& position) {
  Json json;
  json["identity"] = position.identity;
  for (const auto& [name, value] : integer_fields(position)) json[name] = *value;
  return json;
}

SourcePosition source_position_from_json(const Json& json, const std::string& source) {
  SourcePosition position;
  const auto fields = integer_fields(position);
  check(json.is_object() && json.size() == fields.size() + 1 && json.contains("identity") &&
            json["identity"].is_string(),
        "{}: not a data position", source);
  position.identity = json["identity"].get<std::string>();
  for (const auto& [name, value] : fields) {
    check(json.contains(name) && json[name].is_number_integer() && json[name].get<int64_t>() >= 0,
          "{}: data position: '{}' must be an integer of at least 0", source, name);
    *value = json[name].get<int64_t>();
  }
  return position;
}

}  // namespace flexchat
