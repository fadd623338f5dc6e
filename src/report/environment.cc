#include "report/environment.h"

#include <dnnl.h>
#include <fcntl.h>
#include <gnu/libc-version.h>
#include <hwy/highway.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstring>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"

#ifndef FLEXCHAT_VERSION
#define FLEXCHAT_VERSION "unknown"
#endif
#ifndef FLEXCHAT_BUILD_FLAGS
#define FLEXCHAT_BUILD_FLAGS "unknown"
#endif

extern char** environ;

namespace flexchat {
namespace {

namespace fs = std::filesystem;

// Small files of /proc, /sys and /etc; "" when absent.
std::string file_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return in ? out.str() : "";
}

std::string trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1));
}

// The rest of the first line "key<spaces><separator> value"; "" when there is none.
std::string field(const std::string& text, std::string_view key, char separator) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.find(separator);
    if (at != std::string::npos && trim(std::string_view(line).substr(0, at)) == key)
      return trim(line.substr(at + 1));
  }
  return "";
}

std::optional<int64_t> leading_integer(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{}) return std::nullopt;
  return value;
}

fs::path program_path() {
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error);
}

// Everything the child writes until it closes its output; nothing if `limit` passes first.
std::optional<std::string> read_pipe(int fd, std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  std::string out;
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return std::nullopt;
    pollfd wait{fd, POLLIN, 0};
    const int ready = ::poll(&wait, 1, static_cast<int>(left.count()));
    if (ready < 0 && errno != EINTR) return std::nullopt;
    if (ready <= 0) continue;
    std::array<char, 4096> buffer;
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n < 0 && errno != EINTR) return std::nullopt;
    if (n == 0) return out;
    if (n > 0) out.append(buffer.data(), static_cast<size_t>(n));
  }
}

// Standard output of a program found on PATH, run without a shell; nothing unless it ends well within 5 s.
std::optional<std::string> run_program(std::vector<std::string> words) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::array<int, 2> pipe_fds{};
  if (::pipe2(pipe_fds.data(), O_CLOEXEC) != 0) return std::nullopt;
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&actions, pipe_fds[1], STDOUT_FILENO);
  ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::close(pipe_fds[1]);
  if (error != 0) {
    ::close(pipe_fds[0]);
    return std::nullopt;
  }
  auto out = read_pipe(pipe_fds[0], std::chrono::seconds(5));
  ::close(pipe_fds[0]);
  if (!out) ::kill(pid, SIGKILL);
  int status = 0;
  pid_t waited;
  do {
    waited = ::waitpid(pid, &status, 0);
  } while (waited < 0 && errno == EINTR);
  if (waited != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 0) return std::nullopt;
  return out;
}

std::string os_name() {
  std::string name = field(file_text("/etc/os-release"), "PRETTY_NAME", '=');
  if (name.size() >= 2 && name.front() == '"' && name.back() == '"') name = name.substr(1, name.size() - 2);
  return name.empty() ? "unknown" : name;
}

std::string kernel_name() {
  utsname info{};
  return ::uname(&info) == 0 ? fmt::format("{} {} {}", info.sysname, info.release, info.machine) : "unknown";
}

Json or_null(std::optional<int64_t> value) { return value ? Json(*value) : Json(); }

}  // namespace

std::string shell_quote(const std::string& word) {
  constexpr std::string_view kSafe =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+=:,./-";
  if (!word.empty() && word.find_first_not_of(kSafe) == std::string::npos) return word;
  std::string out = "'";
  for (char c : word) {
    if (c == '\'') {
      out += "'\\''";
    } else {
      out += c;
    }
  }
  return out + "'";
}

std::string command_line() {
  const std::string raw = file_text("/proc/self/cmdline");
  std::vector<std::string> words;
  for (size_t begin = 0; begin < raw.size();) {
    const size_t end = std::min(raw.find('\0', begin), raw.size());
    words.push_back(shell_quote(raw.substr(begin, end - begin)));
    begin = end + 1;
  }
  return words.empty() ? "unknown" : replace_invalid_utf8(join(words, " "), nullptr);
}

std::string program_version() { return FLEXCHAT_VERSION; }
std::string build_flags() { return trim(FLEXCHAT_BUILD_FLAGS); }

std::string compiler_name() {
#if defined(__clang__)
  return fmt::format("Clang {}.{}.{}", __clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
  return fmt::format("GCC {}.{}.{}", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

std::string utc_time() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

CpuInfo cpu_info() {
  CpuInfo info;
  const std::string cpuinfo = file_text("/proc/cpuinfo");
  info.name = field(cpuinfo, "model name", ':');
  if (info.name.empty()) info.name = field(cpuinfo, "CPU part", ':');
  if (info.name.empty()) info.name = "unknown";
  cpu_set_t set;
  CPU_ZERO(&set);
  const bool known = ::sched_getaffinity(0, sizeof set, &set) == 0;
  info.cores = known ? CPU_COUNT(&set) : std::max(1u, std::thread::hardware_concurrency());

  std::string flags = field(cpuinfo, "flags", ':');
  if (flags.empty()) flags = field(cpuinfo, "Features", ':');  // Arm
  constexpr std::array kInteresting = {
      "sse4_2",   "avx",      "f16c",        "fma",         "avx2",        "avx_vnni", "avx512f",  "avx512bw",
      "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
      "amx_fp16", "asimd",    "asimdhp",     "sve",         "sve2",        "bf16",     "i8mm"};
  std::istringstream words(flags);
  const std::vector<std::string> present{std::istream_iterator<std::string>(words), {}};
  for (const char* name : kInteresting) {
    if (std::find(present.begin(), present.end(), name) != present.end()) info.features.emplace_back(name);
  }
  return info;
}

MemoryInfo memory_info() {
  MemoryInfo info;
  const std::string meminfo = file_text("/proc/meminfo");
  info.total = leading_integer(field(meminfo, "MemTotal", ':')).value_or(0) * 1024;
  info.available = leading_integer(field(meminfo, "MemAvailable", ':')).value_or(0) * 1024;
  info.limit = leading_integer(file_text("/sys/fs/cgroup/memory.max"));  // "max" = none
  return info;
}

fs::path source_root() {
  std::error_code error;
  for (fs::path folder = program_path().parent_path(); folder.has_relative_path();
       folder = folder.parent_path()) {
    // A marker of this project: an installed program may lie in someone else's repository.
    if (fs::exists(folder / ".git", error) && fs::exists(folder / "src/report/environment.cc", error))
      return folder;
  }
  return {};
}

GitState git_state(const fs::path& root) {
  GitState state;
  std::error_code error;
  if (root.empty() || !fs::exists(root / ".git", error)) return state;
  // Explicit folders win over GIT_DIR and GIT_WORK_TREE, which a surrounding git command may have set.
  const auto git = [&](const std::vector<std::string>& words) {
    std::vector<std::string> all = {"git",         "--no-optional-locks", "-C",
                                    root.string(), "--git-dir=.git",      "--work-tree=."};
    all.insert(all.end(), words.begin(), words.end());
    return run_program(all);
  };
  if (const auto commit = git({"rev-parse", "--verify", "HEAD"})) state.commit = trim(*commit);
  if (const auto changes = git({"status", "--porcelain"})) state.dirty = !trim(*changes).empty();
  return state;
}

OneDnn onednn_info() {
  OneDnn info;
  const dnnl_version_t* v = ::dnnl_version();
  info.version = fmt::format("{}.{}.{}", v->major, v->minor, v->patch);
  const auto isa = static_cast<unsigned>(::dnnl_get_effective_cpu_isa());
  switch (isa) {
    case dnnl_cpu_isa_sse41:
      info.isa = "sse41";
      break;
    case dnnl_cpu_isa_avx:
      info.isa = "avx";
      break;
    case dnnl_cpu_isa_avx2:
      info.isa = "avx2";
      break;
    case dnnl_cpu_isa_avx2_vnni:
      info.isa = "avx2_vnni";
      break;
    case dnnl_cpu_isa_avx512_core:
      info.isa = "avx512_core";
      break;
    case dnnl_cpu_isa_avx512_core_vnni:
      info.isa = "avx512_core_vnni";
      break;
    case dnnl_cpu_isa_avx512_core_bf16:
      info.isa = "avx512_core_bf16";
      break;
    case dnnl_cpu_isa_avx512_core_amx:
      info.isa = "avx512_core_amx";
      break;
#if DNNL_VERSION_MAJOR >= 3  // by value: not every release of 3 names all of them
    case 0x1f:
      info.isa = "avx2_vnni_2";
      break;
    case 0x1ef:
      info.isa = "avx512_core_fp16";
      break;
    case 0x1fef:
      info.isa = "avx512_core_amx_fp16";
      break;
#endif
    default:
      info.isa = fmt::format("0x{:x}", isa);
  }
  return info;
}

std::string highway_target() {
  const auto targets = hwy::SupportedAndGeneratedTargets();  // best first
  return targets.empty() ? "unknown" : hwy::TargetName(targets[0]);
}

Json capture_environment(const std::vector<Json>& accelerators) {
  const CpuInfo cpu = cpu_info();
  const MemoryInfo memory = memory_info();
  const GitState git = git_state(source_root());
  const OneDnn dnnl = onednn_info();
  std::error_code error;
  Json e;
  e["command"] = command_line();
  e["program"] = replace_invalid_utf8(program_path().string(), nullptr);
  e["directory"] = replace_invalid_utf8(fs::current_path(error).string(), nullptr);
  e["date"] = utc_time();
  e["version"] = program_version();
  e["commit"] = git.commit;
  e["dirty"] = git.dirty ? Json(*git.dirty) : Json();
  e["build"] = build_flags();
  e["compiler"] = compiler_name();
  e["cpu"] = Json{{"name", cpu.name}, {"cores", cpu.cores}, {"features", cpu.features}};
  e["memory"] = Json{{"total_bytes", memory.total}, {"available_bytes", memory.available}};
  e["memory"]["limit_bytes"] = or_null(memory.limit);
  e["os"] = os_name();
  e["kernel"] = kernel_name();
  e["libraries"] =
      Json{{"oneDNN", fmt::format("{} ({})", dnnl.version, dnnl.isa)},
           {"Highway", fmt::format("{}.{}.{} ({})", HWY_MAJOR, HWY_MINOR, HWY_PATCH, highway_target())},
           {"fmt", fmt::format("{}.{}.{}", FMT_VERSION / 10000, FMT_VERSION / 100 % 100, FMT_VERSION % 100)},
           {"nlohmann_json", fmt::format("{}.{}.{}", NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR,
                                         NLOHMANN_JSON_VERSION_PATCH)},
           {"glibc", ::gnu_get_libc_version()}};
  e["devices"] = Json::array({Json{{"device", "cpu"}, {"name", cpu.name}, {"cores", cpu.cores}}});
  for (const Json& device : accelerators) e["devices"].push_back(device);
  return e;
}

Json capture_environment() { return capture_environment({}); }

}  // namespace flexchat
