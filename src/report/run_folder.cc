#include "report/run_folder.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <vector>

#include "backend/cuda_loader.h"
#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "report/devices.h"
#include "report/environment.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMetrics = "metrics.jsonl";

std::string dump(const Json& value, int indent) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

// A run id becomes a folder that overwrite removes: it may not reach outside <root>/<kind>.
void check_plain_name(const std::string& what, const std::string& name) {
  const bool plain = !name.empty() && name.size() <= 100 && name[0] != '.' && name[0] != '-' &&
                     std::all_of(name.begin(), name.end(), [](unsigned char c) {
                       return std::isalnum(c) || c == '.' || c == '_' || c == '-';
                     });
  check(plain, "{} '{}' must be 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit",
        what, replace_invalid_utf8(name.substr(0, 120), nullptr));
}

std::vector<std::string> existing_runs(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void refuse_existing(const std::string& kind, const fs::path& path) {
  const std::string ways =
      kind == "train" ? "go on with it by --resume, give another --run-id" : "give another --run-id";
  fail("{} exists already: {}, or remove it", path.string(), ways);
}

void refuse_missing(const fs::path& folder, const std::string& run_id) {
  const auto names = existing_runs(folder);
  const std::string known = names.empty() ? "there is none" : "there are: " + join(names);
  fail("no run {} to resume{}; {}", (folder / run_id).string(), did_you_mean(run_id, names), known);
}

}  // namespace

std::string default_run_id() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y%m%d-%H%M%S", &parts);
  std::random_device random;
  return fmt::format("{}-{:04x}", text, random() & 0xFFFFu);
}

RunFolder RunFolder::create(const std::string& kind, const std::string& run_id, RunMode mode,
                            const fs::path& root) {
  check_plain_name("run kind", kind);
  const std::string id = run_id.empty() ? default_run_id() : run_id;
  check_plain_name("--run-id", id);
  const fs::path folder = root / kind, path = folder / id;
  std::error_code error;
  if (mode == RunMode::resume) {
    if (!fs::is_directory(path, error)) refuse_missing(folder, id);
    return RunFolder(kind, id, path);
  }
  fs::create_directories(folder, error);
  if (error) fail_run("cannot make the run folder {}: {}", folder.string(), error.message());
  if (mode == RunMode::overwrite) {
    fs::remove_all(path, error);
    if (error) fail_run("cannot remove the old run {}: {}", path.string(), error.message());
  }
  // Creating is the test: of two processes with one id only one goes on.
  const bool created = fs::create_directory(path, error);
  if (error) fail_run("cannot make the run folder {}: {}", path.string(), error.message());
  if (!created) refuse_existing(kind, path);
  return RunFolder(kind, id, path);
}

RunFolder::~RunFolder() { close_metrics(); }

RunFolder::RunFolder(RunFolder&& other) noexcept
    : kind_(std::move(other.kind_)),
      run_id_(std::move(other.run_id_)),
      path_(std::move(other.path_)),
      metrics_fd_(std::exchange(other.metrics_fd_, -1)) {}

void RunFolder::close_metrics() {
  if (metrics_fd_ >= 0) ::close(metrics_fd_);
  metrics_fd_ = -1;
}

void RunFolder::write_text(const std::string& name, std::string_view text) const {
  write_file_atomic(path_ / name, text);
}

void RunFolder::write_json(const std::string& name, const Json& value) const {
  write_text(name, dump(value, 2) + "\n");
}

void RunFolder::write_summary(const Json& summary) const {
  Json whole = Json::object();
  whole["kind"] = kind_;
  whole["run_id"] = run_id_;
  for (const auto& item : summary.items()) whole[item.key()] = item.value();
  if (!whole.contains("environment")) {
    whole["environment"] = capture_environment(cuda_opened() ? cuda_accelerators() : std::vector<Json>());
  }
  write_json("summary.json", whole);
  write_text("run.md", render_run_markdown(whole));
}

void RunFolder::append_metrics(const Json& line) {
  const fs::path file = path_ / kMetrics;
  if (metrics_fd_ < 0) {
    metrics_fd_ = ::open(file.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (metrics_fd_ < 0) fail_run("cannot write {}: {}", file.string(), std::strerror(errno));
  }
  const std::string text = dump(line, -1) + "\n";
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(metrics_fd_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_run("cannot write {}: {}", file.string(), std::strerror(errno));
    done += static_cast<size_t>(n);
  }
}

int64_t RunFolder::truncate_metrics(int64_t step) {
  close_metrics();
  const fs::path file = path_ / kMetrics;
  std::error_code error;
  if (!fs::exists(file, error)) return 0;
  const std::string text = read_file(file);
  std::string kept;
  int64_t dropped = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const bool whole = end != std::string::npos;  // a kill may have torn the last line
    const std::string_view line = std::string_view(text).substr(begin, (whole ? end : text.size()) - begin);
    const Json parsed = Json::parse(line, nullptr, false);
    const auto at = parsed.is_object() ? parsed.find("step") : parsed.end();
    if (whole && parsed.is_object() && at != parsed.end() && at->is_number_integer() &&
        at->get<int64_t>() <= step) {
      kept += std::string(line) + "\n";
    } else {
      ++dropped;
    }
    begin = whole ? end + 1 : text.size();
  }
  if (dropped > 0) write_file_atomic(file, kept);
  return dropped;
}

}  // namespace flexchat
