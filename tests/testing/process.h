// Runs the built program as a user would, in its own process.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

namespace flexchat::testing {

struct Finished {
  int code = -1;    // exit code, or 128 + signal
  std::string out;  // stdout and stderr together
};

class Process {
 public:
  Process(const std::filesystem::path& program, std::vector<std::string> words) {
    int fds[2];
    if (::pipe(fds) != 0) std::abort();
    words.insert(words.begin(), program.string());
    std::vector<char*> argv;
    for (std::string& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(fds[1], 1);
      ::dup2(fds[1], 2);
      ::close(fds[0]);
      ::close(fds[1]);
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(fds[1]);
    fd_ = fds[0];
  }
  ~Process() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      wait();
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void signal(int number) const { ::kill(pid_, number); }

  Finished wait() {
    Finished result;
    char buffer[4096];
    for (ssize_t n; (n = ::read(fd_, buffer, sizeof buffer)) > 0;)
      result.out.append(buffer, static_cast<size_t>(n));
    ::close(fd_);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return result;
  }

 private:
  pid_t pid_ = -1;
  int fd_ = -1;
};

inline Finished run_program(std::vector<std::string> words) {
  return Process(FLEXCHAT_PROGRAM, std::move(words)).wait();
}

}  // namespace flexchat::testing
