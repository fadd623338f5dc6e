// The program: runs the command, turns errors into one line and an exit code
// (0 pass, 1 a check failed or a run broke, 2 bad usage or bad input).
#include <fmt/core.h>
#include <malloc.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <string_view>

#include "backend/jit_compiler.h"
#include "base/error.h"
#include "cli/command.h"

int main(int argc, char** argv) {
  const auto complain = [](const std::exception& e, int code) {
    const std::string_view text = e.what();  // a command's own errors begin with its name
    fmt::print(stderr, "{}{}\n", text.starts_with("flexchat ") ? "" : "flexchat: ", text);
    return code;
  };
  // oneDNN takes and frees packing buffers in every product: keep that memory instead of faulting it in anew.
  // A file size limit must come back as an error from write(), not as a signal that ends the process.
  std::signal(SIGXFSZ, SIG_IGN);
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  const int code = [&] {
    try {
      return flexchat::run_command({argv + 1, argv + argc});
    } catch (const flexchat::Error& e) {
      return complain(e, 2);
    } catch (const std::exception& e) {
      return complain(e, 1);
    }
  }();
  flexchat::wait_for_jit();  // while everything that compilers use is still there
  return code;
}
