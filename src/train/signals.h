// Ctrl-C and SIGTERM ask a run to stop at the next safe point; a second signal ends the process at once.
#pragma once

namespace flexchat {

class StopSignals {
 public:
  StopSignals();   // installs the handlers
  ~StopSignals();  // restores what was there
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  // The signal that came, or 0.
  static int received();
};

}  // namespace flexchat
