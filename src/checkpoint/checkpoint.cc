#include "checkpoint/checkpoint.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"
#include "checkpoint/mapped_file.h"
#include "checkpoint/state_json.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFolder = "checkpoints";
constexpr const char* kManifest = "manifest.json";
constexpr const char* kState = "state.json";
constexpr std::string_view kExtension = ".safetensors";
constexpr std::string_view kFormat = "flexchat checkpoint";
constexpr int64_t kVersion = 1;

std::optional<int64_t> parse_digits(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || text[0] == '-' || error != std::errc{} || end != text.data() + text.size())
    return std::nullopt;
  return value;
}

// What a name under checkpoints/ means: step_000123, or step_000123.tmp-<pid>: unfinished or being removed.
struct FolderName {
  int64_t step;
  std::optional<int64_t> temporary_of;  // the writer's process id
};
std::optional<FolderName> parse_folder_name(std::string_view name) {
  constexpr std::string_view kPrefix = "step_", kTemporary = ".tmp-";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  const size_t mark = name.find(kTemporary);
  const auto step = parse_digits(name.substr(0, mark));
  if (!step || name.substr(0, mark) != fmt::format("{:06}", *step)) return std::nullopt;
  if (mark == std::string_view::npos) return FolderName{*step, std::nullopt};
  const auto pid = parse_digits(name.substr(mark + kTemporary.size()));
  if (!pid) return std::nullopt;
  return FolderName{*step, pid};
}

fs::path temporary_path(const fs::path& final_path) {
  fs::path temporary = final_path;
  temporary += fmt::format(".tmp-{}", ::getpid());
  return temporary;
}

void fsync_directory(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);  // some file systems refuse this for a directory: not an error
  ::close(fd);
}

// Removes a folder so that a kill half-way leaves a temporary name, never a partial checkpoint.
void remove_checkpoint(const fs::path& path) {
  const fs::path temporary = temporary_path(path);
  std::error_code ignored;
  fs::remove_all(temporary, ignored);
  fs::rename(path, temporary, ignored);
  fs::remove_all(temporary, ignored);
}

// Folders of writers that no longer run. This process has none in use when it asks.
void remove_leftovers(const fs::path& folder) {
  std::vector<fs::path> dead;
  for (const auto& item : fs::directory_iterator(folder)) {
    const auto name = parse_folder_name(item.path().filename().string());
    if (!name || !name->temporary_of) continue;
    const auto pid = static_cast<pid_t>(*name->temporary_of);
    const bool running = pid > 0 && pid != ::getpid() && (::kill(pid, 0) == 0 || errno == EPERM);
    if (!running) dead.push_back(item.path());
  }
  std::error_code ignored;
  for (const auto& path : dead) fs::remove_all(path, ignored);
}

// Moves `temporary` to `path`, replacing a checkpoint already there. The exchange leaves no moment without
// one.
void move_into_place(const fs::path& temporary, const fs::path& path) {
  if (::rename(temporary.c_str(), path.c_str()) == 0) return;
  if (errno != ENOTEMPTY && errno != EEXIST)
    fail_run("rename to {}: {}", path.string(), std::strerror(errno));
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE
  if (::syscall(SYS_renameat2, AT_FDCWD, temporary.c_str(), AT_FDCWD, path.c_str(), kExchange) == 0) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    return;
  }
  // A file system without exchange: the old one, whose step is the same, has to go first.
  fs::path old = path;
  old += ".tmp-0";  // no process has this id, so a later save removes it
  std::error_code error;
  fs::remove_all(old, error);
  if (::rename(path.c_str(), old.c_str()) != 0)
    fail_run("rename {}: {}", path.string(), std::strerror(errno));
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const int cause = errno;
    (void)::rename(old.c_str(), path.c_str());
    fail_run("rename to {}: {}", path.string(), std::strerror(cause));
  }
  fs::remove_all(old, error);
}

bool plain_group_name(std::string_view name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  });
}

Json write_group(const fs::path& folder, const TensorGroup& group) {
  std::vector<uint32_t> checksums;  // of each piece, the header first
  std::vector<std::string> names;
  Crc32c whole;
  uint64_t bytes = 0;
  write_file_atomic(folder / (group.name + std::string(kExtension)), [&](const ByteSink& sink) {
    const ByteSink watched = [&](const void* data, size_t n) {
      sink(data, n);
      whole.update(data, n);
      checksums.push_back(crc32c(data, n));
      bytes += n;
    };
    names = write_safetensors(watched, group.tensors, group.metadata);
  });
  Json::object_t tensors;
  for (size_t i = 0; i < names.size(); ++i) tensors.emplace_back(names[i], checksums[i + 1]);
  return Json{{"bytes", bytes}, {"crc32c", whole.value()}, {"tensors", Json(std::move(tensors))}};
}

void write_everything(const fs::path& folder, int64_t step, const std::vector<TensorGroup>& groups,
                      const Json& state) {
  Json files = Json::object();
  for (const TensorGroup& group : groups) {
    files[group.name + std::string(kExtension)] = write_group(folder, group);
  }
  const std::string text = dump_state_json(state, kState);
  write_file_atomic(folder / kState, text);
  files[kState] = Json{{"bytes", text.size()}, {"crc32c", crc32c(text.data(), text.size())}};
  const Json manifest = {{"format", kFormat}, {"version", kVersion}, {"step", step}, {"files", files}};
  write_file_atomic(folder / kManifest, dump_state_json(manifest, kManifest));
  fsync_directory(folder);
}

}  // namespace

fs::path save_checkpoint(const fs::path& run_dir, int64_t step, const std::vector<TensorGroup>& groups,
                         const Json& state, int64_t keep) {
  check(step >= 0, "cannot save a checkpoint of step {}: it must be at least 0", step);
  check(state.is_object(), "cannot save a checkpoint: its state must be a JSON object");
  std::set<std::string> names;
  for (const TensorGroup& group : groups) {
    check(plain_group_name(group.name),
          "cannot save a checkpoint: group '{}' must be made of a-z, 0-9, _ and -",
          printable_name(group.name));
    check(names.insert(group.name).second, "cannot save a checkpoint: two groups are named '{}'", group.name);
  }

  const fs::path folder = run_dir / kFolder;
  const fs::path path = folder / fmt::format("step_{:06}", step);
  const fs::path temporary = temporary_path(path);
  try {
    fs::create_directories(folder);
    remove_leftovers(folder);
    fs::create_directory(temporary);
    write_everything(temporary, step, groups, state);
    move_into_place(temporary, path);
    fsync_directory(folder);
  } catch (const std::exception& e) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    fail_run("cannot save checkpoint {}: {}; the checkpoints saved before are intact", path.string(),
             e.what());
  }

  if (keep > 0) {
    auto all = list_checkpoints(run_dir);
    all.erase(std::remove(all.begin(), all.end(), path), all.end());
    for (int64_t i = 0; i < static_cast<int64_t>(all.size()) - (keep - 1); ++i) {
      remove_checkpoint(all[static_cast<size_t>(i)]);
    }
  }
  return path;
}

std::vector<fs::path> list_checkpoints(const fs::path& run_dir) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code error;
  for (fs::directory_iterator it(run_dir / kFolder, error), end; !error && it != end; it.increment(error)) {
    const auto name = parse_folder_name(it->path().filename().string());
    std::error_code ignored;
    if (name && !name->temporary_of && fs::exists(it->path() / kManifest, ignored)) {
      found.emplace_back(name->step, it->path());
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<fs::path> paths;
  for (auto& item : found) paths.push_back(std::move(item.second));
  return paths;
}

std::optional<fs::path> find_latest_checkpoint(const fs::path& run_dir) {
  const auto all = list_checkpoints(run_dir);
  if (all.empty()) return std::nullopt;
  return all.back();
}

// ---- loading -------------------------------------------------------------------------------------------

namespace {

uint32_t read_checksum(const StateReader& reader, const std::string& key, const std::string& source) {
  const uint64_t value = reader.word(key);
  check(value <= 0xFFFFFFFFu, "{}: the checksum of '{}' does not fit 32 bits", source, printable_name(key));
  return static_cast<uint32_t>(value);
}

// The manifest is what a path is built from: it may name no file outside its folder.
void check_file_name(const std::string& name, const std::string& source) {
  std::string_view stem = name;
  const bool tensors = stem.ends_with(kExtension);
  if (tensors) stem.remove_suffix(kExtension.size());
  check(name == kState || (tensors && plain_group_name(stem)),
        "{}: file '{}' is not one a checkpoint can hold; allowed: {} and <group>{}", source,
        printable_name(name), kState, kExtension);
}

// Throws naming the tensor whose bytes differ from what was saved, or the header if none does.
[[noreturn]] void report_damage(const SafetensorsFile& file, const ManifestFile& expected) {
  for (const SafetensorsEntry& e : file.entries()) {
    if (e.begin == e.end) continue;
    const std::string_view bytes = file.bytes(e);
    const auto it = expected.tensors.find(e.name);
    if (it != expected.tensors.end() && it->second != crc32c(bytes.data(), bytes.size())) {
      fail("{}: checksum mismatch in tensor '{}': the file is damaged", file.name(), printable_name(e.name));
    }
  }
  fail("{}: checksum mismatch in the header: the file is damaged or not the one saved", file.name());
}

// The validated bytes of one file; a damaged safetensors file is searched for the tensor to name.
std::shared_ptr<const MappedFile> open_validated(const fs::path& path, const ManifestFile& expected) {
  auto mapped = MappedFile::open(path);
  const std::string_view bytes = mapped->bytes();
  const bool tensors = path.native().ends_with(kExtension);
  if (bytes.size() != expected.bytes) {
    const std::string sizes = fmt::format("{} bytes, the manifest says {}", bytes.size(), expected.bytes);
    try {
      if (tensors) (void)SafetensorsFile::parse(bytes, path.string());
    } catch (const Error& e) {
      fail("{} ({})", e.what(), sizes);
    }
    fail("{}: truncated or replaced: {}", path.string(), sizes);
  }
  if (crc32c(bytes.data(), bytes.size()) != expected.checksum) {
    if (tensors) report_damage(SafetensorsFile::parse(bytes, path.string()), expected);
    fail("{}: checksum mismatch: the file is damaged", path.string());
  }
  return mapped;
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& source) {
  const Json document = parse_state_json(text, source);
  const StateReader reader(document, source);
  const std::string format = reader.text("format");
  check(format == kFormat, "{}: format '{}' is not '{}'", source, printable_name(format), kFormat);
  const int64_t version = reader.integer("version");
  check(version == kVersion, "{}: version {} is not one this program reads; it reads {}", source, version,
        kVersion);
  Manifest manifest;
  manifest.step = reader.integer("step");
  check(manifest.step >= 0, "{}: step {} must be at least 0", source, manifest.step);
  const StateReader files = reader.object("files");
  for (const auto& item : reader.value("files").items()) {
    check_file_name(item.key(), source);
    const StateReader entry = files.object(item.key());
    ManifestFile file;
    file.name = item.key();
    file.bytes = entry.word("bytes");
    file.checksum = read_checksum(entry, "crc32c", source);
    if (entry.contains("tensors")) {
      const StateReader tensors = entry.object("tensors");
      for (const auto& tensor : entry.value("tensors").items()) {
        file.tensors[tensor.key()] = read_checksum(tensors, tensor.key(), source);
      }
    }
    manifest.files.push_back(std::move(file));
  }
  check(files.contains(kState), "{}: lists no {}", source, kState);
  return manifest;
}

Checkpoint load_checkpoint(const fs::path& directory) {
  std::error_code error;
  check(fs::is_directory(directory, error), "{}: no such checkpoint folder", directory.string());
  const fs::path manifest_path = directory / kManifest;
  check(fs::exists(manifest_path, error), "{}: {} is missing: not a flexchat checkpoint, or only part of one",
        directory.string(), kManifest);
  const Manifest manifest = parse_manifest(read_file(manifest_path), manifest_path.string());

  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  checkpoint.step_ = manifest.step;
  for (const ManifestFile& file : manifest.files) {
    const fs::path path = directory / file.name;
    check(fs::exists(path, error), "{}: missing, although the manifest lists it", path.string());
    auto mapped = open_validated(path, file);
    const std::string_view bytes = mapped->bytes();
    if (file.name == kState) {
      checkpoint.state_ = std::make_shared<const Json>(parse_state_json(bytes, path.string()));
    } else {
      checkpoint.groups_.emplace(path.stem().string(), SafetensorsFile::parse(bytes, path.string(), mapped));
    }
  }
  return checkpoint;
}

const SafetensorsFile& Checkpoint::group(const std::string& name) const {
  const auto it = groups_.find(name);
  check(it != groups_.end(), "{}: no {}{} in this checkpoint", directory_.string(), name, kExtension);
  return it->second;
}

}  // namespace flexchat
