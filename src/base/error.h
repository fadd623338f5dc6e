// Errors a person can act on. Every message is one line: what is wrong, where, and what is allowed.
// Exit codes of the program: 0 pass, 1 a check failed or a run broke, 2 bad usage or bad input.
#pragma once

#ifdef __CUDACC__  // fmt 9 takes nvcc for a compiler without constexpr
#define FMT_USE_CONSTEXPR 1
#endif
#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace flexchat {

// Bad usage or bad input (exit code 2): flags, files, JSON, checkpoints, shapes.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A run that could not go on although its input was fine (exit code 1): NaN loss, disk full.
class RunError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

template <class... Args>
[[noreturn]] void fail_run(fmt::format_string<Args...> format, Args&&... args) {
  throw RunError(fmt::format(format, std::forward<Args>(args)...));
}

// check(ok, "format", args...): throws Error with the formatted text unless `ok`.
template <class... Args>
void check(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) fail(format, std::forward<Args>(args)...);
}

}  // namespace flexchat
