#include "base/file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace flexchat {
namespace {

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags)
      : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int close() {
    const int rc = ::close(fd_);
    fd_ = -1;
    return rc;
  }

 private:
  int fd_;
};

}  // namespace

std::string read_file(const std::filesystem::path& path) {
  Descriptor fd(path, O_RDONLY);
  check(fd.get() >= 0, "cannot read {}: {}", path.string(), std::strerror(errno));
  std::string out;
  char buffer[1 << 16];
  for (;;) {
    const ssize_t n = ::read(fd.get(), buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    check(n >= 0, "cannot read {}: {}", path.string(), std::strerror(errno));
    if (n == 0) return out;
    out.append(buffer, static_cast<size_t>(n));
  }
}

void write_file_atomic(const std::filesystem::path& path,
                       const std::function<void(const ByteSink&)>& produce) {
  std::filesystem::path temporary = path;
  temporary += ".tmp-" + std::to_string(::getpid());
  const auto give_up = [&](const char* what, int error) {
    ::unlink(temporary.c_str());
    fail_run("cannot write {}: {}: {} (what was there before is unchanged)", path.string(), what,
             std::strerror(error));
  };
  try {
    Descriptor fd(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    if (fd.get() < 0) give_up("open", errno);
    produce([&](const void* data, size_t bytes) {
      const char* p = static_cast<const char*>(data);
      while (bytes > 0) {
        const ssize_t n = ::write(fd.get(), p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) give_up("write", n == 0 ? ENOSPC : errno);
        p += n;
        bytes -= static_cast<size_t>(n);
      }
    });
    if (::fsync(fd.get()) != 0) give_up("fsync", errno);
    if (fd.close() != 0) give_up("close", errno);
    if (::rename(temporary.c_str(), path.c_str()) != 0) give_up("rename", errno);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  // The rename itself must survive a power cut. Some file systems refuse to fsync a directory: not an error.
  const auto directory = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  Descriptor dir(directory, O_RDONLY | O_DIRECTORY);
  if (dir.get() >= 0) ::fsync(dir.get());
}

void write_file_atomic(const std::filesystem::path& path, std::string_view bytes) {
  write_file_atomic(path, [&](const ByteSink& sink) { sink(bytes.data(), bytes.size()); });
}

}  // namespace flexchat
