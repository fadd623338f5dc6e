#include "backend/jit_compiler.h"

#include <unistd.h>

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <optional>
#include <set>
#include <system_error>
#include <thread>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view magic = "flexchat cubin 1\n";  // the number changes with the format

struct AtomicCounters {
  std::atomic<int64_t> compiles{0}, disk_hits{0}, embedded_hits{0}, memory_hits{0};
};
AtomicCounters counted;

// ---- keys -----------------------------------------------------------------------------------------------

// FNV-1a with 128 bits (Fowler, Noll, Vo), over strings with their lengths.
class Hash {
 public:
  void add(std::string_view text) {
    const uint64_t size = text.size();
    add_bytes(&size, sizeof size);
    add_bytes(text.data(), text.size());
  }
  std::string hex() const {
    return fmt::format("{:016x}{:016x}", static_cast<uint64_t>(state_ >> 64), static_cast<uint64_t>(state_));
  }

 private:
  __extension__ using uint128 = unsigned __int128;
  void add_bytes(const void* data, size_t n) {
    constexpr uint128 prime = (uint128{1} << 88) + 0x13b;
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < n; ++i) state_ = (state_ ^ p[i]) * prime;
  }
  uint128 state_ = (uint128{0x6c62272e07bb0142} << 64) | 0x62b821756295c58d;
};

// Calls visit(name) for each `#include "name"` line, and other(line) for all other lines.
template <class Visit, class Other>
void scan_includes(std::string_view text, const Visit& visit, const Other& other) {
  constexpr std::string_view directive = "#include \"";
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size() - 1) + 1;
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end);
    const size_t quote =
        line.starts_with(directive) ? line.find('"', directive.size()) : std::string_view::npos;
    if (quote == std::string_view::npos) {
      other(line);
    } else {
      visit(line.substr(directive.size(), quote - directive.size()));
    }
  }
}

const JitHeader& find_header(const JitSource& source, std::string_view name) {
  for (const JitHeader& header : source.headers) {
    if (header.name == name) return header;
  }
  fail_run("kernel {} includes \"{}\", which is none of its headers", source.name, name);
}

// The headers that are included, directly or not, each once, in order of their first mention.
std::vector<JitHeader> included_headers(const JitSource& source) {
  std::vector<JitHeader> found;
  std::set<std::string_view> seen;
  const std::function<void(std::string_view)> visit = [&](std::string_view text) {
    scan_includes(
        text,
        [&](std::string_view name) {
          if (!seen.insert(name).second) return;
          found.push_back(find_header(source, name));
          visit(found.back().text);
        },
        [](std::string_view) {});
  };
  visit(source.text);
  return found;
}

// ---- files ----------------------------------------------------------------------------------------------

uint32_t crc(std::string_view bytes) { return crc32c(bytes.data(), bytes.size()); }

// What a file begins with: everything after it is the cubin.
std::string file_header(const std::string& key, const JitSource& source, std::string_view cubin) {
  return fmt::format("{}key {}\nsource {} bytes crc32c {:08x}\ncubin {} bytes crc32c {:08x}\n\n", magic, key,
                     source.text.size(), crc(source.text), cubin.size(), crc(cubin));
}

// The cubin of a file, unless it is missing or not what was written.
std::optional<std::string> read_cubin(const fs::path& path, const std::string& key, const JitSource& source) {
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) return std::nullopt;
  std::string bytes;
  try {
    bytes = read_file(path);
  } catch (const Error&) {
    return std::nullopt;  // removed in between, or not ours to read
  }
  const size_t end = bytes.find("\n\n");
  if (end == std::string::npos) return std::nullopt;
  std::string cubin = bytes.substr(end + 2);
  bytes.resize(end + 2);
  if (cubin.empty() || bytes != file_header(key, source, cubin)) return std::nullopt;
  return cubin;
}

// Threads may write the same file at once, so that each writes one of its own name first.
void write_cubin(const fs::path& path, const std::string& key, const JitSource& source,
                 const std::string& cubin) {
  static std::atomic<uint64_t> serial{0};
  fs::path own = path;
  own += fmt::format(".{}.{}", ::getpid(), serial++);
  std::error_code ignored;
  try {
    fs::create_directories(path.parent_path(), ignored);
    write_file_atomic(own, file_header(key, source, cubin) + cubin);
    fs::rename(own, path);
  } catch (const std::exception&) {  // a full or read-only disk: compiled again next time
    fs::remove(own, ignored);
  }
}

// Writes what did not compile where a person can look at it; says where, or that it could not.
std::string keep_failed_source(const fs::path& cache, const std::string& key, const JitSource& source) {
  std::error_code error;
  fs::path folder = cache.empty() ? fs::temp_directory_path(error) : cache / "failed";
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      fs::create_directories(folder, error);
      const fs::path path = folder / fmt::format("{}-{}.cu", source.name, key);
      write_file_atomic(path, expand_includes(source));
      return "the source is " + path.string();
    } catch (const std::exception&) {
      folder = fs::temp_directory_path(error);
    }
  }
  return "its source could not be written";
}

std::string first_error(const std::string& log) {
  std::string_view rest = log, first;
  while (!rest.empty()) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.find("error") != std::string_view::npos) return std::string(line);
    if (first.empty()) first = line;
  }
  return first.empty() ? "the compiler gives no reason" : std::string(first);
}

// Threads that compile ahead of time. The program must not be taken apart around one, nor before what NVRTC
// keeps for each thread is gone, so that the end of the program waits until they have ended.
class Ahead {
 public:
  // Runs `work` in a thread of its own. NVRTC must have been loaded, so that its own end comes after the
  // wait. Error: no thread is to be had (std::system_error).
  static void start(std::packaged_task<std::string()> work) {
    static const int registered = std::atexit(wait);
    check(registered == 0, "the program's exit cannot be watched");
    const std::lock_guard lock(mutex());
    workers().remove_if([](Worker& worker) {
      const bool done = worker.done;
      if (done) worker.thread.join();
      return done;
    });
    Worker& worker = workers().emplace_back();
    try {
      worker.thread = std::thread([&worker, work = std::move(work)]() mutable {
        work();
        worker.done = true;
      });
    } catch (...) {
      workers().pop_back();
      throw;
    }
  }
  static void wait() {
    const std::lock_guard lock(mutex());
    for (Worker& worker : workers()) worker.thread.join();
    workers().clear();
  }

 private:
  struct Worker {
    std::thread thread;
    std::atomic<bool> done{false};
  };
  // Never destroyed.
  static std::mutex& mutex() {
    static auto* const the = new std::mutex;
    return *the;
  }
  static std::list<Worker>& workers() {
    static auto* const the = new std::list<Worker>;
    return *the;
  }
};

}  // namespace

std::string jit_key(const JitSource& source, std::string_view arch) {
  Hash hash;
  hash.add(magic);
  hash.add(arch);
  for (const std::string& option : source.options) hash.add(option);
  hash.add(source.text);
  for (const JitHeader& header : included_headers(source)) {
    hash.add(header.name);
    hash.add(header.text);
  }
  return hash.hex();
}

std::string expand_includes(const JitSource& source) {
  std::string result;
  std::set<std::string_view> seen;
  const std::function<void(std::string_view)> expand = [&](std::string_view text) {
    scan_includes(
        text,
        [&](std::string_view name) {
          if (seen.insert(name).second) expand(find_header(source, name).text);
          if (!result.empty() && result.back() != '\n') result += '\n';
        },
        [&](std::string_view line) {
          if (!line.starts_with("#pragma once")) result += line;
        });
  };
  expand(source.text);
  return result;
}

std::string jit_arch(int major, int minor) {
  return fmt::format("sm_{}{}{}", major, minor, major == 9 ? "a" : "");
}

bool arch_runs_on(std::string_view arch, int major, int minor) {
  int number = 0;
  std::from_chars(arch.data() + 3, arch.data() + arch.size(), number);
  const bool same = number == 10 * major + minor;
  return same || (!arch.ends_with('a') && number / 10 == major && number % 10 <= minor);
}

JitCompiler::JitCompiler(int major, int minor, std::span<const EmbeddedCubin> embedded, fs::path cache)
    : major_(major),
      minor_(minor),
      arch_(jit_arch(major, minor)),
      embedded_(embedded),
      cache_(std::move(cache)) {}

JitCompiler::JitCompiler(std::string arch, fs::path cache)
    : arch_(std::move(arch)), cache_(std::move(cache)) {}

fs::path JitCompiler::cache_folder() {
  const auto variable = [](const char* name) -> std::string_view {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  };
  if (const auto own = variable("FLEXCHAT_CACHE"); !own.empty()) return own;
  if (const auto xdg = variable("XDG_CACHE_HOME"); !xdg.empty()) return fs::path(xdg) / "flexchat";
  if (const auto home = variable("HOME"); !home.empty()) return fs::path(home) / ".cache/flexchat";
  return {};
}

JitCompiler::~JitCompiler() {
  for (const auto& [key, e] : entries_) {
    if (e->ahead.valid()) e->ahead.wait();
  }
}

JitCompiler::Entry& JitCompiler::entry(const JitSource& source) {
  const std::string key = jit_key(source, arch_);
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Entry>& place = entries_[key];
  if (place == nullptr) place = std::make_unique<Entry>();
  return *place;
}

const std::string& JitCompiler::cubin(const JitSource& source) {
  Entry& e = entry(source);
  const std::lock_guard lock(e.mutex);  // the same source is compiled once, others go on
  if (e.ready) {
    ++counted.memory_hits;
    return e.cubin;
  }
  if (e.ahead.valid()) {
    e.cubin = e.ahead.get();
  } else if (std::optional<std::string> found = find(source)) {
    e.cubin = *std::move(found);
  } else {
    e.cubin = compile(source);
    ++counted.compiles;
  }
  e.ready = true;
  return e.cubin;
}

bool JitCompiler::compile_ahead(const JitSource& source) {
  Entry& e = entry(source);
  const std::lock_guard lock(e.mutex);
  if (e.ready || e.ahead.valid()) return e.ready;
  try {
    if (std::optional<std::string> found = find(source)) {
      e.cubin = *std::move(found);
      return e.ready = true;
    }
  } catch (const Error&) {
    return false;
  }
  std::packaged_task<std::string()> task([this, source] { return compile(source); });
  std::future<std::string> result = task.get_future();
  try {
    Ahead::start(std::move(task));
    e.ahead = std::move(result);
    ++counted.compiles;
  } catch (const std::system_error&) {  // compiled when it is asked for
  }
  return false;
}

const EmbeddedCubin* JitCompiler::find_embedded(const JitSource& source) const {
  std::map<std::string_view, std::string> keys;  // by architecture
  for (const EmbeddedCubin& candidate : embedded_) {
    if (!arch_runs_on(candidate.arch, major_, minor_)) continue;
    std::string& key = keys[candidate.arch];
    if (key.empty()) key = jit_key(source, candidate.arch);
    if (candidate.key == key) return &candidate;
  }
  return nullptr;
}

std::string JitCompiler::disk_key(const JitSource& source) const {
  JitSource with_version = source;
  try {
    with_version.options.push_back("NVRTC " + Nvrtc::instance().version());
  } catch (const Error& e) {
    fail("{}", without_nvrtc(e.what()));
  }
  return jit_key(with_version, arch_);
}

fs::path JitCompiler::disk_path(const std::string& key) const {
  return cache_ / "kernels" / (key + ".cubin");
}

std::optional<std::string> JitCompiler::find(const JitSource& source) const {
  if (const EmbeddedCubin* const embedded = find_embedded(source)) {
    ++counted.embedded_hits;
    return std::string(embedded->cubin);
  }
  const std::string key = disk_key(source);
  if (cache_.empty()) return std::nullopt;
  std::optional<std::string> cubin = read_cubin(disk_path(key), key, source);
  if (cubin) ++counted.disk_hits;
  return cubin;
}

std::string JitCompiler::compile(const JitSource& source) const {
  const Nvrtc& nvrtc = Nvrtc::instance();
  const std::string key = disk_key(source);
  std::vector<std::string> options = {"--gpu-architecture=" + arch_, "-std=c++17", "-default-device"};
  options.insert(options.end(), source.options.begin(), source.options.end());
  NvrtcResult result = nvrtc.compile(source.text, source.name + ".cu", included_headers(source), options);
  if (!result.ok) {
    fail_run("NVRTC {} does not compile kernel {} for {}: {} ({})", nvrtc.version(), source.name, arch_,
             first_error(result.log), keep_failed_source(cache_, key, source));
  }
  if (!cache_.empty()) write_cubin(disk_path(key), key, source, result.cubin);
  return std::move(result.cubin);
}

std::string JitCompiler::without_nvrtc(const char* reason) const {
  std::set<std::string_view> mods;
  for (const EmbeddedCubin& candidate : embedded_) {
    if (arch_runs_on(candidate.arch, major_, minor_)) mods.insert(candidate.mod);
  }
  const std::vector<std::string> names(mods.begin(), mods.end());
  return fmt::format(
      "this mask or score mod has to be compiled now. {}. Compiled in for {}, and usable without: {}", reason,
      arch_, names.empty() ? "none" : join(names));
}

void JitCompiler::count_memory_hit() { ++counted.memory_hits; }

void wait_for_jit() { Ahead::wait(); }

JitCounters jit_counters() {
  return {counted.compiles, counted.disk_hits, counted.embedded_hits, counted.memory_hits};
}

}  // namespace flexchat
