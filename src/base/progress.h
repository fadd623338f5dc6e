// A progress line: rate and ETA. On a terminal one line that redraws itself (at most ten times a second);
// otherwise plain lines, at most one every five seconds and a last one. Writes to stderr.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace flexchat {

class Progress {
 public:
  // total <= 0: unknown, no ETA. `unit` as in "docs", "steps", "MB".
  Progress(std::string label, int64_t total, std::string unit);
  ~Progress();  // finishes the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `note` is free text shown at the end ("loss 3.21  bpb 1.05").
  void update(int64_t done, const std::string& note = "");
  // Prints a whole line above the bar.
  void message(const std::string& line);
  void finish();

 private:
  void draw(bool last);
  std::string label_, unit_, note_;
  int64_t total_, done_ = 0, start_done_ = -1;
  std::chrono::steady_clock::time_point start_, drawn_;
  bool terminal_, finished_ = false;
};

}  // namespace flexchat
